"""Probes of a host: what they measure is of the right kind, and where nothing can be probed that is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.baselines import plain_loop
from parakit.baselines.plain_loop import PlainRates, PlainTrial
from parakit.errors import InputError, RunError, WorkerCountError
from parakit.scaling.experiments.probes import probe_contention, probe_exchange


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(64, 20), torch.zeros(64, dtype=torch.int64)


@pytest.mark.dask
def test_contention_is_what_computing_at_once_adds(pool: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= probe_contention(nn.Linear(20, 3), data(), on=pool, rows=32, seconds=0.05) < math.inf
    asked: list[list[PlainTrial]] = []

    def answer(function: Any, trials: list[PlainTrial], limit_seconds: float) -> list[PlainRates]:
        assert function is plain_loop.measure
        assert limit_seconds > 0
        asked.append(trials)
        # 10 ms a step alone, 13 ms together; a hiccup is no usual step.
        return [PlainRates(1, (3200.0, 3200.0, 32.0) if len(trials) == 1 else (32 / 0.013,) * 3) for _ in trials]

    monkeypatch.setattr(pool, "map", answer)
    assert probe_contention(nn.Linear(20, 3), data(), on=pool, rows=32) == pytest.approx(0.3)
    assert [len(trials) for trials in asked] == [1, 2]
    assert {(trial.batch_size, trial.cores) for trials in asked for trial in trials} == {(32, 1)}
    assert len({trial.name for trials in asked for trial in trials}) == 3


@pytest.mark.dask
def test_a_probe_whose_loop_fails_says_why(pool: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "map", lambda *_: [PlainRates(1, (), "MemoryError: too many rows")])
    with pytest.raises(RunError, match="MemoryError: too many rows"):
        probe_contention(nn.Linear(20, 3), data(), on=pool, rows=32)


@pytest.mark.dask
@pytest.mark.parametrize(
    ("strategy", "algorithm"), [(None, "shared memory"), (pk.strategies.AllReduce(exchange="gloo"), "ring")]
)
def test_an_exchange_of_some_size_is_measured(pool: pk.Workers, strategy: Any, algorithm: str) -> None:
    found = probe_exchange(100_000, on=pool, seconds=0.3, strategy=strategy)
    assert (found.algorithm, found.nbytes) == (algorithm, 400_000)
    assert found.network.name == "calibrated"
    assert 1e-6 < found.exchange_seconds(2) < 10


@pytest.mark.parametrize("on", ["inline", "simulated"])
def test_where_there_are_no_processes_there_is_nothing_to_probe(on: str) -> None:
    with pk.connect("inline") if on == "inline" else pk.simulated(4) as workers:
        with pytest.raises(InputError, match="no processes of one host"):
            probe_contention(nn.Linear(20, 3), data(), on=workers, rows=32)
        with pytest.raises(InputError, match="no processes of one host"):
            probe_exchange(1000, on=workers)


@pytest.mark.dask
@pytest.mark.parametrize(
    ("how", "message"),
    [({"workers": 1}, "workers is 1"), ({"workers": 65}, "65 workers"), ({"seconds": 0}, "seconds is 0"),
     ({"rows": 0}, "batch_size is 0")],
)  # fmt: skip
def test_what_cannot_be_probed_is_refused(pool: pk.Workers, how: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, WorkerCountError), match=message):
        probe_contention(nn.Linear(20, 3), data(), on=pool, **{"rows": 32} | how)
    if "rows" not in how:
        with pytest.raises((InputError, WorkerCountError), match=message):
            probe_exchange(1000, on=pool, **how)
    with pytest.raises(InputError, match="parameters is 0"):
        probe_exchange(0, on=pool)
