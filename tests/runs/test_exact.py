"""The heart of the matter: any worker count and any course of resizes computes what one serial loop computes."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import parakit as pk
from parakit.data.chunks import chunk_count
from parakit.events.records import Resized
from tests.serial import batches, train_serially

SAMPLES, BATCH, CHUNKS, STEPS, SEED = 103, 24, 10, 12, 5  # uneven chunks; 5 batches an epoch, the last of 7 rows
STRATEGIES = [pk.strategies.AllReduce(), pk.strategies.MapReduce(), pk.strategies.MapReduce(fan_in=3)]
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
LIMIT = 60


def problem(classes: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (SAMPLES,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, classes)).double()
    return model, inputs, targets


def assert_same(run: pk.Run, losses: list[float], model: nn.Module, tolerance: float = 1e-9) -> None:
    assert run.step == len(losses)
    assert np.abs(run.history.losses - losses).max() <= tolerance
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance), name


def expected(model: nn.Module, inputs: Any, targets: torch.Tensor, **how: Any) -> tuple[list[float], nn.Module]:
    return train_serially(model, inputs, targets, batches(SAMPLES, CHUNKS, BATCH, SEED, STEPS), **how)


def trained(model: nn.Module, data: Any, on: pk.Workers, **how: Any) -> pk.Run:
    how = {"batch_size": BATCH, "chunks": CHUNKS, "seed": SEED, "steps": STEPS} | how
    return pk.train(model, data, on=on, **how).wait(LIMIT, progress=False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_inline_equals_the_serial_loop(inline: pk.Workers, strategy: Any, workers: int, optimizer: str) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS[optimizer]}
    run = trained(model, (inputs, targets), inline, workers=workers, strategy=strategy, **how)
    assert_same(run, *expected(model, inputs, targets, **how))


@pytest.mark.dask
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
def test_dask_equals_the_serial_loop(pool: pk.Workers, strategy: Any, workers: int, optimizer: str) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS[optimizer]}
    run = trained(model, (inputs, targets), pool, workers=workers, strategy=strategy, **how)
    assert_same(run, *expected(model, inputs, targets, **how))
    assert {step.world_size for step in run.history.steps} == {workers}


def resized_along(model: nn.Module, data: Any, on: pk.Workers, summary: list[int], **how: Any) -> pk.Run:
    """A run whose size follows a course, each change asked for once a step was done at the size before."""
    run = pk.train(model, data, on=on, workers=summary[0], **{"steps": 100_000} | how)
    for size in summary[1:]:
        run.resize(size)
        wait_for(run, lambda size=size: run.world_size == size)
        wait_for(run, lambda: any(s.generation == latest_generation(run) for s in run.history.steps[-1:]))
    if "steps" not in how and "epochs" not in how:
        run.stop()
    return run.wait(LIMIT, progress=False)


def latest_generation(run: pk.Run) -> int:
    latest = run.history.latest(Resized)
    return latest.generation if latest else -1


def wait_for(run: pk.Run, condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s: {run!r}"
        assert run.status != "failed", run.error
        time.sleep(0.005)


@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
@pytest.mark.parametrize("kind", ["inline", pytest.param("pool", marks=pytest.mark.dask)])
def test_resizes_change_nothing_but_the_speed(request: pytest.FixtureRequest, kind: str, strategy: Any) -> None:
    workers = request.getfixturevalue(kind)
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["sgd"]}
    slow = Slowed(model)  # so that the course fits into the run
    run = resized_along(
        slow, (inputs, targets), workers, [1, 2, 4, 3, 1],
        strategy=strategy, batch_size=BATCH, chunks=CHUNKS, seed=SEED, **how,
    )  # fmt: skip
    order = batches(SAMPLES, CHUNKS, BATCH, SEED, run.step)
    losses, final = train_serially(model, inputs, targets, order, **how)
    assert [len(r.workers) for r in run.history.of(Resized)] == [1, 2, 4, 3, 1]
    assert {s.world_size for s in run.history.steps} == {1, 2, 3, 4}
    assert [s.step for s in run.history.steps] == list(range(run.step))
    assert_same(run, losses, nn.Sequential(final), 1e-9)


class Slowed(nn.Module):
    """A model that takes some milliseconds for a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return self.model(inputs)


