"""Snapshots: what is kept, in this process's memory and in shared snapshots that outlives it."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parakit.checkpoints.in_memory import InMemorySnapshots
from parakit.checkpoints.in_shared_memory import SharedMemorySnapshots, SnapshotsReader, open_snapshots
from parakit.checkpoints.state import copy_state
from tests.conftest import left_in_shared_memory, shared_memory


def test_a_state_is_copied_into_an_older_copy_where_it_fits() -> None:
    state = {"a": torch.ones(3), "b": [torch.ones(2), 1], "c": (None, "x")}
    old = copy_state(state)
    assert old["a"].data_ptr() != state["a"].data_ptr()
    state["a"] += 1
    new = copy_state(state, old)
    assert new["a"] is old["a"]
    assert new["a"].tolist() == [2, 2, 2]
    wider = copy_state({"a": torch.ones(4), "b": [torch.ones(2).double(), 2], "d": {}}, old)
    assert wider["a"].shape == (4,)
    assert wider["b"][0].dtype == torch.float64
    assert wider["b"][1] == 2
    assert set(wider) == {"a", "b", "d"}


def state(step: int, size: int = 5) -> dict[str, Any]:
    return {
        "step": step,
        "parameters": {"w": torch.full((3, size), float(step)), "none": torch.zeros(0), "b": torch.arange(size) > step},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step)), "m": torch.ones(2).bfloat16() * step}},
                      "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]},
        "scheduler": None,
    }  # fmt: skip


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    else:
        assert found == expected


def test_private_commits_keep_the_newest() -> None:
    commits = InMemorySnapshots()
    commits.keep(state(3))
    commits.keep(state(4))
    assert commits.step == 4
    assert commits.of_step(3) is None
    assert_equal(commits.of_step(4), state(4))


def test_private_commits_can_keep_several() -> None:
    commits = InMemorySnapshots(2)
    for step in (3, 4, 7):
        commits.keep(state(step))
    assert commits.of_step(3) is None
    for step in (4, 7):
        assert_equal(commits.of_step(step), state(step))
    places = {commits.of_step(step)["parameters"]["w"].data_ptr() for step in (4, 7)}  # type: ignore[index]
    commits.keep(state(9))
    assert commits.of_step(9)["parameters"]["w"].data_ptr() in places  # type: ignore[index]


@pytest.mark.parametrize(
    "make", [lambda first: kept(InMemorySnapshots(3), first), lambda first: SharedMemorySnapshots(first, 3)]
)
def test_what_is_kept_again_undoes_what_came_after(make: Any) -> None:
    commits = make(state(1))
    for step in (2, 3):
        commits.keep(state(step))
    again = state(2) | {"scheduler": "again"}
    commits.keep(again)
    assert commits.step == 2
    assert commits.of_step(3) is None
    assert_equal(commits.of_step(2), again)
    assert_equal(commits.of_step(1), state(1)) if isinstance(commits, InMemorySnapshots) else None
    commits.keep(state(3))
    assert_equal(commits.of_step(3), state(3))
    assert_equal(commits.of_step(2), again)
    if isinstance(commits, SharedMemorySnapshots):
        seen = SnapshotsReader(commits.key)
        assert_equal(seen.newest(2), again)
        commits.close()


def kept(commits: InMemorySnapshots, first: dict[str, Any]) -> InMemorySnapshots:
    commits.keep(first)
    return commits


def test_a_snapshots_keeps_as_many_as_it_has_places() -> None:
    snapshots = SharedMemorySnapshots(state(1), 3)
    seen = SnapshotsReader(snapshots.key)
    for step in (2, 3, 4):
        snapshots.keep(state(step))
    assert seen.newest(1) is None
    for step in (2, 3, 4):
        assert_equal(snapshots.of_step(step), state(step))
        assert_equal(seen.newest(step), state(step))
    snapshots.close()


def test_a_snapshots_keeps_two_and_others_can_read_them() -> None:
    snapshots = SharedMemorySnapshots(state(1))
    seen = SnapshotsReader(snapshots.key)
    assert_equal(seen.newest(1), state(1))
    assert seen.newest(0) is None
    for step in (2, 3):
        snapshots.keep(state(step))
    assert snapshots.step == 3
    assert snapshots.of_step(1) is None
    for step in (2, 3):
        assert_equal(snapshots.of_step(step), state(step))
        assert_equal(seen.newest(step), state(step))
    assert_equal(seen.newest(99), state(3))
    snapshots.close()
    assert_equal(seen.newest(99), state(3))


def test_what_was_read_stays_as_it_is() -> None:
    snapshots = SharedMemorySnapshots(state(1))
    mine, other = snapshots.of_step(1), SnapshotsReader(snapshots.key).newest(1)
    for step in (2, 3, 4):
        snapshots.keep(state(step))
    assert_equal(mine, state(1))
    assert_equal(other, state(1))
    snapshots.close()


def test_a_state_that_needs_more_room_gets_it() -> None:
    snapshots = SharedMemorySnapshots({"step": 0})
    first = SnapshotsReader(snapshots.key)
    snapshots.keep(state(1, size=1000))
    assert snapshots.key != first.key
    again = open_snapshots(snapshots.key, first)
    assert again is not None
    assert again is not first
    assert open_snapshots(snapshots.key, again) is again
    assert_equal(again.newest(1), state(1, size=1000))
    assert_equal(first.newest(1), {"step": 0})
    large = state(2) | {"scheduler": "x" * 200_000}
    snapshots.keep(large)
    assert_equal(snapshots.of_step(2), large)
    snapshots.close()


def test_the_same_step_may_be_kept_again() -> None:
    snapshots = SharedMemorySnapshots(state(1))
    changed = state(1) | {"scheduler": {"lr": 0.5}}
    snapshots.keep(changed)
    assert_equal(snapshots.of_step(1), changed)
    snapshots.close()


def test_snapshots_that_are_gone_or_elsewhere_is_not_opened() -> None:
    snapshots = SharedMemorySnapshots(state(1))
    key = snapshots.key
    with pytest.raises(OSError, match="another machine"):
        SnapshotsReader(key._replace(machine="elsewhere"))
    with pytest.raises(OSError, match="gone"):
        SnapshotsReader(key._replace(name=b"0" * 16))
    with pytest.raises(OSError, match="gone"):
        SnapshotsReader(key._replace(nbytes=4096))
    snapshots.close()
    assert open_snapshots(key, None) is None
    assert open_snapshots(None, None) is None


def test_it_has_no_name_and_leaves_no_descriptor() -> None:
    gc.collect()  # of what other tests left to it
    before, files = shared_memory(), len(list(Path("/proc/self/fd").iterdir()))
    snapshots = SharedMemorySnapshots(state(1, size=100_000))
    seen = SnapshotsReader(snapshots.key)
    assert not left_in_shared_memory(before)
    snapshots.close()
    del seen, snapshots
    assert len(list(Path("/proc/self/fd").iterdir())) == files


WRITER = textwrap.dedent(
    """
    import os, pickle, sys
    import torch
    from parakit.checkpoints.in_shared_memory import SharedMemorySnapshots

    snapshots = SharedMemorySnapshots({"step": 0, "w": torch.zeros(300_000)})
    step = 0
    while True:
        step += 1
        snapshots.keep({"step": step, "w": torch.full((300_000,), float(step))})
        if step == 3:
            sys.stdout.buffer.write(pickle.dumps(snapshots.key))
            sys.stdout.flush()
    """
)


@pytest.mark.slow
@pytest.mark.processes
def test_whoever_is_killed_while_it_writes_leaves_a_whole_state(tmp_path: Path) -> None:
    steps = []
    for wait_seconds in (0.05, 0.171, 0.0333):
        with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            snapshots = SnapshotsReader(pickle.load(writer.stdout))
            time.sleep(wait_seconds)
            os.kill(writer.pid, signal.SIGKILL)
        found = snapshots.newest(10**9)
        assert found is not None
        older = snapshots.newest(found["step"] - 1)
        steps.append(found["step"])
        for whole in (found, *([older] if older else [])):
            assert torch.equal(whole["w"], torch.full((300_000,), float(whole["step"])))
    assert min(steps) > 2
