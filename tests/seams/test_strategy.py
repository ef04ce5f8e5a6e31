"""A strategy is one class with a text: trained, priced and offered with nothing told of it anywhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.costs.model import CostModel
from parakit.events.records import Resized, RunStart
from parakit.strategies.base import Requirements, requirements_of
from parakit.widgets.settings import Draft
from tests.runs.test_exact import BATCH, assert_same, expected, problem, trained

HOW = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
COSTS = CostModel(
    sample_seconds=1e-3, fixed_seconds=2e-3, batch_size=BATCH, nbytes=4e6, update_seconds=1e-3, task_seconds=5e-3,
    network="1GbE",
)  # fmt: skip


class InOrder:
    """Gradients are added in the order of ranks, each by a task of its own: the same bits on any machines."""

    runs_on = "driver"

    def __repr__(self) -> str:
        return "InOrder()"

    def step(self, team: Any, step: int) -> None:
        def summed() -> Any:
            total, *others = team.map_gradients(step)
            for part in others:
                total = team.add([total, part])
            return total

        team.update(summed)


def seconds_of_a_step(n: int) -> float:
    """What the text above takes on N workers with even shares, by hand."""
    message = COSTS.network.link.message_seconds(COSTS.nbytes)
    computing = COSTS.computing_seconds(n, BATCH / n)
    parts = [(rank + 1) * message + COSTS.task_seconds + computing for rank in range(n)]
    total = parts[0]
    for part in parts[1:]:
        total = max(total, part) + COSTS.task_seconds + message
    return float(total + message + COSTS.update_seconds)


def simulated(n: int, strategy: Any, costs: CostModel = COSTS) -> list[float]:
    """Seconds of the steps over whole batches on N workers that do not exist."""
    model, inputs, targets = problem()
    far = pk.simulated(n, like=costs, arithmetic=False)
    run = trained(model, (inputs, targets), far, strategy=strategy, chunks=BATCH)
    return [step.seconds for step in run.history.steps if step.samples == BATCH]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_it_trains_in_this_process_as_the_serial_loop(inline: pk.Workers, workers: int) -> None:
    model, inputs, targets = problem()
    run = trained(model, (inputs, targets), inline, workers=workers, strategy=InOrder(), **HOW)
    assert_same(run, *expected(model, inputs, targets, **HOW))


@pytest.mark.dask
def test_it_trains_on_dask_workers(pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    run = trained(model, (inputs, targets), pool, workers=2, strategy=InOrder(), **HOW)
    assert_same(run, *expected(model, inputs, targets, **HOW))
    started, formed = run.history.latest(RunStart), run.history.latest(Resized)
    assert started is not None
    assert formed is not None
    assert (started.strategy, formed.exchange) == ("InOrder()", "tasks")


@pytest.mark.parametrize("n", [1, 2, 8])
def test_its_price_is_had_by_running_its_text(n: int) -> None:
    taken = simulated(n, InOrder())
    assert taken == pytest.approx([seconds_of_a_step(n)] * len(taken), rel=0.05)  # shares of chunks are hardly even
    assert min(taken) <= seconds_of_a_step(n) * (1 + 1e-9)


def test_a_chain_costs_more_tasks_in_a_row_than_the_tree_that_it_is_compared_with() -> None:
    near = COSTS.with_(network="InfiniBand HDR")  # parts come at once, so that tasks are what takes time
    chain, tree = (min(simulated(12, strategy, near)) for strategy in (InOrder(), pk.strategies.MapReduce()))
    adding = near.task_seconds + near.network.link.message_seconds(near.nbytes)
    assert chain - tree == pytest.approx((11 - 4) * adding, rel=0.1)


def test_a_panel_offers_it_beside_those_of_parakit(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    draft = Draft(model, (inputs, targets), inline, None, {"strategy": InOrder()})
    assert list(draft.settings.strategies) == ["InOrder", *pk.strategies.__all__]


def test_what_it_does_not_ask_for_has_a_default() -> None:
    assert requirements_of(InOrder()) == Requirements()
    asked = requirements_of(pk.strategies.AllReduce(exchange="gloo"))
    assert asked == Requirements(exchange="gloo", shard=True)
    assert not asked.divides