@pytest.mark.dask
def test_float32_digits_with_resizes_stay_within_1e5(pool: pk.Workers) -> None:
    digits = pk.datasets.digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}
    run = resized_along(Slowed(model), digits.train, pool, [1, 2, 4, 3, 1], batch_size=8, seed=1, **how)
    chunks = chunk_count(len(digits.train), 8)
    order = batches(len(digits.train), chunks, 8, 1, run.step)
    losses, _ = train_serially(model, digits.train.pixels, digits.train.labels, order, **how)
    assert {s.world_size for s in run.history.steps} == {1, 2, 3, 4}
    assert np.abs(run.history.losses - losses).max() <= 1e-5


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
def test_two_runs_with_one_seed_are_identical(pool: pk.Workers, strategy: Any) -> None:
    model, inputs, targets = problem()
    dropping = nn.Sequential(nn.Dropout(0.3), model)
    first, again = (trained(dropping, (inputs, targets), pool, workers=3, strategy=strategy) for _ in range(2))
    assert first.history.losses.tolist() == again.history.losses.tolist()
    other = trained(dropping, (inputs, targets), pool, workers=3, strategy=strategy, seed=SEED + 1)
    assert first.history.losses.tolist() != other.history.losses.tolist()


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Any] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "weights, ignored, smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=0, label_smoothing=0.1),
    "negative log likelihood": nn.NLLLoss(weight=WEIGHTS),
    "torch function": F.cross_entropy,
    "function, mean": lambda output, target: F.cross_entropy(output, target, label_smoothing=0.2),
    "function, sum": lambda output, target: F.cross_entropy(output, target, reduction="sum") / 50,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_exact_with_uneven_shares(inline: pk.Workers, name: str) -> None:
    model, inputs, targets = problem()
    loss = LOSSES[name]
    how = {"loss": loss, "optimizer": partial(torch.optim.SGD, lr=0.01)}
    run = trained(model, (inputs, targets), inline, workers=3, **how)
    assert_same(run, *expected(model, inputs, targets, **how))


REGRESSIONS = [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.MSELoss(reduction="sum"), F.mse_loss]


@pytest.mark.parametrize("loss", REGRESSIONS, ids=lambda loss: getattr(loss, "__name__", repr(loss)))
def test_regression_losses_are_exact(inline: pk.Workers, loss: Any) -> None:
    model, inputs, _ = problem()
    targets = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = {"loss": loss, "optimizer": partial(torch.optim.SGD, lr=0.001)}
    run = trained(model, (inputs, targets), inline, workers=3, **how)
    assert_same(run, *expected(model, inputs, targets, **how))


def test_probabilities_as_targets_are_exact(inline: pk.Workers) -> None:
    model, inputs, _ = problem()
    targets = torch.rand(SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    how = {"loss": nn.CrossEntropyLoss(weight=WEIGHTS), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    run = trained(model, (inputs, targets), inline, workers=4, **how)
    assert_same(run, *expected(model, inputs, targets, **how))


class TwoInputs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))  # never used, so it must never change

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.model(torch.cat([left, right], dim=1))


@pytest.mark.dask
@pytest.mark.parametrize("form", ["tuple", "dict", "dataset of dicts"])
def test_inputs_may_be_several(pool: pk.Workers, form: str) -> None:
    model, inputs, targets = problem()
    wide = TwoInputs(model)
    tree: Any = {"left": inputs[:, :2], "right": inputs[:, 2:]}
    data: Any = (tree, targets)
    if form == "tuple":
        tree = (tree["left"], tree["right"])
        data = (tree, targets)
    elif form == "dataset of dicts":
        data = [({"left": inputs[i, :2], "right": inputs[i, 2:]}, targets[i]) for i in range(SAMPLES)]
        data = type("Items", (torch.utils.data.Dataset,), {
            "__getitem__": lambda self, i: self.items[i], "__len__": lambda self: len(self.items), "items": data,
        })()  # fmt: skip
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["adamw"]}
    run = trained(wide, data, pool, workers=2, **how)
    assert_same(run, *expected(wide, tree, targets, **how))
    assert torch.equal(run.model.spare, torch.ones(3, dtype=torch.float64))


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
def test_schedule_and_clipping_are_exact(pool: pk.Workers, strategy: Any) -> None:
    model, inputs, targets = problem()
    how = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": OPTIMIZERS["sgd"],
        "scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS),
        "clip_norm": 0.05,
    }
    run = trained(model, (inputs, targets), pool, workers=3, strategy=strategy, scheduler_every="step", **how)
    assert_same(run, *expected(model, inputs, targets, **how))
    rates = [step.learning_rate for step in run.history.steps]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01


