"""What a notebook has for its process, and what its model keeps, on workers: settings, generators, code, counters."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parakit as pk
from parakit.events.records import WorkersLost
from parakit.system.process_settings import Settings
from tests.plain_cases import Switching

ROWS, BATCH, STEPS, LIMIT = 96, 16, 8, 60
KINDS = ["inline", pytest.param("pool", marks=pytest.mark.dask)]


@pytest.fixture(params=KINDS)
def on(request: pytest.FixtureRequest) -> pk.Workers:
    found: pk.Workers = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Settings of this process are given back after each test."""
    before = Settings.here()
    yield
    before.apply()


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, ROWS * 6, dtype=dtype).view(ROWS, 6).sin(), torch.arange(ROWS) % 3


def train(on: pk.Workers, model: nn.Module, **how: Any) -> pk.Run:
    dtype = next(model.parameters()).dtype
    how = {"loss": nn.CrossEntropyLoss(), "batch_size": BATCH, "steps": STEPS, "seed": 3, "workers": 2} | how
    return pk.train(model, data(dtype), on=on, **how).wait(LIMIT, progress=False)


# --- settings


class Tells(nn.Module):
    """Its loss says which settings hold where it is computed; in evaluation it is as any other."""

    def __init__(self, setting: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.setting = nn.Linear(6, 3), setting

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 0 + 1 + self.setting()


def told(output: Tensor, target: Tensor) -> Tensor:
    del target
    return output.mean()


def default_dtype() -> float:
    return float(torch.get_default_dtype() == torch.float64)


def deterministic() -> float:
    return float(torch.are_deterministic_algorithms_enabled())


def warns_only() -> float:
    return float(torch.is_deterministic_algorithms_warn_only_enabled())


def precision() -> float:
    return {"highest": 0.0, "high": 1.0, "medium": 2.0}[torch.get_float32_matmul_precision()]


def newer_precision() -> float:
    return float(torch.backends.mkldnn.matmul.fp32_precision == "bf16")


def anomalies() -> float:
    return float(torch.is_anomaly_enabled())


def benchmarks() -> float:
    return float(torch.backends.cudnn.benchmark)


def newer() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def benchmark() -> None:
    torch.backends.cudnn.benchmark = True


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], float], float]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), default_dtype, 1.0),
    "deterministic algorithms": (lambda: torch.use_deterministic_algorithms(True), deterministic, 1.0),
    "deterministic, or a warning": (lambda: torch.use_deterministic_algorithms(True, warn_only=True), warns_only, 1.0),
    "precision of products": (lambda: torch.set_float32_matmul_precision("medium"), precision, 2.0),
    "precision, as newer code has it": (newer, newer_precision, 1.0),
    "a look for anomalies": (lambda: torch.autograd.set_detect_anomaly(True), anomalies, 1.0),
    "benchmarks of cuDNN": (benchmark, benchmarks, 1.0),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_notebook_hold_on_workers_and_nowhere_afterwards(on: pk.Workers, name: str) -> None:
    make, setting, value = SETTINGS[name]
    before = Settings.here()
    assert setting() != value
    make()
    run = train(on, Tells(setting).to(torch.float64), loss=told)
    here = pk.evaluate(run.model, data(), on=on, loss=told)
    before.apply()
    assert set(run.history.losses.tolist()) == {1 + value}
    assert here.loss == 1 + value
    assert Settings.here() == before
    # The processes are others' too: the next run finds them as they were.
    again = train(on, Tells(setting).to(torch.float64), loss=told)
    assert set(again.history.losses.tolist()) != {1 + value}


def test_constants_made_in_forward_have_the_notebooks_default_type(on: pk.Workers) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ torch.eye(3) * torch.linspace(0.1, 0.3, 3)

    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Constant()
    assert train(on, model).history.losses[-1] < train(on, model, steps=1).history.losses[0]


# --- generators of torch, numpy and Python


class Noisy(nn.Module):
    """Draws from a generator in forward."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.layer, self.source = nn.Linear(6, 3).double(), source

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.layer(x)
        drawn = {
            "torch": lambda: float(torch.rand(())),
            "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
            "python": random.random,
            "python's gauss": lambda: random.gauss(0, 1),  # which keeps a second number for the next call
        }[self.source]()
        return self.layer(x * (1 + drawn))


def noisy(source: str) -> Noisy:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Noisy(source)


@pytest.mark.parametrize("source", ["torch", "numpy", "python", "python's gauss"])
def test_what_is_drawn_follows_from_the_seed_of_the_run(on: pk.Workers, source: str) -> None:
    losses = []
    for seed, disturbance in ((3, 0), (3, 1), (4, 2)):
        random.seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002
        torch.manual_seed(disturbance)
        random.gauss(0, 1)
        losses.append(train(on, noisy(source), seed=seed).history.losses.tolist())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("source", ["torch", "numpy", "python", "python's gauss"])
def test_the_notebooks_own_generators_stand_where_they_stood(inline: pk.Workers, source: str) -> None:
    np.random.seed(5)  # noqa: NPY002
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    train(inline, noisy(source))
    now = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert now == before


# --- a module beside the notebook

BESIDE = """
from torch import nn

FACTOR = {factor}
calls = 0


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3).double()

    def forward(self, x):
        {counting}
        return self.layer(x) * 0 + FACTOR{more}


def mean(output, target):
    return output.mean() * FACTOR
