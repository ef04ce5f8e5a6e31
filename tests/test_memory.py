"""What a run takes in memory, it gives back: in its workers, and in the notebook's process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import parakit as pk

WIDE, PARAMETERS = 1 << 20, 3 << 20
MB = 1 << 20
MODEL_MB = 4 * PARAMETERS // MB
STRATEGIES = {
    "shared memory, divided update": pk.strategies.AllReduce(),
    "shared memory": pk.strategies.AllReduce(shard=False),
    "gloo": pk.strategies.AllReduce(exchange="gloo"),
    "tasks": pk.strategies.MapReduce(),
}


def mean_of_squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target[:, None]).square().mean(1).mean()


def train(on: pk.Workers, strategy: Any) -> None:
    data = torch.ones(8, 2), torch.zeros(8)
    run = pk.train(
        nn.Linear(2, WIDE), data, on=on, workers=2, batch_size=8, steps=3, loss=mean_of_squares, strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    ).wait(60, progress=False)  # fmt: skip
    assert run.status == "finished", run.error


@pytest.fixture(scope="module")
def two() -> Iterator[pk.Workers]:
    with pk.connect(2) as workers:
        yield workers


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_runs_leave_nothing_in_the_memory_of_workers(two: pk.Workers, strategy: Any) -> None:
    def megabytes() -> list[int]:
        return [psutil.Process(pid).memory_info().rss // MB for pid in two.pids.values()]  # type: ignore[attr-defined]

    train(two, strategy)
    before = max(megabytes())
    for _ in range(3):
        train(two, strategy)
    most = before + 2 * MODEL_MB
    deadline = time.monotonic() + 10
    while (after := max(megabytes())) > most and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after <= most, f"{before} MB became {after} MB in 3 runs of a model of {MODEL_MB} MB"


@pytest.mark.parametrize("strategy", [STRATEGIES["gloo"], STRATEGIES["tasks"]], ids=["workers", "driver"])
def test_runs_leave_no_model_in_the_process_of_a_notebook(strategy: Any) -> None:
    def models() -> int:
        gc.collect()
        shape = torch.Size((WIDE, 2))
        return sum(type(found) is nn.Parameter and found.shape == shape for found in gc.get_objects())

    before = models()
    with pk.connect("inline") as inline:
        for _ in range(3):
            train(inline, strategy)
    assert models() <= before
