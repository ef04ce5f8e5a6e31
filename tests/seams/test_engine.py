"""A new engine takes this file alone: one in which each worker keeps the optimizer's state for its own slice only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parakit as pk
from parakit.checkpoints.state import State
from parakit.engines.base import Group
from parakit.engines.replicated import Replica
from parakit.events.records import Recovered
from parakit.gradients.gradient_sum import GradientSum, flatten, unflatten_into
from parakit.workers import remote
from tests.runs.test_exact import wait_for

LIMIT = 60.0
STEPS = 40


class CutUpdate:
    """Updates this worker's slice of the flat parameters, and gathers the slices that the others updated."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], group: Group) -> None:
        self._parameters, self._group, self._whole = parameters, group, optimizer
        flat = flatten(parameters, parameters[0].dtype)
        self.where = slice(*(len(flat) * edge // group.size for edge in (group.rank, group.rank + 1)))
        self._slice = nn.Parameter(flat[self.where].clone())
        settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        self.optimizer = type(optimizer)([{**settings, "params": [self._slice]}])  # type: ignore[call-arg]
        pieces = list(zip(*(optimizer.state[p].items() for p in parameters), strict=True)) if optimizer.state else []
        for named in pieces:
            values = [value for _, value in named]
            cut = values[0].dim() == 0
            self.optimizer.state[self._slice][named[0][0]] = (
                values[0] if cut else flatten(values, flat.dtype)[self.where]
            )
        optimizer.state.clear()

    def load(self, total: GradientSum) -> None:
        self._mean = total.total / total.divisor

    def squared_norm(self) -> float:
        return float(self._mean.square().sum())

    def call_hooks(self) -> None:
        pass

    def clip(self, most: float) -> None:
        self._mean *= min(1.0, most / (self.squared_norm() ** 0.5 + 1e-6))

    def step(self, evaluate: Callable[[], float]) -> None:
        evaluate()
        self.optimizer.param_groups[0]["lr"] = self._whole.param_groups[0]["lr"]
        self._slice.grad = self._mean[self.where]
        self.optimizer.step()
        flat = torch.zeros_like(self._mean)
        flat[self.where] = self._slice.detach()
        if self._group.size > 1:
            self._group.sum(flat)
        unflatten_into(flat, self._parameters)


class CutReplica(Replica):
    """The whole model on every worker, but of the optimizer's state a slice."""

    whole = False
    _cut: CutUpdate | None = None

    def join(self, group: Group) -> None:
        super().join(group)
        self._cut = self.updater = CutUpdate(self.optimizer, self.buffer.parameters, group)

    def live_state(self) -> State:
        state = super().live_state()
        return state if self._cut is None else state | {"cut": self._cut.optimizer.state_dict()["state"]}

    def restore(self, state: State) -> None:
        super().restore(state)
        cut, self._cut = self._cut, None
        if "cut" in state and cut is not None:  # its own part: it is asked for by `merge`, before the next group
            cut.optimizer.load_state_dict({**cut.optimizer.state_dict(), "state": state["cut"]})
            self._cut = cut

    @classmethod
    def merge(cls, states: Sequence[State]) -> State:
        first = {**states[0]}
        cuts = [first.pop("cut"), *(state["cut"] for state in states[1:])]
        lengths = [value.numel() for value in first["parameters"].values()]
        shapes = [value.shape for value in first["parameters"].values()]
        whole: dict[int, dict[str, Any]] = {place: {} for place in range(len(lengths))} if cuts[0] else {}
        for name, value in cuts[0].get(0, {}).items():
            flat = torch.cat([cut[0][name] for cut in cuts]) if value.dim() else value
            pieces = flat.split(lengths) if value.dim() else [flat] * len(lengths)
            for place, piece in enumerate(pieces):
                whole[place][name] = piece.reshape(shapes[place] if value.dim() else ())
        return first | {"optimizer": {**first["optimizer"], "state": whole}}


class Cut:
    """All-reduce, for workers with that engine."""

    engine = CutReplica
    runs_on = "workers"

    def __init__(self, pause_seconds: float = 0.0) -> None:
        self._pause_seconds = pause_seconds

    def step(self, team: Any, step: int) -> None:
        time.sleep(self._pause_seconds)  # leaves time for changes in mid-run
        team.update(lambda: team.sum_for_update(team.gradient(step)))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()


def begun(on: pk.Workers, strategy: Any, **how: Any) -> pk.Run:
    digits = pk.datasets.digits().train
    data = digits.pixels.double(), digits.labels
    return pk.train(
        net(), data, on=on, strategy=strategy, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), clip_norm=0.5,
        **{"steps": STEPS, "workers": 2} | how,
    )  # fmt: skip


def parameters(run: pk.Run) -> Tensor:
    done = run.wait(LIMIT, progress=False)
    assert done.status == "finished", done.error
    return flatten(done.model.parameters(), torch.float64)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with pk.connect("inline") as inline:
        return parameters(begun(inline, pk.strategies.AllReduce()))


def test_in_one_process_it_trains_as_the_replicated_engine_does(expected: Tensor) -> None:
    with pk.connect("inline") as inline:
        torch.testing.assert_close(parameters(begun(inline, Cut())), expected, rtol=0, atol=1e-9)


@pytest.mark.dask
def test_on_a_pool_it_trains_as_the_replicated_engine_does(pool: pk.Workers, expected: Tensor) -> None:
    torch.testing.assert_close(parameters(begun(pool, Cut())), expected, rtol=0, atol=1e-9)


def elements_kept() -> list[int]:
    """Of what the optimizers of this process keep for each element."""
    return [
        sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
        for member in remote._members.values()
        for optimizer in (member.engine._cut.optimizer,)  # type: ignore[attr-defined]
    ]


@pytest.mark.dask
def test_each_worker_holds_a_slice_and_a_resized_run_puts_them_together(pool: pk.Workers) -> None:
    with pk.connect("inline") as inline:
        run = begun(inline, pk.strategies.AllReduce(), steps=400)
        expected = parameters(run)
    run = begun(pool, Cut(0.01), steps=400)
    wait_for(run, lambda: run.step > 5)
    run.resize(3)
    wait_for(run, lambda: run.world_size == 3)
    run.resize(1)
    wait_for(run, lambda: run.world_size == 1)
    run.resize(2)
    wait_for(run, lambda: run.world_size == 2)
    kept = [each for worker in pool.client.run(elements_kept).values() for each in worker]  # type: ignore[attr-defined]
    torch.testing.assert_close(parameters(run), expected, rtol=0, atol=1e-9)
    assert sum(kept) == 2 * len(expected)  # Adam's two, once in all
    assert max(kept) <= len(expected) + 2


@pytest.mark.dask
def test_where_a_slice_is_lost_the_run_goes_back_to_the_notebook_s_copy(nothing_left: None) -> None:
    with pk.connect("inline") as inline:
        expected = parameters(begun(inline, pk.strategies.AllReduce(), steps=400))
    with pk.connect(2) as two:
        run = begun(two, Cut(0.01), steps=400, limit_seconds=5)
        wait_for(run, lambda: run.step > 100)
        os.kill(next(iter(two.pids.values())), signal.SIGKILL)  # type: ignore[attr-defined]
        torch.testing.assert_close(parameters(run), expected, rtol=0, atol=1e-9)
        assert len(run.history.of(Recovered)) == 1
