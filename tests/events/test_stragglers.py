"""Slow workers are named, once, and never for a hiccup."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from torch import Tensor, nn

import parakit as pk
from parakit.events.records import SlowWorker, StepDone, WorkerStep
from parakit.events.stragglers import Stragglers
from tests.runs.test_exact import wait_for


def steps(paces: Sequence[Sequence[float]], *, generation: int = 0, first: int = 0) -> Iterator[StepDone]:
    """One step a row of milliseconds, a tenth of a second apart; each worker has a sample for each millisecond."""
    for number, row in enumerate(paces, first):
        parts = tuple(
            WorkerStep(f"worker {rank}", 0.0, pace / 1000, 0.0, 0.0, 0.0, 0.0, 10) for rank, pace in enumerate(row)
        )
        yield StepDone(number / 10, number, 0, 1.0, 10 * len(row), 0.1, 0.1, len(row), generation, parts)


def told(stragglers: Stragglers, all_steps: Iterator[StepDone]) -> list[SlowWorker]:
    return [event for step in all_steps for event in stragglers.look([step])]


def test_a_slow_worker_is_named_once_with_how_slow_it_is() -> None:
    (event,) = told(Stragglers(), steps([[10, 10, 24]] * 80))
    assert (event.worker, event.recovered) == ("worker 2", False)
    assert event.times == pytest.approx(2.4)


def test_of_two_the_slower_one_is_named() -> None:
    (event,) = told(Stragglers(), steps([[10, 17]] * 80))
    assert event.worker == "worker 1"
    assert event.times == pytest.approx(1.7)


def test_one_that_catches_up_is_told_too() -> None:
    found = told(Stragglers(), steps([[10, 30, 10]] * 40 + [[10, 10, 10]] * 60))
    assert [(event.worker, event.recovered) for event in found] == [("worker 1", False), ("worker 1", True)]


@pytest.mark.parametrize(
    "paces",
    [
        [[10, 10, 10]] * 80,
        [[10, 12, 14]] * 80,
        [[10, 10, 500 if n % 10 == 0 else 10] for n in range(80)],
        [[10]] * 80,
        [[10, 10, 40]] * 7,
    ],
    ids=["all equal", "a little slower", "hiccups", "alone", "too short to tell"],
)
def test_nobody_is_named_without_need(paces: Sequence[Sequence[float]]) -> None:
    assert told(Stragglers(), steps(paces)) == []


def test_a_new_group_begins_anew() -> None:
    stragglers = Stragglers()
    assert told(stragglers, steps([[10, 40]] * 15)) == []
    assert told(stragglers, steps([[10, 10]] * 30, generation=1, first=15)) == []


class SlowHere(nn.Module):
    """Takes longer in the process that found the file."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)
        self.mark = str(mark)

    def forward(self, inputs: Tensor) -> Tensor:
        mine = Path(f"{self.mark} of {os.getpid()}")
        with suppress(FileNotFoundError):  # of two that look at the same time, one finds it
            Path(self.mark).rename(mine)
        time.sleep(0.03 if mine.exists() else 0.01)
        return self.inner(inputs)


@pytest.mark.dask
def test_a_slow_process_is_named_and_goes_on(pool: pk.Workers, tmp_path: Path) -> None:
    mark = tmp_path / "slow"
    run = pk.train(SlowHere(mark), pk.datasets.digits().train, on=pool, workers=2, batch_size=256, steps=100_000)
    wait_for(run, lambda: run.step > 5)
    mark.touch()
    wait_for(run, lambda: run.history.of(SlowWorker), 30)
    event = run.history.of(SlowWorker)[0]
    assert event.worker in ("worker 0", "worker 1")
    assert event.times > 1.5
    seen = run.step
    wait_for(run, lambda: run.step > seen + 5)
    assert run.world_size == 2
    run.stop()
    run.wait(30, progress=False)
