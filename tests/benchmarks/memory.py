"""Memory of a large model: parakit on two workers, plain PyTorch, and DDP with two processes.

What is told is the most that was seen at any moment, in sizes of the parameters, over what the same processes held
before: rivals before there was a model, parakit's notebook with the model that it gives. Memory that processes share is
counted once (PSS, proportional set size, of Linux). Parakit's figures are those of the notebook's process and of all
workers together, with commits; the update is divided between workers in shared memory, and whole over connections
(gloo). The 102 million parameters need up to 12 GB.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import distributed, nn
from torch.multiprocessing import get_context
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import parakit as pk
from tests.benchmarks.reports import Pace, Report, run, significant

WIDTHS = {"26 M": 1600, "102 M": 3200}
LAYERS, CLASSES, ROWS, BATCH, STEPS = 10, 10, 256, 64, 6
OPTIMIZERS = {"SGD": partial(torch.optim.SGD, lr=1e-3), "Adam": partial(torch.optim.Adam, lr=1e-3)}
LOOK_SECONDS, LIMIT_SECONDS = 0.05, 600.0


def model_of(width: int) -> nn.Module:
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def size_of(width: int) -> int:
    """Bytes of the parameters."""
    return 4 * (LAYERS * (width * width + width) + CLASSES * (width + 1))


class Watch:
    """The most that some groups of processes hold over what they held at first.

    Parameters
    ----------
    groups : sequence of list of int
        Processes, by their ids; the last entry of `most` is of all together.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = [[psutil.Process(pid) for pid in group] for group in groups]
        self._base = self._now()
        self.most = [0.0] * (len(groups) + 1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _now(self) -> list[float]:
        return [float(sum(process.memory_full_info().pss for process in group)) for group in self._groups]

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with contextlib.suppress(psutil.Error):
                grown = [now - then for now, then in zip(self._now(), self._base, strict=True)]
                self.most = [max(pair) for pair in zip(self.most, [*grown, sum(grown)], strict=True)]

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def parakits(width: int, optimizer: str, strategy: Any) -> tuple[float, float, float]:
    """Of the notebook's process, of the workers, and of all together."""
    with pk.connect(2) as workers:
        data = torch.randn(ROWS, width), torch.randint(CLASSES, (ROWS,))
        pk.train(  # what libraries keep once they are used is no part of it
            nn.Linear(width, CLASSES), data, on=workers, workers=2, steps=2, optimizer=OPTIMIZERS[optimizer],
            strategy=strategy,
        ).wait(60, progress=False)  # fmt: skip
        model = model_of(width)
        gc.collect()
        with Watch([[os.getpid()], list(workers.pids.values())]) as watch:  # type: ignore[attr-defined]
            trained = pk.train(
                model, data, on=workers, workers=2, loss=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS[optimizer],
                steps=STEPS, batch_size=BATCH, strategy=strategy,
            ).wait(LIMIT_SECONDS, progress=False)  # fmt: skip
            del model, trained
        gc.collect()
    notebook, all_workers, together = watch.most
    return notebook, all_workers, together


def rivals(processes: int, width: int, optimizer: str) -> float:
    """Of all processes of DDP; or of plain PyTorch, which is one."""
    context = get_context("spawn")
    ready, done = context.Semaphore(0), context.Semaphore(0)
    begin, end = context.Event(), context.Event()
    store = "127.0.0.1", _free_port()
    members = [
        context.Process(target=_train, args=(rank, processes, store, width, optimizer, ready, begin, done, end))
        for rank in range(processes)
    ]
    for member in members:
        member.start()
    try:
        _all(ready, processes)
        with Watch([[member.pid for member in members]]) as watch:  # type: ignore[misc]
            begin.set()
            _all(done, processes)
    finally:
        end.set()
        for member in members:
            member.join(20)
            member.kill()
    return watch.most[0]


def _all(counter: Any, count: int) -> None:
    for _ in range(count):
        assert counter.acquire(timeout=LIMIT_SECONDS), "a rival does not answer"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _train(
    rank: int,
    size: int,
    store: tuple[str, int],
    width: int,
    optimizer: str,
    ready: Any,
    begin: Any,
    done: Any,
    end: Any,
) -> None:
    """Train as a user would by hand."""
    torch.set_num_threads(1)
    if size > 1:
        host, port = store
        distributed.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=size)
    inputs, labels = torch.randn(BATCH // size, width), torch.randint(CLASSES, (BATCH // size,))
    small = nn.Linear(width, CLASSES)
    _step(small, OPTIMIZERS[optimizer](small.parameters()), inputs, labels)
    ready.release()
    begin.wait(LIMIT_SECONDS)
    model = model_of(width)
    parallel = DistributedDataParallel(model) if size > 1 else model
    made = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(STEPS):
        _step(parallel, made, inputs, labels)
    time.sleep(2 * LOOK_SECONDS)
    done.release()
    end.wait(LIMIT_SECONDS)
    os._exit(0)  # without a farewell to a group whose other member may have gone


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def measure(pace: Pace) -> Iterator[Report]:
    heads = ["parameters", "optimizer", "way", "notebook", "workers", "together", "workers over DDP's"]
    rows, figures = [], {}
    for name in pace.choose(tuple(WIDTHS), ("26 M",)):
        for optimizer in OPTIMIZERS:
            print(f"{name}, {optimizer} ...", flush=True)
            width, size = WIDTHS[name], size_of(WIDTHS[name])
            plain, ddp = (rivals(processes, width, optimizer) / size for processes in (1, 2))
            rows.append([name, optimizer, "plain PyTorch", "", "", significant(plain), ""])
            rows.append([name, optimizer, "DDP, 2 processes", "", "", significant(ddp), ""])
            ways: dict[str, Callable[[], Any]] = {
                "parakit, shared memory": pk.strategies.AllReduce, "parakit, gloo": _over_connections,
            }  # fmt: skip
            for way, strategy in ways.items():
                found = [value / size for value in parakits(width, optimizer, strategy())]
                rows.append([name, optimizer, way, *map(significant, found), significant(found[1] / ddp)])
                figures[f"{name}, {optimizer}, {way}"] = [*found, ddp]
    remarks = ["In sizes of the parameters; the most at any moment, each column for itself."]
    yield Report("memory", "Memory of a large model", heads, rows, remarks, figures)


def _over_connections() -> Any:
    return pk.strategies.AllReduce(exchange="gloo")


if __name__ == "__main__":
    run(__doc__, measure)