def test_the_scheduler_steps_once_an_epoch_by_default(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    run = trained(model, (inputs, targets), inline, workers=2, scheduler=halving, optimizer=OPTIMIZERS["sgd"])
    assert [s.learning_rate for s in run.history.steps] == [0.1 * 0.5 ** (t // 5) for t in range(STEPS)]


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
def test_an_optimizer_that_evaluates_a_step_many_times_is_exact(pool: pk.Workers, strategy: Any) -> None:
    model, inputs, targets = problem()
    how = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
    }
    run = trained(model, (inputs, targets), pool, workers=2, strategy=strategy, steps=6, **how)
    order = batches(SAMPLES, CHUNKS, BATCH, SEED, 6)
    losses, final = train_serially(model, inputs, targets, order, **how)
    assert_same(run, losses, final, 1e-7)  # line searches amplify rounding


@pytest.mark.dask
def test_more_workers_than_rows_in_the_last_batch(pool: pk.Workers) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["sgd"]}
    run = trained(
        model, (inputs[:9], targets[:9]), pool, workers=4, batch_size=4, chunks=4, steps=9, **how
    )  # batches of 4, 4 and 1 rows
    order = batches(9, 4, 4, SEED, 9)
    assert_same(run, *train_serially(model, inputs[:9], targets[:9], order, **how))
    assert min(w.samples for s in run.history.steps for w in s.workers) == 0


@pytest.mark.dask
def test_running_statistics_are_the_mean_over_workers_on_every_kind(pool: pk.Workers, inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    normed = nn.Sequential(nn.BatchNorm1d(6).double(), model)
    runs = [
        trained(normed, (inputs, targets), on, workers=2, strategy=strategy, steps=4)
        for on, strategy in ((inline, None), (pool, None), (pool, STRATEGIES[1]))
    ]
    means = [run.model[0].running_mean for run in runs]
    assert torch.allclose(means[0], means[1], rtol=0, atol=1e-9)
    assert torch.allclose(means[0], means[2], rtol=0, atol=1e-9)
    assert means[0].abs().max() > 0


def test_frozen_parameters_stay(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    model[0].weight.requires_grad_(False)
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["sgd"]}
    run = trained(model, (inputs, targets), inline, workers=2, **how)
    assert_same(run, *expected(model, inputs, targets, **how))
    assert torch.equal(run.model[0].weight, model[0].weight)


def test_half_precision_counts_are_exact(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    small = model.bfloat16()
    run = trained(small, (inputs.bfloat16(), targets), inline, workers=2, batch_size=100, steps=2)
    assert run.model[0].weight.dtype == torch.bfloat16
    rows = batches(SAMPLES, CHUNKS, 100, SEED, 1)[0]
    with torch.no_grad():
        plain = F.cross_entropy(small(inputs.bfloat16()[rows]).float(), targets[rows]).item()
    assert run.history.losses[0] == pytest.approx(plain, rel=0.01)


class Branching(nn.Module):
    """Takes a branch by what a batch holds, as mixtures of experts do; the second one is rarely taken."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(6, 3).double()
        self.rare = nn.Linear(6, 3).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.common(inputs)
        rare = inputs[:, 0] > 2.0
        return output + rare[:, None] * self.rare(inputs) if bool(rare.any()) else output


@pytest.mark.dask
@pytest.mark.parametrize("workers", [2, 3])
def test_a_model_whose_slices_are_large_is_exact(pool: pk.Workers, workers: int) -> None:
    _, inputs, targets = problem()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 12_000), nn.Tanh(), nn.Linear(12_000, 3)).double()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": OPTIMIZERS["adamw"], "clip_norm": 0.5}
    run = trained(model, (inputs, targets), pool, workers=workers, **how)
    assert_same(run, *expected(model, inputs, targets, **how))


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
def test_branches_that_few_samples_take_are_exact(pool: pk.Workers, strategy: Any) -> None:
    torch.manual_seed(4)
    model = Branching()
    _, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)}
    order = batches(SAMPLES, CHUNKS, BATCH, SEED, STEPS)
    taken = [bool((inputs[rows, 0] > 2.0).any()) for rows in order]
    assert any(taken)
    assert not all(taken)  # so that a parameter without a gradient must be left alone, decay included
    run = trained(model, (inputs, targets), pool, workers=3, strategy=strategy, **how)
    assert_same(run, *train_serially(model, inputs, targets, order, **how))


class Caching(nn.Module):
    """Keeps a table that it computes on its first call, and a constant buffer at the edge of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3).double()
        self.table: torch.Tensor | None = None
        self.register_buffer("mask", torch.full((4,), torch.finfo(torch.float32).min))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) < len(inputs):
            self.table = inputs.new_ones(len(inputs), 1)
        return self.layer(inputs * self.table[: len(inputs)])


@pytest.mark.dask
@pytest.mark.parametrize("strategy", STRATEGIES[:2], ids=repr)
@pytest.mark.parametrize("kind", ["inline", "pool"])
def test_validation_and_averaging_do_no_harm_to_what_a_model_keeps(
    request: pytest.FixtureRequest, kind: str, strategy: Any
) -> None:
    _, inputs, targets = problem()
    run = trained(
        Caching(), (inputs, targets), request.getfixturevalue(kind), workers=3, strategy=strategy,
        validation=(inputs, targets),
    )  # fmt: skip
    assert torch.equal(run.model.mask, torch.full((4,), torch.finfo(torch.float32).min))


def test_a_share_of_one_row_is_no_end_for_batch_normalisation(inline: pk.Workers) -> None:
    model, inputs, targets = problem()
    normed = nn.Sequential(nn.BatchNorm1d(6).double(), model)
    run = trained(normed, (inputs[:34], targets[:34]), inline, workers=2, batch_size=32, steps=4)
    assert run.status == "finished"
    assert {worker.samples for step in run.history.steps for worker in step.workers} == {1, 16}
