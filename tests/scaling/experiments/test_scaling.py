"""Plain PyTorch as a rival: measured beside a run, which does not notice."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.baselines import plain_loop
from parakit.baselines.plain_loop import PlainTrial, measure
from parakit.data.chunks import EpochOrder
from parakit.data.samples import Samples
from parakit.engines.recipe import Parts, Recipe, Traits
from parakit.events.records import Baseline, Requested, Resized, Said
from parakit.serialization import dumps
from parakit.system.cores import usable_cores
from tests.runs.test_exact import LIMIT, wait_for

KINDS = ["inline", pytest.param("pool", marks=pytest.mark.dask)]
ROWS, BATCH = 1000, 250


class Net(nn.Module):
    """Draws dropout masks, so that its losses show whether anybody drew random numbers in between."""

    def __init__(self, width: int = 64, pause_seconds: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))
        self.pause_seconds = pause_seconds

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause_seconds)
        return self.layers(inputs)


def data(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(rows, 20, generator=torch.Generator().manual_seed(3))
    return inputs, inputs[:, :3].argmax(1)


def seeded(width: int = 64, pause_seconds: float = 0.0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(width, pause_seconds)


def trial(model: nn.Module, *, optimizer: Any = torch.optim.SGD, loss: Any = None, **how: Any) -> PlainTrial:
    inputs, targets = data()
    closure = isinstance(optimizer, partial) and optimizer.func is torch.optim.LBFGS
    recipe = Recipe.of(
        Parts(model, loss or nn.CrossEntropyLoss(), optimizer), Traits(closure=closure),
        scheduler_every="epoch", clip_norm=1.0, seed=0, order=EpochOrder((ROWS,), BATCH, 0),
    )  # fmt: skip
    assert recipe.frozen.memory is not None
    memory, rows = recipe.frozen.memory.array(), Samples(inputs, targets).pack()
    return PlainTrial("trial", dumps(recipe), memory, rows, **{"batch_size": BATCH, "seconds": 0.2} | how)


def rates_by_hand(model: nn.Module, threads: int) -> list[float]:
    """Samples per second in each step of the loop that a user would write."""
    inputs, targets = data()
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss, optimizer, rates = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01), []
        for number in range(20):
            rows = torch.randperm(ROWS)[:BATCH]
            began = time.perf_counter()
            optimizer.zero_grad()
            loss(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            if number >= 2:
                rates.append(BATCH / (time.perf_counter() - began))
    finally:
        torch.set_num_threads(used)
    return rates


def test_the_plain_loop_is_timed_and_leaves_no_trace() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    used = torch.get_num_threads()
    found = measure(trial(seeded(), cores=used + 1))
    assert torch.get_num_threads() == used
    assert torch.equal(torch.rand(3), expected)
    assert found.error == ""
    assert found.cores == used + 1
    assert len(found.rates) >= 5
    assert min(found.rates) > 0


def test_threads_and_random_state_come_back_after_a_failure() -> None:
    failing = trial(RefusesMany(), cores=torch.get_num_threads() + 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    used = torch.get_num_threads()
    found = measure(failing)
    assert (found.cores, found.rates) == (used + 1, ())
    assert found.error == "MemoryError: 250 rows are too many"
    assert torch.get_num_threads() == used
    assert torch.equal(torch.rand(3), expected)


def test_all_cores_are_used_by_default() -> None:
    assert measure(trial(seeded(), seconds=0.01)).cores == usable_cores()


@pytest.mark.parametrize("optimizer", [partial(torch.optim.LBFGS, lr=0.1, max_iter=3), torch.optim.AdamW])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_any_optimizer_and_loss_can_be_timed(optimizer: Any, loss: Any) -> None:
    assert len(measure(trial(seeded(), optimizer=optimizer, loss=loss, seconds=0.01)).rates) >= 5


class Watched(nn.CrossEntropyLoss):
    """Writes down what it comes to."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = str(folder / "losses")

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert len(target) == BATCH  # the batches are full ones
        value = super().forward(output, target)
        with Path(self.file).open("a") as file:
            file.write(f"{float(value.detach())}\n")
        return value


def test_the_plain_loop_trains(tmp_path: Path) -> None:
    made = trial(seeded(), optimizer=partial(torch.optim.Adam, lr=0.02), loss=Watched(tmp_path))
    assert measure(made).error == ""
    seen = [float(line) for line in (tmp_path / "losses").read_text().splitlines()]
    assert statistics.mean(seen[-4:]) < 0.8 * seen[0]


def test_slow_steps_are_timed_at_least_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_loop, "MOST_SECONDS", 0.9)
    slow = seeded(pause_seconds=0.4)
    began = time.perf_counter()
    assert len(measure(trial(slow)).rates) in (1, 2)  # warm-up has one step, as it takes longer than 0.3 s
    assert time.perf_counter() - began < 3
    monkeypatch.setattr(plain_loop, "MOST_SECONDS", 0.1)
    assert len(measure(trial(slow)).rates) == 1


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    assert len(measure(trial(seeded(), batch_size=5 * ROWS, seconds=0.01)).rates) >= 5


def trained(on: pk.Workers, model: nn.Module, **how: Any) -> pk.Run:
    return pk.train(model, data(), on=on, **{"workers": 2, "batch_size": BATCH, "steps": 100_000, "seed": 4} | how)


