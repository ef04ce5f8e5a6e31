"""Simulated workers: real losses on a virtual clock, and times alone for any number of workers."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parakit as pk
from parakit.costs.model import CostModel
from parakit.errors import InputError, WorkerCountError
from parakit.events.records import EpochEnded, GradientNorms, Resized, RunStart, SegmentDone
from parakit.strategies import AllReduce, MapReduce
from parakit.workers.virtual.pool import ORDINARY, SimulatedWorkers, VirtualClock, simulated
from tests.runs.test_exact import wait_for

LIMIT = 60
ROWS, BATCH = 1000, 96
COSTS = CostModel(
    sample_seconds=1e-3, fixed_seconds=2e-3, batch_size=BATCH, nbytes=4e6, update_seconds=1e-3, control_seconds=5e-3,
    spread=0.05, network="1GbE",
)  # fmt: skip


def data(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(rows, 20, generator=torch.Generator().manual_seed(3))
    return inputs, inputs[:, :3].argmax(1)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def trained(on: pk.Workers, **how: Any) -> pk.Run:
    return pk.train(model(), data(), on=on, **{"steps": 25, "batch_size": BATCH} | how).wait(LIMIT, progress=False)


def times(run: pk.Run) -> list[float]:
    return [step.at_seconds for step in run.history.steps]


@pytest.mark.parametrize("strategy", [AllReduce(), MapReduce(), MapReduce(fan_in=3)], ids=repr)
def test_losses_are_exactly_those_of_inline_workers(inline: pk.Workers, strategy: Any) -> None:
    far = trained(simulated(7, like=COSTS), strategy=strategy)
    near = trained(inline, workers=7, strategy=strategy)
    assert far.history.losses.tolist() == near.history.losses.tolist()
    # Once a segment, and segments differ.
    norms, known = ({event.step: event for event in run.history.of(GradientNorms)} for run in (far, near))
    both = norms.keys() & known.keys()
    assert 0 in both
    assert [norms[step].norms_squared for step in both] == [known[step].norms_squared for step in both]
    for ours, theirs in zip(far.model.parameters(), near.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strategy", [AllReduce(), MapReduce()], ids=repr)
def test_times_do_not_depend_on_whether_there_is_arithmetic(strategy: Any) -> None:
    real = trained(simulated(5, like=COSTS, stragglers=0.1), strategy=strategy)
    timed = trained(simulated(5, like=COSTS, stragglers=0.1, arithmetic=False), strategy=strategy)
    assert [step.seconds for step in real.history.steps] == [step.seconds for step in timed.history.steps]
    assert [step.workers for step in real.history.steps] == [step.workers for step in timed.history.steps]
    assert np.isnan(timed.history.losses).all()
    assert timed.status == "finished"
    assert "loss nan" in repr(timed)


def test_a_seed_fixes_every_time() -> None:
    once, again, other = (
        trained(simulated(16, like=COSTS, stragglers=0.1, arithmetic=False, seed=seed)) for seed in (1, 1, 2)
    )
    assert [step.seconds for step in once.history.steps] == [step.seconds for step in again.history.steps]
    assert all(a.seconds != b.seconds for a, b in zip(once.history.steps, other.history.steps, strict=True))


def test_the_run_lives_by_the_virtual_clock() -> None:
    slow = COSTS.with_(sample_seconds=10.0)
    began = time.monotonic()
    run = trained(simulated(4, like=slow), validation=data(64))
    assert time.monotonic() - began < 20
    history = run.history
    assert run.elapsed_seconds > 25 * 10 * BATCH / 4 * 0.9
    assert times(run) == sorted(times(run))
    assert history.latest(Resized).seconds == pytest.approx(0.1)  # type: ignore[union-attr]
    assert sum(segment.steps for segment in history.of(SegmentDone)) == 25
    for segment in history.of(SegmentDone):
        assert segment.control_seconds == pytest.approx(slow.control_seconds, rel=1e-6)
    ended = history.of(EpochEnded)
    assert [event.validation_accuracy is not None for event in ended] == [True, True]
    forward = slow.computing_seconds(4, 16) * (1 - slow.phases[2])
    assert [event.seconds for event in ended] == pytest.approx([forward, forward])


@pytest.mark.parametrize("n", [1, 4, 32])
def test_steps_take_what_the_cost_model_says_on_average(n: int) -> None:
    costs = COSTS.with_(stragglers=0.02)
    run = trained(simulated(n, like=costs, arithmetic=False), steps=1000, batch_size=BATCH, chunks=BATCH)
    full = [step.seconds for step in run.history.steps if step.samples == BATCH]
    parts = costs.breakdown(n)
    error = np.std(full) / np.sqrt(len(full))
    assert np.mean(full) == pytest.approx(parts.step_seconds - parts.control_seconds, abs=5 * error, rel=0.01)


def test_the_accounts_of_workers_make_up_each_step() -> None:
    run = trained(simulated(6, like=COSTS))
    for step in run.history.steps:
        assert step.world_size == len(step.workers) == 6
        assert sum(part.samples for part in step.workers) == step.samples
        assert min(part.idle_seconds for part in step.workers) == 0
        for part in step.workers:
            assert sum(part.seconds()) == pytest.approx(step.seconds)
            assert part.exchange_seconds == pytest.approx(COSTS.exchange_seconds(6))


def test_of_many_workers_some_have_accounts() -> None:
    run = trained(simulated(200, like=COSTS, arithmetic=False), batch_size=1000)
    for step in run.history.steps:
        assert (step.world_size, len(step.workers)) == (200, 16)
        assert step.workers[-1].worker == "simulated 199"
        for part in step.workers:
            assert sum(part.seconds()) == pytest.approx(step.seconds)
            assert part.exchange_seconds == pytest.approx(COSTS.exchange_seconds(200))
            assert part.idle_seconds >= 0


def test_a_cost_model_is_found_again_in_the_history_of_its_own_simulation() -> None:
    runs = [
        trained(simulated(16, like=COSTS, arithmetic=False), workers=count, steps=150) for count in (2, 4, 8, 16)
    ]  # fmt: skip
    found = CostModel.from_history([run.history for run in runs])
    assert found.sample_seconds == pytest.approx(COSTS.sample_seconds, rel=0.05)
    assert found.fixed_seconds == pytest.approx(COSTS.fixed_seconds, rel=0.15)
    assert found.spread == pytest.approx(COSTS.spread, rel=0.1)
    assert found.stragglers == 0
    # The linear layers are smaller than what was priced, so the bytes differ, but not what they took.
    counts = [2, 4, 8, 16]
    assert found.exchange_seconds(counts) == pytest.approx(COSTS.exchange_seconds(counts), rel=1e-6)
    assert simulated(4, like=runs[0]).costs.update_seconds == pytest.approx(COSTS.update_seconds)
    assert simulated(4, like=runs[0].history).costs == simulated(4, like=runs[0]).costs


def test_resize_pause_resume_and_stop() -> None:
    far = simulated(64, like=COSTS)
    run = pk.train(model(), data(), on=far, workers=2, steps=100_000, batch_size=BATCH)
    wait_for(run, lambda: run.step > 0)
    run.resize(48)
    wait_for(run, lambda: run.world_size == 48)
    run.pause()
    wait_for(run, lambda: run.status == "paused")
    held, at = run.step, run.elapsed_seconds
    time.sleep(0.3)
    assert (run.step, run.elapsed_seconds) == (held, at)
    run.resize(1)
    run.resume()
    wait_for(run, lambda: run.world_size == 1)
    with pytest.raises(WorkerCountError, match="simulated, virtual clock"):
        run.resize(65)
    run.stop()
    run.wait(LIMIT, progress=False)
    resized = run.history.of(Resized)
    assert [len(event.workers) for event in resized] == [2, 48, 1]
    assert all(event.waited_seconds >= 0 for event in resized)
    assert sum(segment.steps for segment in run.history.of(SegmentDone)) == run.step


def test_a_thousand_workers_do_a_thousand_steps_in_two_seconds() -> None:
    inputs, targets = data(20_000)
    far = simulated(1024, arithmetic=False, stragglers=0.01)
    began = time.perf_counter()
    run = pk.train(nn.Linear(20, 3), (inputs, targets), on=far, steps=1000, batch_size=2048)
    run.wait(LIMIT, progress=False)
    took = time.perf_counter() - began
    assert run.history.of(RunStart)[0].chunks == 1024
    assert (run.step, run.world_size) == (1000, 1024)
    assert took < 2


def test_more_stragglers_or_a_slower_network_take_longer() -> None:
    def seconds(**how: Any) -> float:
        return trained(simulated(16, like=COSTS, arithmetic=False, **how)).history.steps[-1].at_seconds

    assert seconds(stragglers=0.2) > 1.1 * seconds()
    assert seconds(network="Wi-Fi 6") > seconds() > seconds(network="100GbE")


def test_evaluation_is_real(inline: pk.Workers) -> None:
    far = simulated(8, like=COSTS)
    run = trained(far)
    result, known = pk.evaluate(run.model, data(), on=far), pk.evaluate(run.model, data(), on=inline)
    assert result.accuracy == known.accuracy
    assert result.loss == pytest.approx(known.loss)
    timed = trained(simulated(8, like=COSTS, arithmetic=False), validation=data(64))
    ended = timed.history.of(EpochEnded)[0]
    assert ended.validation_loss is not None
    assert math.isnan(ended.validation_loss)
    assert ended.validation_accuracy is None


def test_lbfgs_pays_for_every_evaluation() -> None:
    def optimizer(p: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(p, lr=0.1, max_iter=4)

    often, once = (trained(simulated(3, like=COSTS), steps=3, **how) for how in ({"optimizer": optimizer}, {}))
    assert often.history.steps[1].seconds > 3 * once.history.steps[1].seconds


def test_everything_says_simulated() -> None:
    far = simulated(12, like=COSTS, arithmetic=False)
    assert repr(far) == (
        "<Workers: simulated, virtual clock, timing only, 12 workers of 1 thread each, 12 cores>"
    )  # fmt: skip
    run = trained(far)
    assert run.history.of(RunStart)[0].pool == "simulated, virtual clock, timing only"
    assert set(run.history.of(RunStart)[0].workers) == {f"simulated {number}" for number in range(12)}
    far.close()
    assert "simulated" in repr(far)


def test_a_machine_that_was_measured_becomes_one_of_many() -> None:
    measured = COSTS.with_(cores=2, network="loopback")
    far = simulated(64, like=SimpleNamespace(costs=measured), network="25GbE")
    assert (far.costs.workers_per_node, far.costs.cores, far.cores) == (2, 2, 64)
    assert (far.costs.within, far.costs.network) == (measured.network, CostModel.with_(COSTS, network="25GbE").network)
    assert simulated(64, like=measured).costs.network.name == "10GbE"
    assert simulated(64, like=measured, cores_per_node=16).costs.workers_per_node == 16
    assert simulated(64, machine="DGX A100").costs.network.name == "InfiniBand HDR"
    assert simulated(64).costs == ORDINARY
    assert simulated(3, like=COSTS.with_(strategy="local SGD", local_steps=9)).costs.strategy == "all-reduce"


@pytest.mark.parametrize(
    ("n", "how", "error", "message"),
    [
        (0, {}, WorkerCountError, "is 0; it must be"),
        (-3, {}, WorkerCountError, "is -3"),
        (1.5, {}, WorkerCountError, "1.5"),
        (True, {}, WorkerCountError, "True"),
        ("many", {}, WorkerCountError, "'many'"),
        (2, {"network": "string and cans"}, InputError, "There is no network 'string and cans'"),
        (2, {"machine": "abacus"}, InputError, "There is no machine 'abacus'"),
        (2, {"stragglers": 1.0}, InputError, "from 0 to below 1"),
        (2, {"stragglers": -0.1}, InputError, "from 0 to below 1"),
        (2, {"stragglers": "some"}, InputError, "from 0 to below 1"),
        (2, {"like": 3}, InputError, "like is int"),
        (2, {"like": SimpleNamespace(costs=1)}, InputError, "does not say what a step costs"),
        (2, {"like": pk.History()}, InputError, "no start of a run"),
        (2, {"seed": -1}, InputError, "seed is -1"),
        (2, {"cores_per_node": 0}, InputError, "cores of a cost model is 0"),
    ],
)
def test_what_cannot_be_is_refused(n: Any, how: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulated(n, **how)


def test_the_pool_refuses_what_it_cannot_be() -> None:
    far = simulated(4)
    assert isinstance(far, SimulatedWorkers)
    with pytest.raises(WorkerCountError, match="has 4"):
        trained(far, workers=5)
    with pytest.raises(WorkerCountError, match="has 4"):
        far.grow(5)
    clock = VirtualClock()
    clock.advance(2.5)
    assert clock() == 2.5
