"""A kind of pool is one class for the pool and one for a run's hold on it: here, workers in a thread of their own."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parakit as pk
from parakit.errors import PoolError, RunFailed, WorkerCountError
from parakit.events.records import Resized, RunStart
from parakit.workers.inline import InlineSession
from parakit.workers.pool import Workers
from parakit.workers.session import Job, Report
from tests.runs.test_exact import BATCH, CHUNKS, SAMPLES, SEED, assert_same, expected, problem, resized_along, trained
from tests.serial import batches, train_serially

HOW = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
NAMES = ("north", "east", "south", "west")


class ThreadWorkers(Workers):
    """Workers that take turns in one thread, which is none of the notebook's."""

    kind = "in a thread"
    threads = 1
    cores = 1
    in_turns = True
    maps_memory = True
    names = NAMES

    def open(self, job: Job) -> ThreadSession:
        return ThreadSession(job)


class ThreadSession:
    """A run's hold on that thread: all that is computed is computed there, one order after the other."""

    orders_ahead = False
    snapshots = None

    def __init__(self, job: Job) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="workers")
        self._inside = self._thread.submit(InlineSession, job, 1).result()
        self._report: Future[Report] | None = None

    def __getattr__(self, verb: str) -> Any:
        method = getattr(self._inside, verb)
        return lambda *args: self._thread.submit(method, *args).result()

    def order(self, *segment: Any) -> None:
        """Begin a segment at once."""
        self._inside.order(*segment)
        self._report = self._thread.submit(self._inside.report)

    def report(self) -> Report:
        assert self._report is not None
        return self._report.result()

    def halt(self, request: int) -> None:
        self._inside.halt(request)

    def label(self, worker: str) -> str:
        return f"the {worker}"

    def release(self) -> None:
        self._thread.submit(self._inside.release).result()
        self._thread.shutdown()


@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=repr)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_it_trains_as_the_serial_loop(strategy: Any, workers: int) -> None:
    model, inputs, targets = problem()
    with ThreadWorkers() as on:
        run = trained(model, (inputs, targets), on, workers=workers, strategy=strategy, **HOW)
        assert_same(run, *expected(model, inputs, targets, **HOW))
        found, formed = run.history.latest(RunStart), run.history.latest(Resized)
        assert found is not None
        assert formed is not None
        assert (found.pool, formed.workers[0], formed.exchange) == ("in a thread", "the north", "in turns")


def test_resizes_change_nothing() -> None:
    model, inputs, targets = problem()
    with ThreadWorkers() as on:
        run = resized_along(
            model, (inputs, targets), on, [4, 1, 3, 2], batch_size=BATCH, chunks=CHUNKS, seed=SEED, **HOW
        )
        losses, final = train_serially(model, inputs, targets, batches(SAMPLES, CHUNKS, BATCH, SEED, run.step), **HOW)
        assert_same(run, losses, final)


def test_what_fails_in_its_thread_fails_here_and_the_pool_goes_on() -> None:
    model, inputs, targets = problem()

    def wrong(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name.startswith("workers"):
            raise ValueError("as it should")
        return nn.functional.cross_entropy(output, target)

    with ThreadWorkers() as on:
        with pytest.raises(RunFailed, match="as it should"):
            trained(model, (inputs, targets), on, **HOW | {"loss": wrong})
        again = trained(model, (inputs, targets), on, workers=3, validation=(inputs, targets), **HOW)
        assert np.isfinite(again.history.losses).all()
        assert pk.evaluate(again.model, (inputs, targets), on=on).accuracy is not None


def test_what_a_pool_does_not_say_has_a_default() -> None:
    on = ThreadWorkers()
    assert (on.size, on.most, on.device, on.one_host) == (4, 4, "cpu", False)
    with pytest.raises(WorkerCountError, match=r"this pool \(in a thread\) has 4"):
        on.grow(5)
    assert on.map(len, ["one", "to"], 1.0) == [3, 2]
    on.close()
    with pytest.raises(PoolError, match="closed"):
        on.map(len, ["one"], 1.0)
