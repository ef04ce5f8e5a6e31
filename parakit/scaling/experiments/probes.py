"""Probes of a host: short trials that tell what no run with one worker can, before many workers are trained on.

Owns two of them: how much workers that compute at the same time slow each other down, and how fast they exchange a
gradient. With these, the cost model of a run with one worker can price several on the same host. Refuses to predict.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from parakit.baselines import plain_loop
from parakit.baselines.measure import plain_trial
from parakit.costs.calibration import usual_seconds
from parakit.costs.model import CostModel
from parakit.errors import InputError, RunError
from parakit.runs.arguments import check_on_cores, check_pool
from parakit.runs.options import StepOptions
from parakit.runs.planning import plan
from parakit.runs.train import train
from parakit.scaling.experiments.visits import ENDLESS
from parakit.validation import check_positive, check_whole
from parakit.workers.pool import Workers

__all__ = ["probe_contention", "probe_exchange"]

_PATIENCE_SECONDS = 60.0
_ROWS = 64  # of the data that an exchange is probed with
_FEWEST_STEPS = 30
_LOOK_SECONDS = 0.02


def probe_contention(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    rows: int,
    workers: int = 2,
    seconds: float = 1.0,
    **options: Unpack[StepOptions],
) -> float:
    """What every other busy worker adds to the time of a worker's own work, as a share of it.

    The plain loop (rows, forward, backward, update) is timed on one worker alone, then on several at once, each with
    its own number of threads and without any exchange. They share the memory and the caches of a host, and often its
    power budget, so each is slower than alone.

    Parameters
    ----------
    model, data
        As for `parakit.train`.
    on : Workers
        Of one host, and at least as many as are to compute.
    rows : int
        Of each worker's share of a step: the global batch over the number of workers.
    workers : int
        How many compute at once.
    seconds : float
        To time each trial.
    **options
        As for `parakit.train`: loss, optimizer, clip_norm, strategy, limit_seconds.

    Returns
    -------
    float
        At least 0; a cost model takes it as `contention`.

    Raises
    ------
    InputError
        If the workers are no processes of one host, or a number cannot be.
    RunError
        If the loop fails there.
    """
    _check_host(on, workers)
    check_positive("seconds", seconds)
    job = plan(model, data, on=on, workers=1, steps=1, batch_size=rows, **options).job
    trial = replace(plain_trial(job, on), seconds=float(seconds), cores=on.threads)
    alone, together = (_seconds_of_a_step(on, trial, count) for count in (1, workers))
    return max(0.0, together / alone - 1) / ((workers - 1) * on.threads)


def _seconds_of_a_step(pool: Workers, trial: plain_loop.PlainTrial, count: int) -> float:
    """Of the plain loop, when so many workers run it at once."""
    trials = [replace(trial, name=uuid.uuid4().hex) for _ in range(count)]
    found = pool.map(plain_loop.measure, trials, _PATIENCE_SECONDS + plain_loop.MOST_SECONDS + trial.seconds)
    failed = next((each.error for each in found if not each.rates), None)
    if failed is not None:
        raise RunError(f"The plain loop cannot be timed on a worker: {failed}")
    spent = np.concatenate([trial.batch_size / np.array(each.rates) for each in found])
    return usual_seconds(spent)


def probe_exchange(
    parameters: int, *, on: Workers, workers: int = 2, seconds: float = 1.0, strategy: Any = None
) -> CostModel:
    """Train what computes next to nothing, so that a step is the exchange of a gradient of some size.

    Parameters
    ----------
    parameters : int
        Of the gradient.
    on : Workers
    workers : int
        Among which it is exchanged.
    seconds : float
        About how long.
    strategy : Strategy, optional
        As for `parakit.train`.

    Returns
    -------
    CostModel
        Of this training; its `network` and `algorithm` are those of any that exchanges as many bytes in this way.

    Raises
    ------
    InputError
        If the workers are no processes of one host, or a number cannot be.
    """
    _check_host(on, workers)
    check_positive("seconds", seconds)
    check_whole("parameters", parameters, 1)
    data = torch.zeros(_ROWS * workers, 1), torch.zeros(_ROWS * workers)
    run = train(
        _Weights(parameters), data, on=on, workers=workers, steps=ENDLESS, batch_size=len(data[0]), chunks=workers,
        loss=nn.MSELoss(), optimizer=_never_moving, strategy=strategy,
    )  # fmt: skip
    began = time.monotonic()
    try:
        while run.status == "running" and (spent := time.monotonic() - began) < _PATIENCE_SECONDS + seconds:
            if spent > seconds and run.step >= _FEWEST_STEPS:
                break
            time.sleep(_LOOK_SECONDS)
    finally:
        run.stop()
    return CostModel.from_history(run.wait(_PATIENCE_SECONDS, progress=False).history)


def _never_moving(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


class _Weights(nn.Module):
    """Many parameters, of which a step uses one: its gradient is as long as they are many."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(parameters))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, 0] * self.weights[0]


def _check_host(on: Any, workers: int) -> None:
    pool = check_pool(on)
    check_on_cores(pool, "A probe")
    check_whole("workers", workers, 2)
    if pool.simulated or pool.in_turns or not pool.one_host:
        raise InputError(
            f"The workers of this pool ({pool.kind}) are no processes of one host, of which a probe could tell.",
            remedy="connect to local workers: parakit.connect(2)",
        )
    pool.check_count(workers)
