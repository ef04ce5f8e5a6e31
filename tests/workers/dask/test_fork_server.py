"""The fork server of local workers: one for all pools of a process, as long as one of them is there."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import psutil
import pytest

import parakit as pk

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
        (fork_server,) = parents(first)
        with pk.connect(1) as second:
            assert parents(second) == {fork_server}
        assert psutil.Process(fork_server).is_running()
        assert psutil.Process(fork_server).num_threads() == 1  # what is forked with threads may hang later


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


KILLED = """
import os, signal, sys, threading, time
import psutil
import parakit as pk

def family():
    return [child for child in psutil.Process().children(recursive=True)
            if "resource_tracker" not in " ".join(child.cmdline())]

if __name__ == "__main__":
    with pk.connect(2) as workers:
        before = set(workers.names)
        os.kill(psutil.Process(next(iter(workers.pids.values()))).ppid(), signal.SIGKILL)
        # Dask takes its children for dead as well, and starts others from a new one.
        while set(workers.names) & before or (sys.argv[1] == "waited" and workers.size < 2):
            time.sleep(0.05)
    print(family(), [thread.name for thread in threading.enumerate() if "Dask Worker" in thread.name])
"""


@pytest.mark.parametrize("when", ["waited", "at once"])
def test_workers_whose_fork_server_is_killed_are_replaced_and_nothing_stays(tmp_path: Path, when: str) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    told = subprocess.run(
        [sys.executable, tmp_path / "killed.py", when], capture_output=True, text=True, timeout=90, check=True
    )
    assert told.stdout == "[] []\n"


def settings(_: int) -> tuple[bool, str]:
    return (
        dask.config.get("distributed.worker.profile.enabled"), dask.config.get("distributed.admin.tick.interval")
    )  # fmt: skip


def test_dask_watches_local_workers_less_unless_somebody_wants_it_to(pool: pk.Workers) -> None:
    assert pool.map(settings, [0], 30.0) == [(False, "500ms")]
    assert settings(0) == (True, "20ms")  # here, nothing has changed
    with dask.config.set({"distributed.admin.tick.interval": "50ms"}), pk.connect(1) as other:
        assert other.map(settings, [0], 30.0) == [(False, "50ms")]


def arenas(_: int) -> int:
    """Of glibc's malloc, in this process, once a thread has asked it for memory."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "malloc.xml")
        file = ctypes.c_void_p(libc.fopen(os.fsencode(place), b"w"))
        libc.malloc_info(0, file)
        libc.fclose(file)
        return place.read_text().count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of another C library nothing is asked")
def test_threads_of_a_worker_share_one_arena_for_any_other_returns_its_memory(pool: pk.Workers) -> None:
    assert pool.map(arenas, [0, 1, 2, 3], 30.0) == [1, 1, 1, 1]
