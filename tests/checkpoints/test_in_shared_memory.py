"""Shared snapshots as another process has it: states are visited where they lie, the newest that counts, and whole."""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parakit.checkpoints.in_shared_memory import Room, SharedMemorySnapshots, SnapshotsReader

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name")
pytestmark = linux

SIZE = 300_000  # elements, of which each state takes pages of its own


def state(step: int, size: int = 5) -> dict[str, Any]:
    return {"step": step, "w": torch.full((size,), float(step)), "rest": {"lr": 0.1, "names": ("a", step)}}


@pytest.fixture
def snapshots() -> Iterator[SharedMemorySnapshots]:
    """One of three places, with the states of steps 1 to 3."""
    made = SharedMemorySnapshots(state(1), 3)
    for step in (2, 3):
        made.keep(state(step))
    yield made
    made.close()


def opened(snapshots: SharedMemorySnapshots) -> SnapshotsReader:
    return SnapshotsReader(snapshots.key)


# --- visits


@pytest.mark.parametrize(("step", "found"), [(3, 3), (99, 3), (2, 2), (1, 1)])
def test_the_newest_state_of_at_most_a_step_is_visited(snapshots: SharedMemorySnapshots, step: int, found: int) -> None:
    seen = opened(snapshots).visit(step, lambda there: (there["step"], there["w"].tolist(), there["rest"]))
    assert seen == (found, [found] * 5, {"lr": 0.1, "names": ("a", found)})


def test_where_there_is_none_nobody_is_called(snapshots: SharedMemorySnapshots) -> None:
    assert opened(snapshots).visit(0, lambda there: pytest.fail("called")) is None


def test_a_state_is_visited_where_it_lies(snapshots: SharedMemorySnapshots) -> None:
    def overwrite(there: dict[str, Any]) -> None:
        there["w"].fill_(7.0)

    opened(snapshots).visit(3, overwrite)
    newest = snapshots.of_step(3)
    assert newest is not None
    assert newest["w"].tolist() == [7.0] * 5


def test_what_newest_gives_is_a_copy(snapshots: SharedMemorySnapshots) -> None:
    copy = opened(snapshots).newest(3)
    assert copy is not None
    copy["w"].fill_(7.0)
    assert opened(snapshots).newest(3)["w"].tolist() == [3.0] * 5  # type: ignore[index]


@pytest.mark.parametrize(("step", "found"), [(99, 3), (2, 2), (0, -1)])
def test_which_step_it_is_can_be_asked(snapshots: SharedMemorySnapshots, step: int, found: int) -> None:
    assert opened(snapshots).newest_step(step) == found


def test_a_visit_begins_again_if_the_owner_wrote_over_the_state(snapshots: SharedMemorySnapshots) -> None:
    visited: list[int] = []

    def slow(there: dict[str, Any]) -> Tensor:
        visited.append(there["step"])
        if len(visited) == 1:
            for step in (4, 5, 6):
                snapshots.keep(state(step))
        return there["w"].clone()  # type: ignore[no-any-return]

    found = opened(snapshots).visit(9, slow)
    assert visited == [3, 6]
    assert found is not None
    assert found.tolist() == [6.0] * 5


def test_an_error_over_a_state_that_was_written_over_tells_nothing(snapshots: SharedMemorySnapshots) -> None:
    visited: list[int] = []

    def fail_at_first(there: dict[str, Any]) -> int:
        visited.append(there["step"])
        if len(visited) == 1:
            for step in (4, 5, 6):
                snapshots.keep(state(step))
            raise ValueError("half of it is another state")
        return int(there["step"])

    assert opened(snapshots).visit(9, fail_at_first) == 6


def test_an_error_over_a_whole_state_is_raised(snapshots: SharedMemorySnapshots) -> None:
    def fail(there: dict[str, Any]) -> None:
        raise ValueError("on its own account")

    with pytest.raises(ValueError, match="on its own account"):
        opened(snapshots).visit(3, fail)


def test_who_never_gets_a_whole_one_gets_none(snapshots: SharedMemorySnapshots) -> None:
    tries: list[int] = []

    def never(there: dict[str, Any]) -> int:
        tries.append(there["step"])
        for step in range(3):
            snapshots.keep(state(tries[-1] + step + 1))
        return 1

    assert opened(snapshots).visit(10**6, never) is None
    assert len(tries) > 1


# --- what counts


def test_a_state_that_is_half_written_does_not_count(snapshots: SharedMemorySnapshots) -> None:
    seen = opened(snapshots)
    at = next(at for at in places_of(seen) if struct.unpack_from("qq", seen._memory, at)[1] == 3)
    struct.pack_into("q", seen._memory, at, 0)  # as its owner does before it writes
    assert seen.newest_step(99) == 2


