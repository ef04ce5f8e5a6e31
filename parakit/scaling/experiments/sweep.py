"""`sweep`: measure how speed grows with workers, fairly.

Every block visits each worker count and each rival once, in a random order, so that what disturbs the machine for
longer than a block disturbs all of them alike. A visit is a short time of training after a warm-up. The rivals are one
worker and plain PyTorch, with one core and with all of them. Owns the gathering of what visits bring; refuses to sum it
up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from parakit.baselines.measure import PlainArm
from parakit.data.chunks import check_chunks
from parakit.data.samples import Samples
from parakit.engines.recipe import OptimizerFactory
from parakit.errors import InputError, ParakitError, RunError, Unreachable
from parakit.events.history import History
from parakit.events.records import Resized, RunStart
from parakit.formatting import many
from parakit.runs.arguments import check_on_cores, check_pool
from parakit.runs.plan import Plan
from parakit.runs.planning import plan
from parakit.scaling.experiments.order import Visit, visits
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.schedule import (
    AROUND_SECONDS,
    check_extent,
    rows_of_a_worker,
    usual_counts,
    wanted_counts,
)
from parakit.scaling.experiments.visits import ENDLESS, Arm, FreshRun, ResizedRun, Timed, end
from parakit.scaling.study.records import About, Measurement
from parakit.scaling.study.study import Scaling
from parakit.strategies.base import Strategy
from parakit.system.this_host import cores_here, name_here
from parakit.validation import brief, check_choice, check_whole, plain
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
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    learning_rate: float | None = None,
    clip_norm: float | None = None,
    strategy: Strategy | None = None,
    seed: int = 0,
    chunks: int | None = None,
    limit_seconds: float = 10.0,
    on_nonfinite: str = "stop",
    progress: bool = True,
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
    model, data, loss, optimizer, learning_rate, clip_norm, strategy, chunks, limit_seconds, on_nonfinite
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
    pool = check_pool(on)
    check_on_cores(pool, "parakit.sweep")
    counts = wanted_counts(usual_counts(pool) if workers is None else workers)
    repeats, seconds, batch_size, seed = map(plain, (repeats, seconds, batch_size, seed))
    check_extent(len(counts), repeats, seconds)
    check_choice("scaling", scaling, ("strong", "weak"))
    check_whole("seed", seed, 0)
    if not isinstance(progress, bool):
        raise InputError(f"progress is {brief(progress)}; it must be True or False.")
    samples = _readable(data)
    weak = scaling == "weak"
    size = rows_of_a_worker(batch_size, samples, counts[-1]) if weak else batch_size

    def make(count: int) -> Plan:
        beginning = count if weak and count <= pool.size else 1
        rows = None if size is None else size * (count if weak else 1)
        return plan(
            model, samples, on=on, workers=beginning, loss=loss, optimizer=optimizer, learning_rate=learning_rate,
            clip_norm=clip_norm, strategy=strategy, batch_size=rows, steps=ENDLESS, seed=seed, chunks=chunks,
            limit_seconds=limit_seconds, on_nonfinite=on_nonfinite,
        )  # fmt: skip

    first = make(1)
    for count in counts:
        on.check_count(count, most=on.most)
        made = make(count) if weak and count > 1 else first
        check_chunks(count, len(made.assignment.training.sizes))
    rig: Arm = FreshRun(make, on) if weak else ResizedRun(first, on)
    about = _about(first, on, scaling, counts, repeats, float(seconds), seed)
    order = visits(counts, () if about.simulated else _rival_threads(on), repeats, seed)
    _check_free(on)
    return _Sweeping(on, rig, about, first, Ticker(len(order), seconds + AROUND_SECONDS, shown=progress)).go(order)


class _Sweeping:
    """A sweep that is going on, and what it has so far."""

    def __init__(self, pool: Workers, rig: Arm, about: About, first: Plan, ticker: Ticker) -> None:
        self._pool = pool
        self._rig = rig
        self._about = about
        self._rivals = None if about.simulated else PlainArm(first.job, pool, about.seconds)
        self._ticker = ticker
        self._began = pool.clock()
        self._found: list[Measurement] = []
        self._histories: dict[int, History] = {}
        self._unreachable: dict[tuple[int, int], str] = {}
        self._stopped = ""

    def go(self, order: list[Visit]) -> Scaling:
        try:
            for visit in order:
                self._ticker.show(str(visit))
                self._try(visit)
                self._ticker.tick()
            if not self._found:
                raise RunError("Nothing could be measured.", cause=" ".join(self._unreachable.values()))
        except KeyboardInterrupt:
            self._give_up("interrupted.")
        except ParakitError as error:
            self._give_up(str(error).splitlines()[0])
        finally:
            if self._rig.run is not None:
                end(self._rig.run)
            self._ticker.end(self._summary())
        return self._study()

    def _give_up(self, why: str) -> None:
        """End with what there is; where there is nothing, let the error go on."""
        self._stopped = why
        if not self._found:
            raise

    def _try(self, visit: Visit) -> None:
        key = visit.workers, visit.threads
        if key in self._unreachable:
            return
        try:
            self._found.append(self._at_workers(visit) if visit.workers else self._plain(visit))
        except Unreachable as error:
            self._unreachable[key] = str(error).splitlines()[0]

    def _at_workers(self, visit: Visit) -> Measurement:
        timed = self._rig.visit(visit.workers, self._about.seconds)
        self._keep(visit.workers, timed)
        return self._measurement(
            visit, timed.rate, timed.step_seconds, len(timed.steps), timed.seconds, timed.breakdown(),
            self._about.threads,
        )  # fmt: skip

    def _plain(self, visit: Visit) -> Measurement:
        assert self._rivals is not None
        self._rig.rest()
        spent = [self._about.batch_size / rate for rate in self._rivals.visit(visit.threads).rates]
        seconds = sum(spent)  # and not the median of a step, as hiccups count at workers too
        rate = self._about.batch_size * len(spent) / seconds
        return self._measurement(visit, rate, float(np.median(spent)), len(spent), seconds, (), visit.threads)

    def _measurement(
        self, visit: Visit, rate: float, step_seconds: float, steps: int, seconds: float,
        breakdown: tuple[float, ...], threads: int,
    ) -> Measurement:  # fmt: skip
        kind = "workers" if visit.workers else "plain"
        before = sum((m.workers, m.kind, m.threads) == (visit.workers, kind, threads) for m in self._found)
        return Measurement(
            visit.workers, before, visit.block, rate, step_seconds, steps, seconds, breakdown,
            self._pool.clock() - self._began, kind, threads, self._pool.cores, self._about.simulated,
        )  # fmt: skip

    def _keep(self, workers: int, timed: Timed) -> None:
        """Keep some of the steps for a cost model: in one history, or in one a count where batches differ."""
        run = self._rig.run
        assert run is not None
        history = self._histories.setdefault(workers if self._about.mode == "weak" else 0, History())
        start = run.history.latest(RunStart)
        if start is not None and history.latest(RunStart) is None:
            history.append(replace(start, at_seconds=0.0))
        if any(formed.generation == workers for formed in history.of(Resized)):
            timed = replace(timed, groups=())  # what that one says is known
        history.append(*timed.excerpt(self._pool.clock() - self._began - run.elapsed_seconds))

    def _summary(self) -> str:
        state = f"{self._stopped.rstrip('.')}: " if self._stopped else ""
        return f"{state}{many(len(self._found), 'measurement')} made"

    def _study(self) -> Scaling:
        histories = [history for _, history in sorted(self._histories.items())]
        return Scaling(
            self._found, self._about, histories=histories, stopped=self._stopped,
            notes=list(self._unreachable.values()),
        )  # fmt: skip


# --- what is given


def _readable(data: Any) -> Any:
    """Data that can be read again and again at no cost; what cannot be read is refused later, in better words."""
    with suppress(ParakitError):
        return Samples.of(data)
    return data


def _rival_threads(pool: Workers) -> list[int]:
    """One thread, and as many as the process of a worker may use cores."""
    return sorted({1, int(pool.map(cores_here, [None], _NAME_SECONDS)[0])})


def _check_free(pool: Workers) -> None:
    """Refuse a pool on which a run is going on, before anything is measured there."""
    pool.hold("sweep", lambda: None)
    pool.free("sweep")


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
