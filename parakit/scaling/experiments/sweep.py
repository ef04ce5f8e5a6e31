"""`sweep`: measure how speed grows with workers, fairly.

Every block visits each worker count and each rival once, in a random order, so that what disturbs the machine for
longer than a block disturbs all of them alike. A visit is a short time of training after a warm-up. The rivals are one
worker and plain PyTorch, with one core and with all of them. Owns what is asked for and what is visited; refuses to
measure, and to sum up.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Unpack

from torch import nn

from parakit.baselines.measure import PlainArm
from parakit.data.chunks import check_chunks
from parakit.data.samples import Samples
from parakit.errors import ParakitError
from parakit.runs.arguments import check_on_cores, check_pool
from parakit.runs.options import StepOptions, check_names
from parakit.runs.plan import Plan
from parakit.runs.planning import plan
from parakit.scaling.experiments.arms import Arm, FreshRun, ResizedRun
from parakit.scaling.experiments.experiment import Clock, Experiment, check_free
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.schedule import (
    AROUND_SECONDS,
    Count,
    check_extent,
    rows_of_a_worker,
    usual_counts,
    wanted_counts,
)
from parakit.scaling.experiments.visits import ENDLESS
from parakit.scaling.study.records import About
from parakit.scaling.study.study import Scaling
from parakit.system.this_host import cores_here, name_here
from parakit.validation import check_choice, check_flag, check_whole, plain
from parakit.workers.pool import Workers

__all__ = ["sweep"]

_NAME_SECONDS = 10.0


def sweep(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    workers: Iterable[int] | None = None,
    repeats: int = 5,
    seconds: float = 0.5,
    scaling: str = "strong",
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    chunks: int | None = None,
    on_nonfinite: str = "stop",
    progress: bool = True,
    **options: Unpack[StepOptions],
) -> Scaling:
    """Measure how training speeds up with workers, against one worker and against plain PyTorch.

    Blocks as many as there are repeats visit each worker count and each rival once, in an order drawn anew for every
    block. A visit trains for a warm-up that does not count, and then until some seconds are timed, in whole segments
    of a quarter of a second, or of up to 0.8 s for large models, as in any run. With strong scaling, one run is resized
    from visit to visit, and stands still while plain PyTorch is timed on one of its workers; with weak scaling, each
    visit is a run of its own. Every worker has the same number of threads at every count. On simulated workers nothing
    is measured: plain PyTorch is left out, and all that is shown says that it is simulated.

    An interrupt, or a run that fails, ends the sweep; what was measured by then is returned, and says that it is
    incomplete.

    Parameters
    ----------
    model, data, learning_rate, chunks, on_nonfinite
        As for `parakit.train`. The model is copied, never changed; what the sweep trains is thrown away.
    on : Workers
        From `parakit.connect`. A pool that can grow is grown as far as is needed.
    workers : sequence of int, optional
        The worker counts to measure, such as [1, 2, 4], a thousand at most; one worker is measured in any case.
        Default: powers of two up to what the pool has, and all that it has.
    repeats : int
        How often each.
    seconds : float
        To time each visit, at least one segment. All visits together may take a day.
    scaling : {"strong", "weak"}
        Whether the global batch stays the same, or grows with the workers.
    batch_size : int, optional
        Rows in the global batch; for each worker if the scaling is weak. Default: as for `train`, or 256 for each
        worker; fewer if the data have not enough for the largest count. Plain PyTorch trains batches of this size.
    seed : int
        Of the training as of the order of visits.
    progress : bool
        Whether to show a line that says what is being measured, and the time left.
    **options
        As for `parakit.train`: loss, optimizer, clip_norm, strategy, limit_seconds.

    Returns
    -------
    Scaling

    Raises
    ------
    WorkerCountError, DataError, ModelError, LossError, InputError
        If an argument cannot be right; nothing was started then.
    PoolError
        If another run is going on on these workers, or they were closed.
    RunFailed
        If training fails before anything was measured.

    Examples
    --------
    >>> import torch, parakit as pk
    >>> from parakit.scaling.experiments.sweep import sweep
    >>> digits = pk.datasets.digits()
    >>> with pk.connect("inline") as workers:
    ...     study = sweep(torch.nn.Linear(64, 10), digits.train, on=workers, workers=[1, 2],
    ...                   repeats=1, seconds=0.05, progress=False)
    >>> study.workers, study.complete
    ((1, 2), True)
    """
    check_names(options, StepOptions, "sweep")
    pool = check_pool(on)
    check_on_cores(pool, "parakit.sweep")
    counts = wanted_counts(usual_counts(pool) if workers is None else workers)
    repeats, seconds, batch_size, seed = map(plain, (repeats, seconds, batch_size, seed))
    check_extent(len(counts), repeats, seconds)
    check_choice("scaling", scaling, ("strong", "weak"))
    check_whole("seed", seed, 0)
    check_flag("progress", progress)
    samples = _readable(data)
    weak = scaling == "weak"
    size = rows_of_a_worker(batch_size, samples, counts[-1]) if weak else batch_size

    def make(count: int, _: int = 0) -> Plan:
        beginning = count if weak and count <= pool.size else 1
        rows = None if size is None else size * (count if weak else 1)
        return plan(
            model, samples, on=on, workers=beginning, batch_size=rows, steps=ENDLESS, learning_rate=learning_rate,
            seed=seed, chunks=chunks, on_nonfinite=on_nonfinite, **options,
        )  # fmt: skip

    first = make(1)
    for count in counts:
        on.check_count(count, most=on.most)
        made = make(count) if weak and count > 1 else first
        check_chunks(count, len(made.assignment.training.sizes))
    clock = Clock(pool.clock)
    arm = FreshRun(make, pool, clock.elapsed) if weak else ResizedRun(first, pool, clock.elapsed)
    about = _about(first, pool, scaling, counts, repeats, float(seconds), seed)
    places = [*(Count(count, pool.threads) for count in counts), *_rivals(pool)]
    check_free(pool, "sweep")
    return _measure(pool, arm, about, first, clock, places, shown=progress)


def _measure(
    pool: Workers, arm: Arm, about: About, first: Plan, clock: Clock, places: list[Count], *, shown: bool
) -> Scaling:
    ticker = Ticker(len(places) * about.repeats, about.seconds + AROUND_SECONDS, shown=shown)
    rival = None if about.simulated else PlainArm(first.job, pool, about.seconds)
    experiment = Experiment[Count](arm, rival, pool, about.seconds, about.batch_size, pool.cores, clock, ticker)
    try:
        experiment.run(places, about.repeats, about.seed)
    finally:
        state = f"{experiment.stopped.rstrip('.')}: " if experiment.stopped else ""
        ticker.end(f"{state}{experiment.summary}")
    return Scaling(
        experiment.found, about, histories=arm.histories, stopped=experiment.stopped,
        notes=list(experiment.unreachable.values()),
    )  # fmt: skip


# --- what is given


def _readable(data: Any) -> Any:
    """Data that can be read again and again at no cost; what cannot be read is refused later, in better words."""
    with suppress(ParakitError):
        return Samples.of(data)
    return data


def _rivals(pool: Workers) -> list[Count]:
    """Plain PyTorch with one thread, and with as many as a worker's process may use cores; none of a simulation."""
    if pool.simulated:
        return []
    cores = int(pool.map(cores_here, [None], _NAME_SECONDS)[0])
    return [Count(0, threads) for threads in sorted({1, cores})]


def _about(
    first: Plan, pool: Workers, mode: str, counts: tuple[int, ...], repeats: int, seconds: float, seed: int
) -> About:
    start = first.start
    where = "" if pool.simulated else _name_of_a_worker(pool)
    return About(
        mode=mode, batch_size=start.batch_size, parameters=start.parameters, samples=start.samples,
        strategy=start.strategy, pool=start.pool, machine=where, threads=pool.threads, cores=pool.cores,
        counts=counts, repeats=repeats, seconds=seconds, seed=seed, simulated=pool.simulated, in_turns=pool.in_turns,
    )  # fmt: skip


def _name_of_a_worker(pool: Workers) -> str:
    try:
        return str(pool.map(name_here, [None], _NAME_SECONDS)[0])
    except ParakitError:
        return ""
