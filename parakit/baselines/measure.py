"""Measuring rivals on the very workers, rows and model of a run, while it stands still."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from parakit.baselines import plain_loop
from parakit.baselines.plain_loop import PlainRates, PlainTrial
from parakit.data.samples import Samples
from parakit.errors import ParakitError, PoolError, Unreachable, WorkerCountError
from parakit.events.records import PLAIN, Baseline, baseline_name
from parakit.serialization import dumps
from parakit.system.threads import in_thread
from parakit.workers.pool import Workers
from parakit.workers.session import Job

__all__ = [
    "PlainArm",
    "measure_plain",
    "plain_trial",
    "try_plain",
]

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
    patience = _PATIENCE * limit_seconds + plain_loop.MOST_SECONDS + max(0.0, trial.seconds - plain_loop.SECONDS)
    trying = in_thread(pool.map, plain_loop.measure, [trial], patience)
    try:
        while not trying.done():
            if stopping():
                return None
            with suppress(TimeoutError):
                trying.exception(_LOOK_SECONDS)
    finally:
        if not trying.done():
            plain_loop.halt(trial.name)
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
    rows = _rows(job).pack()
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


class PlainArm:
    """Plain PyTorch in one process, timed on one worker of the pool while all of them stand still.

    Parameters
    ----------
    job : Job
        What is trained.
    pool : Workers
    seconds : float
        To time each.
    most_seconds : float, optional
        That each may take, unless a single step takes longer.
    """

    def __init__(self, job: Job, pool: Workers, seconds: float, most_seconds: float | None = None) -> None:
        self._trial = replace(plain_trial(job, pool), seconds=seconds, most_seconds=most_seconds)
        self._pool = pool
        self._limit_seconds = job.limit_seconds

    def visit(self, threads: int) -> PlainRates:
        """Time it with so many threads.

        Raises
        ------
        Unreachable
            If it fails.
        """
        trial = replace(self._trial, name=uuid.uuid4().hex, cores=threads)
        found = self._found(trial)
        if not found.rates:
            raise Unreachable(f"{baseline_name(threads)}, could not be measured: {found.error}")
        return found

    def _found(self, trial: PlainTrial) -> PlainRates:
        try:
            found = try_plain(self._pool, trial, self._limit_seconds)
        except (PoolError, WorkerCountError):
            raise
        except ParakitError as error:
            raise Unreachable(f"{PLAIN} could not be measured: {str(error).splitlines()[0]}") from error
        assert found is not None  # nobody stops it
        return found
