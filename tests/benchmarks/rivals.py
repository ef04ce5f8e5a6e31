"""PlainArm that wait for orders: plain PyTorch in a process of its own, and DDP under torchrun.

Each process connects to a socket of its master's and then sleeps in the kernel until it is told to do some steps, so
that whoever is timed has the machine for itself. ``python -m tests.benchmarks.rivals SOCKET WORKLOAD KIND THREADS``
is what runs in it; `rival` starts it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.workloads import WORKLOADS, optimizer

_KEY = b"a benchmark and its rivals"
_ROOT = Path(__file__).resolve().parents[2]
_ANSWER_SECONDS = 120.0
_LOOK_SECONDS = 0.5
_WARM_STEPS = 3
#: What glibc's malloc is told in parakit's workers.
TUNED = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}


class Rival:
    """One or several processes, seen from their master.

    Parameters
    ----------
    process : Popen
    members : list of Connection
        One a process that computes.
    """

    def __init__(self, process: subprocess.Popen[bytes], members: list[Connection]) -> None:
        self.process = process
        self._members = members
        self._step_seconds = self._order(1, _WARM_STEPS) / _WARM_STEPS

    def step_seconds(self, window_seconds: float) -> float:
        """Seconds of a step, over a window; caches are warmed up first."""
        count = max(2, round(window_seconds / self._step_seconds))
        warm = max(1, min(count // 4, round(0.2 / self._step_seconds)))
        self._step_seconds = self._order(warm, count) / count
        return self._step_seconds

    def _order(self, warm: int, count: int) -> float:
        for member in self._members:
            member.send((warm, count))
        return max(self._answer(member) for member in self._members)

    def _answer(self, member: Connection) -> float:
        assert member.poll(_ANSWER_SECONDS), "no answer"
        return float(member.recv())


@contextlib.contextmanager
def rival(kind: str, workload: int, threads: int, *, tuned: bool = False) -> Iterator[Rival]:
    """Start a rival; it ends with the context.

    Parameters
    ----------
    kind : {"plain", "ddp"}
        Plain PyTorch, or DDP with two processes.
    workload : int
        A place in `WORKLOADS`.
    threads : int
        Of each process.
    tuned : bool
        Whether glibc's malloc keeps freed memory, as in parakit's workers.
    """
    with TemporaryDirectory() as folder:
        place = str(Path(folder, "socket"))
        arguments = ["-m", "tests.benchmarks.rivals", place, str(workload), kind, str(threads)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if kind == "ddp" else []
        command = [sys.executable, *launcher, *arguments]
        with Listener(place, authkey=_KEY) as listener:
            process = subprocess.Popen(
                command, cwd=_ROOT, env=_environment(tuned, threads if kind == "ddp" else None),
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            members: list[Connection] = []
            try:
                members.extend(_accepted(listener, process) for _ in range(2 if kind == "ddp" else 1))
                yield Rival(process, members)
            finally:
                for member in members:  # the processes end by themselves when there is nobody left to order
                    member.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _accepted(listener: Listener, process: subprocess.Popen[bytes]) -> Connection:
    """The next one that connects; a process that ends before it does, or takes too long, is not waited for."""
    listener._listener._socket.settimeout(_LOOK_SECONDS)  # type: ignore[attr-defined]  # it has no limit of its own
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        with contextlib.suppress(TimeoutError):
            return listener.accept()
        assert process.poll() is None, "a rival ended as it started"
        assert time.monotonic() < deadline, "a rival did not start"


def _environment(tuned: bool, threads: int | None) -> dict[str, str]:
    """A user's own: without what was set for this process's sake."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "MKL_"))}
    kept |= {"PYTHONPATH": str(_ROOT), **(TUNED if tuned else {})}
    return kept if threads is None else kept | {"OMP_NUM_THREADS": str(threads)}


# --- in the processes


def main(place: str, workload: str, kind: str, threads: str) -> None:
    import torch

    torch.set_num_threads(int(threads))
    steps = _steps(int(workload), kind)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt), Client(place, authkey=_KEY) as master:
        while True:
            warm, count = master.recv()
            for _ in range(warm):
                next(steps)
            began = time.perf_counter()
            for _ in range(count):
                next(steps)
            master.send(time.perf_counter() - began)
    os._exit(0)  # without a farewell to a group whose other member may have gone


def _steps(place: int, kind: str) -> Iterator[Any]:
    """Train as a user would by hand."""
    import torch
    from torch import distributed
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    workload = WORKLOADS[place]
    model, (inputs, labels), rank, size = workload.model(), workload.data(), 0, 1
    parameters = list(model.parameters())
    if kind == "ddp":
        distributed.init_process_group("gloo")
        rank, size = distributed.get_rank(), distributed.get_world_size()
        model = DistributedDataParallel(model)
    step = optimizer(parameters)
    generator = torch.Generator().manual_seed(0)
    batches = len(labels) // workload.batch_size
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for batch in order[: batches * workload.batch_size].view(batches, size, -1)[:, rank]:
            step.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            step.step()
            yield


if __name__ == "__main__":
    main(*sys.argv[1:])
