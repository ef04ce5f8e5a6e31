"""The nursery of local workers: one for all pools of a process, as long as one of them is there."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import dask.config
import numpy as np
import psutil
import pytest

import parakit as pk
from tests.test_exact import wait_for
from tests.test_run import endless

pytestmark = [
    pytest.mark.dask,
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned"),
]


def parents(pool: pk.Workers) -> set[int]:
    return {psutil.Process(pid).ppid() for pid in pool.pids.values()}  # type: ignore[attr-defined]


def about(_: int) -> dict[str, Any]:
    return {
        "variable": os.environ.get("PARAKIT_TEST_VARIABLE"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "drawn": float(np.random.rand()),  # noqa: NPY002  # as users' code may
    }


def test_pools_of_a_process_share_one_and_it_goes_with_the_last(nothing_left: None) -> None:
    with pk.connect(1) as first:
        (nursery,) = parents(first)
        with pk.connect(1) as second:
            assert parents(second) == {nursery}
        assert psutil.Process(nursery).is_running()
        assert psutil.Process(nursery).num_threads() == 1  # what is forked with threads may hang later


def test_workers_have_the_environment_of_their_pool_and_draw_each_their_own(
    pool: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAKIT_TEST_VARIABLE", "new")
    with pk.connect(2) as later:
        told = later.map(about, [0, 1], 30.0)
    assert [each["variable"] for each in told] == ["new", "new"]
    assert [each["threads"] for each in told] == ["1", "1"]
    assert told[0]["drawn"] != told[1]["drawn"]


def test_this_process_is_left_as_it_was(nothing_left: None) -> None:
    method = dask.config.get("distributed.worker.multiprocessing-method")
    pk.connect(1).close()
    assert dask.config.get("distributed.worker.multiprocessing-method") == method


def test_a_run_goes_on_when_the_nursery_is_killed(nothing_left: None) -> None:
    with pk.connect(2) as workers:
        run = endless(workers, workers=2)
        wait_for(run, lambda: run.step > 5)
        for nursery in parents(workers):
            os.kill(nursery, signal.SIGKILL)
        # Dask takes its children for dead as well, and starts others from a new one.
        done = run.step
        wait_for(run, lambda: run.step > done + 50, 60)
        deadline = time.monotonic() + 60
        while workers.size < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workers.size == 2
        run.stop()
        run.wait(30, progress=False)