def places_of(seen: SnapshotsReader) -> range:
    size = (seen.key.nbytes - 64) // 3
    return range(64, 64 + 3 * size, size)


def test_what_was_undone_does_not_count(snapshots: SharedMemorySnapshots) -> None:
    snapshots.keep(state(2) | {"rest": "again"})
    seen = opened(snapshots)
    assert seen.newest_step(99) == 2
    assert seen.newest(99)["rest"] == "again"  # type: ignore[index]


# --- memory


def pages(key_descriptor: int) -> int:
    """Bytes that the system has given to shared snapshots's memory."""
    return os.fstat(key_descriptor).st_blocks * 512


def test_room_that_is_not_written_to_takes_no_memory() -> None:
    snapshots = SharedMemorySnapshots(state(1), 2, Room(1 << 16, 1 << 28))
    assert snapshots.key.nbytes > 1 << 29
    assert pages(snapshots.key.descriptor) < 1 << 20
    snapshots.close()


@pytest.mark.skipif(not hasattr(mmap, "MADV_REMOVE"), reason="a system that cannot give it back")
def test_memory_of_all_states_but_one_is_given_back() -> None:
    snapshots = SharedMemorySnapshots(state(1, SIZE), 3)
    for step in (2, 3):
        snapshots.keep(state(step, SIZE))
    before = pages(snapshots.key.descriptor)
    seen = opened(snapshots)
    seen.keep_only(2)
    assert before > 3 * 4 * SIZE
    assert pages(snapshots.key.descriptor) < 2 * 4 * SIZE
    assert [seen.newest_step(step) for step in (99, 2, 1)] == [2, 2, -1]
    kept = seen.newest(2)
    assert kept is not None
    assert torch.equal(kept["w"], torch.full((SIZE,), 2.0))
    snapshots.close()


def test_where_none_is_wanted_none_is_given_back(snapshots: SharedMemorySnapshots) -> None:
    seen = opened(snapshots)
    seen.keep_only(0)
    assert [seen.newest_step(step) for step in (3, 2, 1)] == [3, 2, 1]


# --- room


def test_room_is_what_a_state_takes() -> None:
    small, large = Room.of(state(1, 10)), Room.of(state(1, 1000))
    assert large.tensors - small.tensors == pytest.approx(4 * 990, abs=64)
    assert large.holds(small)
    assert not small.holds(large)
    assert not Room(0, 10**9).holds(small)


def test_foreseen_room_holds_what_adam_comes_to_keep() -> None:
    layer = torch.nn.Linear(100, 100)
    moments = [{name: torch.zeros_like(p) for name in ("mean", "square", "largest")} for p in layer.parameters()]
    whole = {"step": 1, "parameters": dict(layer.named_parameters()), "optimizer": moments}
    assert Room.foreseen(layer.parameters(), layer.parameters()).holds(Room.of(whole))


def test_a_state_that_fits_the_room_stays_in_its_memory() -> None:
    snapshots = SharedMemorySnapshots({"step": 0}, 2, Room(1 << 16, 1 << 20))
    key = snapshots.key
    snapshots.keep(state(1, 1000))
    assert snapshots.key == key
    snapshots.keep(state(2, SIZE))
    assert snapshots.key != key
    snapshots.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3).t(), torch.tensor(2.5), torch.zeros(0, 4), torch.arange(3, dtype=torch.uint8),
        torch.ones(3, dtype=torch.bfloat16), torch.tensor([1 + 2j]), torch.ones(1).expand(4), torch.tensor([True]),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)  # fmt: skip
def test_tensors_of_every_kind_are_kept(tensor: Tensor) -> None:
    snapshots = SharedMemorySnapshots({"step": 1, "first": tensor, "second": [tensor + tensor]})
    found = opened(snapshots).newest(1)
    assert found is not None
    for name, expected in (("first", tensor), ("second", tensor + tensor)):
        value = found[name] if name == "first" else found[name][0]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        assert torch.equal(value, expected)
    snapshots.close()


# --- another process

OWNER = """
import pickle, sys, torch
from parakit.checkpoints.in_shared_memory import SharedMemorySnapshots
snapshots = SharedMemorySnapshots({"step": 1, "w": torch.ones(5)})
snapshots.keep({"step": 2, "w": torch.full((5,), 2.0)})
sys.stdout.buffer.write(pickle.dumps(snapshots.key)); sys.stdout.flush()
sys.stdin.read()
"""


def test_what_is_in_it_stays_when_its_owner_has_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        seen = SnapshotsReader(pickle.load(owner.stdout))
        owner.stdin.close()
        assert owner.wait(timeout=60) == 0
    assert not Path(f"/proc/{seen.key.pid}").exists()
    assert seen.newest(9)["w"].tolist() == [2.0] * 5  # type: ignore[index]
    with pytest.raises(OSError, match=r"No such file|gone"):
        SnapshotsReader(seen.key)