"""


@contextmanager
def beside(folder: Path) -> Iterator[Callable[..., Any]]:
    """A module in a folder of the path, written anew and reloaded at each call."""
    name = f"beside_{folder.name.replace('-', '_')}"
    sys.path.insert(0, str(folder))

    def write(**parts: Any) -> Any:
        parts = {"factor": 2.0, "counting": "pass", "more": ""} | parts
        (folder / f"{name}.py").write_text(BESIDE.format(**parts))
        importlib.invalidate_caches()
        known = sys.modules.get(name)
        if known is None:
            return importlib.import_module(name)
        Path(known.__cached__).unlink(missing_ok=True)  # two edits within a second
        return importlib.reload(known)

    try:
        yield write
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


def test_workers_run_the_code_of_now(on: pk.Workers, tmp_path: Path) -> None:
    with beside(tmp_path) as write:
        for factor in (2.0, 3.0, -1.0):
            module = write(factor=factor)
            run = train(on, module.Beside(), loss=told)
            assert set(run.history.losses.tolist()) == {factor}
            run = train(on, module.Beside(), loss=module.mean)
            assert set(run.history.losses.tolist()) == {factor**2}


def test_a_function_that_was_changed_in_its_module_is_the_new_one(on: pk.Workers, tmp_path: Path) -> None:
    with beside(tmp_path) as write:
        module = write()
        for change in (5.0, 6.0):
            module.FACTOR = change  # as a cell would do
            run = train(on, module.Beside(), loss=told)
            assert set(run.history.losses.tolist()) == {change}


def test_a_counter_of_a_module_counts_as_in_a_plain_loop(on: pk.Workers, tmp_path: Path) -> None:
    counting = "global calls; calls += self.training"
    with beside(tmp_path) as write:
        module = write(counting=counting, more=" + calls")
        run = train(on, module.Beside(), loss=told)
        assert run.history.losses.tolist() == [3.0 + step for step in range(STEPS)]
        assert run.model.training
        assert module.calls == 0  # the notebook's own stays; a second run begins where the first one did
        assert train(on, module.Beside(), loss=told).history.losses.tolist() == run.history.losses.tolist()


# --- what a model or a loss counts itself, over the life of a run


class Warming(nn.Module):
    """Grows with its calls."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.layer, self.calls, self.pause = nn.Linear(6, 3), 0, pause
        self.past: dict[str, list[int]] = {"calls": []}

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.pause)
        if self.training:
            self.calls += 1
            self.past["calls"] = [*self.past["calls"][-2:], self.calls]
        return self.layer(x) * (1 + min(self.calls, 200) / 200)


LONG = 240


def warming(pause: float = 0.0) -> Warming:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Warming(pause).double()


@pytest.fixture(scope="module")
def alone() -> pk.Run:
    """One worker, to which nothing happens: shown elsewhere to be as a plain loop."""
    with pk.connect("inline") as workers:
        return train(workers, warming(), loss=Switching(60), steps=LONG, workers=1)


def as_alone(run: pk.Run, alone: pk.Run) -> None:
    assert np.abs(run.history.losses - alone.history.losses).max() < 1e-9
    assert (run.model.calls, run.model.past) == (LONG, {"calls": [LONG - 2, LONG - 1, LONG]})
    for ours, theirs in zip(run.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def until(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.002)


@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=["all", "map"])
def test_counters_go_on_over_resizes(on: pk.Workers, strategy: Any, alone: pk.Run) -> None:
    run = pk.train(
        warming(0.01), data(), on=on, loss=Switching(60), batch_size=BATCH, steps=LONG, seed=3, workers=1,
        strategy=strategy,
    )  # fmt: skip
    for step, workers in ((20, 3), (60, 2), (100, 1)):
        until(lambda step=step: run.step >= step)  # type: ignore[misc]
        run.resize(workers)
        until(lambda workers=workers: run.world_size == workers)  # type: ignore[misc]
    run.wait(LIMIT, progress=False)
    assert {step.world_size for step in run.history.steps} >= {1, 2}
    as_alone(run, alone)


def test_counters_go_on_after_a_stop(on: pk.Workers, alone: pk.Run) -> None:
    run = pk.train(warming(0.01), data(), on=on, loss=Switching(60), batch_size=BATCH, steps=LONG, seed=3, workers=2)
    until(lambda: run.step >= 70)
    run.stop()
    run.wait(LIMIT, progress=False)
    assert run.step < LONG
    assert run.model.calls == run.step
    rest = train(on, warming(), loss=Switching(60), steps=LONG, resume=run)
    assert np.abs(rest.history.losses - alone.history.losses[run.step :]).max() < 1e-9
    assert rest.model.calls == LONG


def test_counters_go_on_from_a_checkpoint(inline: pk.Workers, tmp_path: Path, alone: pk.Run) -> None:
    run = pk.train(
        warming(0.002), data(), on=inline, loss=Switching(60), batch_size=BATCH, steps=LONG, seed=3, workers=2,
        checkpoint=tmp_path,
    )  # fmt: skip
    until(lambda: run.step >= 70)
    run.stop()
    run.wait(LIMIT, progress=False)
    rest = train(inline, warming(), loss=Switching(60), steps=LONG, resume=tmp_path)
    assert 70 <= run.step < LONG
    assert np.abs(rest.history.losses - alone.history.losses[run.step :]).max() < 1e-9
    assert rest.model.calls == LONG


@pytest.mark.dask
def test_counters_go_on_when_a_worker_is_lost(alone: pk.Run, nothing_left: None) -> None:
    with pk.connect(2) as workers:
        run = pk.train(
            warming(0.004),
            data(),
            on=workers,
            loss=Switching(60),
            batch_size=BATCH,
            steps=LONG,
            seed=3,
            workers=2,
        )
        until(lambda: run.step >= 40)
        os.kill(list(workers.pids.values())[1], signal.SIGKILL)  # type: ignore[attr-defined]
        run.wait(LIMIT, progress=False)
    assert run.history.of(WorkersLost)
    as_alone(run, alone)
