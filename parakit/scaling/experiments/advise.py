"""`advise`: try plain PyTorch and layouts of processes and threads for a few seconds, and say which is fastest.

Blocks visit everything once, each in an order of its own, until the time is over. Owns what is tried, in which order
and for how long; refuses to sum up. All train the same few batches, so that no data need travel for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from parakit.baselines.measure import PlainArm
from parakit.data.samples import Samples
from parakit.errors import InputError
from parakit.formatting import many
from parakit.runs.arguments import check_on_cores, check_pool
from parakit.runs.options import StepOptions, check_names
from parakit.runs.plan import Plan
from parakit.runs.planning import plan
from parakit.scaling.experiments.arms import FreshRun
from parakit.scaling.experiments.experiment import Clock, Experiment, check_free
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.visits import ENDLESS
from parakit.scaling.study.advice import Advice, Layout
from parakit.system.this_host import cores_here, host_here, name_here
from parakit.validation import check_flag, check_positive, check_whole, plain
from parakit.workers.pool import Workers

__all__ = ["advise", "layouts"]

_BATCHES = 8  # that everything trains, again and again
_MOST_LAYOUTS = 5
_MOST_BLOCKS = 9
_BLOCKS = 2  # to aim at
_AROUND_SECONDS = 0.7  # of a visit go into its start and its warm-up
_SHORTEST_SECONDS, _LONGEST_SECONDS = 0.1, 1.0  # that a visit is timed
_PATIENCE, _LEAST_SECONDS = 3, 5.0  # times the time that was given, and what is given up to a first block at least
_ASK_SECONDS = 10.0


def advise(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    seconds: float = 12.0,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Unpack[StepOptions],
) -> Advice:
    """Try for a few seconds which layout of processes and threads trains this model fastest on this machine.

    Plain PyTorch with one thread and with all cores, and parakit with processes and threads that together fill the
    cores (on 16 cores 16 x 1, 8 x 2, 4 x 4, 2 x 8 and 1 x 16), take turns until the time is over. All train the same
    few batches of the data, drawn at random. A pool with fewer processes than cores is not grown: what it cannot try,
    the advice says.

    Plain PyTorch is timed in one of the workers, while all others stand still.

    Parameters
    ----------
    model, data
        As for `parakit.train`. The model is copied, never changed; what is trained here is thrown away.
    on : Workers
        From `parakit.connect`. On workers of other machines, only their own layout is tried, against plain PyTorch on
        one of them.
    seconds : float
        To spend. Everything is tried once all the same, unless that takes three times as long, and more than 5 s.
    batch_size : int, optional
        Rows in a global batch, as for `parakit.train`: what is fastest depends on it.
    seed : int
        Of the order in which things are tried.
    progress : bool
        Whether to show a line that says what is being tried.
    **options
        As for `parakit.train`: loss, optimizer, clip_norm, strategy, limit_seconds.

    Returns
    -------
    Advice
        Its `options` go to `parakit.train(..., **advice.options)`. After an interrupt, or if training fails, with
        what was measured by then; it says that it is incomplete.

    Raises
    ------
    DataError, ModelError, LossError, InputError
        If an argument cannot be right, or the workers are simulated; nothing was started then.
    PoolError
        If another run is going on on these workers, or they were closed.
    RunError
        If nothing could be measured.

    Examples
    --------
    >>> import torch, parakit as pk
    >>> digits = pk.datasets.digits()
    >>> with pk.connect("inline") as workers:
    ...     advice = pk.advise(torch.nn.Linear(64, 10), digits.train, on=workers, seconds=0.1, progress=False)
    >>> advice.options["workers"]
    1
    """
    check_names(options, StepOptions, "advise")
    pool = check_pool(on)
    seconds, seed = map(plain, (seconds, seed))
    check_positive("seconds", seconds)
    check_whole("seed", seed, 0)
    check_flag("progress", progress)
    _check_real(pool)
    check_on_cores(pool, "parakit.advise")

    def make(rows: Any, workers: int = 1, threads: int = 1) -> Plan:
        return plan(
            model, rows, on=on, workers=workers, threads=threads, batch_size=batch_size, steps=ENDLESS, seed=seed,
            on_nonfinite="continue", **options,
        )  # fmt: skip

    size = make(data).start.batch_size  # refuses what cannot be right, by the whole data
    few = _few(Samples.of(data), _BATCHES * size, seed)
    first = make(few)
    check_free(pool, "advice")
    choice = _choice(pool, len(first.assignment.training.sizes))
    seconds = float(seconds)
    visits = _BLOCKS * len(choice.tried)
    visit_seconds = min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, seconds / visits - _AROUND_SECONDS))
    clock = Clock(seconds=seconds, first_seconds=max(_LEAST_SECONDS, _PATIENCE * seconds))
    ticker = Ticker(visits, seconds / visits, shown=progress)
    experiment = Experiment[Layout](
        FreshRun(lambda workers, threads: make(few, workers, threads), pool, left=clock.left),
        PlainArm(first.job, pool, visit_seconds, seconds),
        pool, visit_seconds, first.start.batch_size, choice.cores, clock, ticker, named=True,
    )  # fmt: skip
    try:
        experiment.run(choice.tried, _MOST_BLOCKS, seed)
    finally:
        ticker.end(experiment.summary)
    return Advice(
        experiment.found, parameters=first.start.parameters, where=choice.where, cores=choice.cores,
        notes=[*choice.notes, *experiment.unreachable.values()], stopped=experiment.stopped,
    )  # fmt: skip


def layouts(cores: int, processes: int, most: int = _MOST_LAYOUTS) -> tuple[Layout, ...]:
    """Layouts that fill some cores, the one with most processes first.

    Parameters
    ----------
    cores : int
    processes : int
        The most that there can be.
    most : int
        Layouts; of more that there are, those with the most and the fewest processes stay, and some in between.
    """
    reach = min(cores, processes)
    counts = sorted({reach, *(count for count in range(1, reach + 1) if cores % count == 0)}, reverse=True)
    kept = sorted({round(place) for place in np.linspace(0, len(counts) - 1, min(most, len(counts))).tolist()})
    return tuple(Layout(counts[place], cores // counts[place]) for place in kept)


@dataclass(frozen=True)
class _Choice:
    """What is tried, on which machine, and what a reader should know about it."""

    tried: tuple[Layout, ...]
    cores: int
    where: str
    notes: tuple[str, ...]


def _choice(pool: Workers, chunks: int) -> _Choice:
    # As many items as workers, so that every one of them is asked.
    hosts = set(pool.map(host_here, [None] * pool.size, _ASK_SECONDS))
    cores, where = (pool.map(ask, [None], _ASK_SECONDS)[0] for ask in (cores_here, name_here))
    rivals = tuple(Layout(0, threads) for threads in sorted({1, cores}))
    size = min(pool.size, chunks)
    notes = []
    if hosts == {host_here()}:
        ours = layouts(cores, size)
        if size < cores and pool.most > 1:
            notes.append(
                f"This pool has {many(pool.size, 'worker')} on {many(cores, 'core')}: with parakit.connect({cores}), "
                "more layouts could be tried."
            )
        if pool.in_turns:
            notes.append("Inline workers take turns in one process; parakit.connect() starts processes.")
    else:
        ours = (Layout(size, pool.threads),)
        notes.append(
            "The workers are on other machines: only their own layout was tried, against plain PyTorch on one of them."
        )
    return _Choice((*rivals, *ours), cores, f"{pool.kind}; {where}", tuple(notes))


def _few(samples: Samples, rows: int, seed: int) -> Samples:
    if len(samples) <= rows:
        return samples
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:rows]
    return samples.take(chosen)


def _check_real(pool: Workers) -> None:
    if pool.simulated:
        raise InputError(
            "These workers are simulated: nothing can be measured on them, and so nothing advised.",
            remedy="give the workers of parakit.connect(); what simulated ones would do, parakit.sweep says",
        )