@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_with_a_baseline_in_its_middle(
    request: pytest.FixtureRequest, kind: str, strategy: Any
) -> None:
    on = request.getfixturevalue(kind)
    usual = trained(on, seeded(), steps=30, strategy=strategy).wait(LIMIT, progress=False)
    threads = on.map(lambda _: torch.get_num_threads(), list(range(8)), LIMIT)
    run = trained(on, seeded(pause_seconds=0.01), steps=30, strategy=strategy)
    assert run.pool is on
    wait_for(run, lambda: run.step > 0)
    run.measure_baseline()  # while it runs
    wait_for(run, lambda: len(run.history.of(Baseline)) == 1)
    assert run.step < 30
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    run.measure_baseline()  # while it stands still
    wait_for(run, lambda: len(run.history.of(Baseline)) == 2)
    assert run.status == "paused"
    run.resume()
    run.wait(LIMIT, progress=False)
    assert run.history.losses.tolist() == usual.history.losses.tolist()
    assert on.map(lambda _: torch.get_num_threads(), list(range(8)), LIMIT) == threads
    assert [event.request for event in run.history.of(Requested)] == ["measure", "pause", "measure", "resume"]
    for found in run.history.of(Baseline):
        assert (found.name, found.cores) == ("plain PyTorch", usable_cores())
        assert found.steps >= 5
        assert 0 < found.low <= found.samples_per_second <= found.high < BATCH / 0.01
    # The seconds of the measurements are in no segment.
    began, ended = (run.history.of(kind)[0].at_seconds for kind in (Requested, Baseline))
    assert max(step.seconds for step in run.history.steps) < ended - began


def test_the_rate_is_that_of_a_loop_by_hand() -> None:
    # With one thread and by the fastest steps, so that other work on this machine does not matter much.
    found = measure(trial(seeded(2000), cores=1, seconds=0.5))
    assert max(rates_by_hand(seeded(2000), 1)) == pytest.approx(max(found.rates), rel=0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_beside_a_run_is_plausible(request: pytest.FixtureRequest, kind: str) -> None:
    run = trained(request.getfixturevalue(kind), seeded(2000))
    run.pause()
    run.measure_baseline()
    wait_for(run, lambda: bool(run.history.of(Baseline)))
    run.stop()
    run.wait(LIMIT, progress=False)
    by_hand = statistics.median(rates_by_hand(seeded(2000), 1))
    # Threads wait for each other busily, so that other work on this machine can slow several of them down tenfold.
    assert by_hand / 30 < run.history.of(Baseline)[0].samples_per_second < 10 * usable_cores() * by_hand


class RefusesMany(Net):
    """Computes the shares of two workers, but no whole batch."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 200:
            raise MemoryError(f"{len(inputs)} rows are too many")
        return super().forward(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_that_fails_is_told_and_the_run_goes_on(request: pytest.FixtureRequest, kind: str) -> None:
    run = trained(request.getfixturevalue(kind), RefusesMany(pause_seconds=0.005))
    run.measure_baseline()
    wait_for(run, lambda: bool(run.history.of(Said)))
    said = run.history.of(Said)[0].text
    assert said == "Plain PyTorch could not be measured: MemoryError: 250 rows are too many"
    held = run.step
    wait_for(run, lambda: run.step > held)
    assert run.history.of(Baseline) == ()
    run.stop()
    assert run.wait(LIMIT, progress=False).status == "finished"


def measuring_for_long(on: pk.Workers) -> pk.Run:
    """A paused run whose baseline takes seconds, in the middle of it."""
    run = trained(on, seeded(pause_seconds=0.5))
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    run.measure_baseline()
    time.sleep(0.4)
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_does_not_wait_for_a_baseline(request: pytest.FixtureRequest, kind: str) -> None:
    run = measuring_for_long(request.getfixturevalue(kind))
    began = time.monotonic()
    run.stop()
    assert run.wait(LIMIT, progress=False).status == "finished"
    assert time.monotonic() - began < 2.5
    assert run.history.of(Baseline) == ()
    assert run.history.of(Said) == ()


@pytest.mark.parametrize("target", ["inline", pytest.param(1, marks=pytest.mark.dask)])
def test_a_pool_may_close_while_a_baseline_is_measured(nothing_left: None, target: Any) -> None:
    workers = pk.connect(target)
    try:
        run = trained(workers, seeded(pause_seconds=0.5), workers=1)
        run.pause()
        wait_for(run, lambda: run.status == "paused")
        run.measure_baseline()
        time.sleep(0.4)
    finally:
        began = time.monotonic()
        workers.close()
    assert time.monotonic() - began < 15
    assert run.wait(LIMIT, progress=False).status == "finished"
    assert run.model_step == run.step


@pytest.mark.dask
def test_a_resize_tells_its_whole_wait_also_what_a_baseline_took_of_it(pool: pk.Workers) -> None:
    run = trained(pool, seeded(pause_seconds=0.25), workers=1)
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    run.measure_baseline()  # takes 6 steps of 0.25 s at least
    assert run.measuring
    time.sleep(0.2)
    run.resize(2)
    asked_at = run.history.of(Requested)[-1].at_seconds
    wait_for(run, lambda: run.world_size == 2)
    assert not run.measuring
    resized = run.history.latest(Resized)
    assert resized is not None
    run.stop()
    run.wait(LIMIT, progress=False)
    assert run.history.of(Baseline)[0].at_seconds - asked_at > 1
    assert resized.waited_seconds == pytest.approx(resized.at_seconds - asked_at, abs=0.05)


def test_a_baseline_that_fails_or_is_never_done_is_not_being_measured_for_ever(
    inline: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(inline, seeded(pause_seconds=0.01), steps=100_000)
    monkeypatch.setattr("parakit.baselines.plain_loop.measure", lambda trial: 1 / 0)
    run.measure_baseline()
    wait_for(run, lambda: run.history.of(Said))
    assert not run.measuring
    run.pause()
    run.measure_baseline()
    run.stop()
    run.wait(LIMIT, progress=False)
    assert not run.measuring
