"""Learning rates: set in mid-run and to begin with, exactly as a serial loop that does the same."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import parakit as pk
from parakit.checkpoints.state import copy_state
from parakit.engines.optimizers import AtRate, learning_rate, set_learning_rate
from parakit.errors import InputError, ModelError, RunEnded
from parakit.events.records import Requested
from tests.runs.test_exact import BATCH, CHUNKS, LIMIT, SAMPLES, SEED, Slowed, assert_same, problem, trained, wait_for
from tests.serial import batches, train_serially

STRATEGIES = [pk.strategies.AllReduce(), pk.strategies.MapReduce()]
EXPONENTIAL = partial(schedules.ExponentialLR, gamma=0.97)


def two_groups(parameters: list[nn.Parameter], kind: Any = torch.optim.SGD, lr: Any = 0.1) -> torch.optim.Optimizer:
    """The biases learn at twice the rate of the weights."""
    weights, biases = ([p for p in parameters if p.ndim == n] for n in (2, 1))
    return kind([{"params": weights}, {"params": biases, "lr": 2 * lr}], lr=lr)


def changed_in_mid_run(on: pk.Workers, value: float, **how: Any) -> tuple[pk.Run, int]:
    """A run of two workers whose rate is changed as it stands still, and which gets a third worker after that."""
    model, inputs, targets = problem()
    run = pk.train(
        Slowed(model), (inputs, targets), on=on, workers=2, steps=100_000, batch_size=BATCH, chunks=CHUNKS, seed=SEED,
        loss=nn.CrossEntropyLoss(), optimizer=two_groups, scheduler_every="step", **how,
    )  # fmt: skip
    wait_for(run, lambda: run.step > 2)
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    changed_at = run.step
    run.set_learning_rate(value)
    assert run.target == run.world_size == 2
    run.resize(3)
    assert run.target == 3
    wait_for(run, lambda: run.world_size == 3)
    run.resume()
    wait_for(run, lambda: run.step > changed_at + 4)
    run.stop()
    return run.wait(LIMIT, progress=False), changed_at


@pytest.mark.parametrize("scheduler", [None, EXPONENTIAL], ids=["no schedule", "schedule"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("kind", ["inline", pytest.param("pool", marks=pytest.mark.dask)])
def test_a_change_in_mid_run_equals_the_serial_loop(
    request: pytest.FixtureRequest, kind: str, strategy: Any, scheduler: Any
) -> None:
    run, at = changed_in_mid_run(request.getfixturevalue(kind), 0.03, strategy=strategy, scheduler=scheduler)
    decay = 0.97 if scheduler else 1.0
    rates = [0.1 * decay**t if t < at else 0.03 * decay ** (t - at) for t in range(run.step)]
    model, inputs, targets = problem()
    order = batches(SAMPLES, CHUNKS, BATCH, SEED, run.step)
    losses, final = train_serially(
        model, inputs, targets, order, loss=nn.CrossEntropyLoss(), optimizer=two_groups, rates=rates
    )
    assert_same(run, losses, nn.Sequential(final), 1e-9)
    assert [step.learning_rate for step in run.history.steps] == pytest.approx(rates, rel=1e-12)
    assert run.history.steps[at].learning_rate == 0.03  # to the last bit
    assert run.history.steps[-1].world_size == 3
    asked = [event for event in run.history.of(Requested) if event.request == "learning rate"]
    assert [event.value for event in asked] == [0.03]


def test_a_run_may_begin_at_another_rate(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": two_groups}
    run = trained(
        model, (inputs, targets), inline, workers=2, learning_rate=0.02, scheduler=EXPONENTIAL,
        scheduler_every="step", **how,
    )  # fmt: skip
    rates = [0.02 * 0.97**t for t in range(run.step)]
    order = batches(SAMPLES, CHUNKS, BATCH, SEED, run.step)
    assert_same(run, *train_serially(model, inputs, targets, order, rates=rates, **how))


@pytest.mark.dask
def test_a_rate_to_begin_with_travels(pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    run = trained(model, (inputs, targets), pool, workers=2, learning_rate=1, steps=2)
    assert [step.learning_rate for step in run.history.steps] == [1.0, 1.0]


WRONG: list[Any] = [0, -0.1, math.nan, math.inf, True, "0.1", None, 10**400]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:6])
def test_what_is_no_rate_is_refused_at_the_call(inline: pk.Workers, value: Any) -> None:
    model, inputs, targets = problem()
    run = pk.train(Slowed(model), (inputs, targets), on=inline, steps=100_000, batch_size=BATCH)
    with pytest.raises(InputError, match=r"learning rate .*number above 0"):
        run.set_learning_rate(value)
    run.stop()
    assert run.wait(LIMIT, progress=False).history.of(Requested)[0].request == "stop"
    if value is not None:
        with pytest.raises(InputError, match=r"learning_rate .*number above 0"):
            pk.train(model, (inputs, targets), on=inline, learning_rate=value)


def test_a_run_that_has_ended_takes_no_rate(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    run = trained(model, (inputs, targets), inline, steps=1)
    with pytest.raises(RunEnded, match="set_learning_rate has no effect"):
        run.set_learning_rate(0.1)
    with pytest.raises(RunEnded, match="measure_baseline has no effect"):
        run.measure_baseline()


class Rateless(torch.optim.Optimizer):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_an_optimizer_without_a_rate_is_told_apart(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    with pytest.raises(ModelError, match=r"learning_rate cannot be 0\.1: the optimizer has none"):
        pk.train(model, (inputs, targets), on=inline, optimizer=Rateless, learning_rate=0.1)
    run = pk.train(Slowed(model), (inputs, targets), on=inline, optimizer=Rateless, steps=100_000, batch_size=BATCH)
    with pytest.raises(ModelError, match="the optimizer has none"):
        run.set_learning_rate(0.1)
    run.stop()
    run.wait(LIMIT, progress=False)


def test_a_schedule_with_rates_of_its_own_is_not_overruled_in_silence(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    own = partial(schedules.OneCycleLR, max_lr=0.5, total_steps=10)
    with pytest.raises(ModelError, match=r"learning_rate is 0\.1, but the scheduler begins at 0\.02"):
        pk.train(
            model, (inputs, targets), on=inline, learning_rate=0.1, scheduler=own, scheduler_every="step", steps=10
        )


def in_sequence(optimizer: torch.optim.Optimizer) -> schedules.LRScheduler:
    warming = schedules.LinearLR(optimizer, 0.1, total_iters=6)
    return schedules.SequentialLR(optimizer, [warming, schedules.CosineAnnealingLR(optimizer, 9, 0.01)], [6])


def chained(optimizer: torch.optim.Optimizer) -> schedules.LRScheduler:
    return schedules.ChainedScheduler([schedules.ConstantLR(optimizer, 0.1, 8), EXPONENTIAL(optimizer)])


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], schedules.LRScheduler]] = {
    "lambda": partial(schedules.LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch)),
    "steps": partial(schedules.MultiStepLR, milestones=[2, 7], gamma=0.5),
    "cosine": partial(schedules.CosineAnnealingLR, T_max=9, eta_min=0.01),
    "restarts": partial(schedules.CosineAnnealingWarmRestarts, T_0=4, eta_min=0.01),
    "polynomial": partial(schedules.PolynomialLR, total_iters=15, power=2.0),
    "cyclic": partial(schedules.CyclicLR, base_lr=0.05, max_lr=0.2, step_size_up=3),
    "one cycle": partial(schedules.OneCycleLR, max_lr=0.5, total_steps=16),
    "sequence": in_sequence,
    "chain": chained,
}


def summary(make: Any, factor: float, at: int, *, tensors: bool = False) -> list[list[float]]:
    """The rates of both groups in each step of a schedule, scaled from one step on; the state travels once after it."""

    def fresh() -> tuple[torch.optim.Optimizer, schedules.LRScheduler]:
        model = nn.Linear(2, 2)
        lr = torch.tensor(0.1, dtype=torch.float64) if tensors else 0.1
        optimizer = two_groups(list(model.parameters()), partial(torch.optim.SGD, momentum=0.9), lr)
        return optimizer, make(optimizer)

    optimizer, scheduler = fresh()
    found = []
    for step in range(14):
        if step == at:
            set_learning_rate(optimizer, factor * learning_rate(optimizer), scheduler)
        if step == at + 2:
            states = [copy_state(thing.state_dict()) for thing in (optimizer, scheduler)]
            optimizer, scheduler = fresh()
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        assert [float(rate) for rate in scheduler.get_last_lr()] == found[-1]
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_every_schedule_goes_on_along_its_own_curve(name: str, tensors: bool) -> None:
    usual = np.array(summary(SCHEDULES[name], 1.0, 5, tensors=tensors))
    scaled = np.array(summary(SCHEDULES[name], 3.0, 5, tensors=tensors))
    assert np.allclose(scaled[:5], usual[:5], rtol=1e-12, atol=0)
    assert np.allclose(scaled[5:], 3 * usual[5:], rtol=1e-9, atol=0)
    assert np.ptp(usual[:, 0]) > 0


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_rate_of_nothing_becomes_the_value_in_all_groups(lr: Any) -> None:
    optimizer = two_groups(list(nn.Linear(2, 2).parameters()), lr=lr)
    set_learning_rate(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]
    assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
    set_learning_rate(optimizer, 0.25)  # from now on it can be scaled
    assert learning_rate(optimizer) == 0.25


def test_a_schedule_that_stands_at_nothing_keeps_its_own_rates() -> None:
    optimizer = two_groups(list(nn.Linear(2, 2).parameters()))
    warming = schedules.LambdaLR(optimizer, lambda epoch: epoch / 10)
    set_learning_rate(optimizer, 0.5, warming)
    assert learning_rate(optimizer) == 0.5
    optimizer.step()
    warming.step()
    assert learning_rate(optimizer) == pytest.approx(0.1 / 10)

    ended = two_groups(list(nn.Linear(2, 2).parameters()))
    cosine = schedules.CosineAnnealingLR(ended, 3)
    for _ in range(3):
        ended.step()
        cosine.step()
    assert 0 <= learning_rate(ended) < 1e-12  # what rounding leaves must not be scaled up
    set_learning_rate(ended, 0.5, cosine)
    assert [group["lr"] for group in ended.param_groups] == [0.5, 0.5]
    assert cosine.base_lrs == [0.1, 0.2]


def test_a_factory_with_a_rate_can_be_pickled_and_scales_the_groups() -> None:
    factory = pickle.loads(pickle.dumps(AtRate(two_groups, 0.3)))
    made = factory(list(nn.Linear(2, 2).parameters()))
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.3, 0.6])
    assert learning_rate(made) == 0.3
