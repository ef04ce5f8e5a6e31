"""Measuring rivals on the very workers, rows and model of a run, while it stands still."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from parakit.data import Samples
from parakit.errors import ParakitError
from parakit.events import PLAIN, Baseline
from parakit.machine import in_thread
from parakit.scaling import plain
from parakit.scaling.plain import PlainRates, PlainTrial
from parakit.serialization import dumps
from parakit.workers.base import Job, Workers

__all__ = ["measure_plain", "plain_trial", "try_plain"]

_BATCHES = 4  # enough for rows to come from memory, as they do in training, and little to send
_LOOK_SECONDS = 0.1
_PATIENCE = 3  # times the limit of a worker's silence, since nobody knows how long a step takes
_FAREWELL_SECONDS = 0.5  # a trial in this process ends within a step


def measure_plain(pool: Workers, job: Job, now: Callable[[], float], stopping: Callable[[], bool]) -> Baseline | None:
    """Time plain PyTorch with what a run trains, on one worker of its pool.

    Parameters
    ----------
    pool : Workers
    job : Job
    now : callable
        Seconds since the start of the run.
    stopping : callable
        Looked at several times a second; once it is true, nobody waits for the trial any more.

    Returns
    -------
    Baseline or None
        None if it was to stop.

    Raises
    ------
    ParakitError
        If it failed.
    """
    found = try_plain(pool, plain_trial(job, pool), job.limit_seconds, stopping)
    return None if found is None else _baseline(found, now(), pool.device)


def try_plain(
    pool: Workers, trial: PlainTrial, limit_seconds: float, stopping: Callable[[], bool] = lambda: False
) -> PlainRates | None:
    """Make a trial on one worker of a pool; one that is stopped or interrupted is ended, where that can be done.

    Parameters
    ----------
    pool : Workers
    trial : PlainTrial
    limit_seconds : float
        Of a worker's silence.
    stopping : callable
        As for `measure_plain`.

    Returns
    -------
    PlainRates or None
        None if it was to stop.
    """
    patience = _PATIENCE * limit_seconds + plain.MOST_SECONDS + max(0.0, trial.seconds - plain.SECONDS)
    trying = in_thread(pool.map, plain.measure, [trial], patience)
    try:
        while not trying.done():
            if stopping():
                return None
            with suppress(TimeoutError):
                trying.exception(_LOOK_SECONDS)
    finally:
        if not trying.done():
            plain.halt(trial.name)
            with suppress(Exception):
                trying.result(_FAREWELL_SECONDS)
    found: PlainRates = trying.result()[0]
    return found


def plain_trial(job: Job, pool: Workers) -> PlainTrial:
    """What plain PyTorch has to train so that it can be compared with a run: its model, from the start, on its rows."""
    recipe = job.recipe
    held = recipe.frozen.memory
    assert held is not None
    memory = held.key if held.key is not None and pool.maps_memory else held.array()
    rows = _rows(job).packed()
    return PlainTrial(uuid.uuid4().hex, dumps(recipe), memory, rows, recipe.order.batch_size, device=pool.device)


def _rows(job: Job) -> Samples:
    """The first chunks that together hold some batches; all chunks where the data have fewer."""
    order = job.recipe.order
    before = np.cumsum([0, *order.sizes[:-1]])
    chunks = np.flatnonzero(before < _BATCHES * order.batch_size).tolist()
    return Samples.join([job.load(chunk) for chunk in chunks])


def _baseline(found: PlainRates, at_seconds: float, device: str) -> Baseline:
    if not found.rates:
        raise ParakitError(found.error)
    low, median, high = np.percentile(found.rates, (25, 50, 75)).tolist()
    return Baseline(at_seconds, PLAIN, found.cores, median, low, high, len(found.rates), device)
