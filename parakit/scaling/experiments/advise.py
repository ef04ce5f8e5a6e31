"""`advise`: try plain PyTorch and layouts of processes and threads for a few seconds, and say which is fastest.

Blocks visit everything once, each in an order of its own, until the time is over. Owns what is tried, in which order
and for how long; refuses to sum up. All train the same few batches, so that no data need travel for it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parakit.baselines.measure import PlainArm
from parakit.data.samples import Samples
from parakit.engines.recipe import OptimizerFactory
from parakit.errors import InputError, ParakitError, RunError, Unreachable
from parakit.formatting import many
from parakit.runs.arguments import check_on_cores, check_pool
from parakit.runs.plan import Plan
from parakit.runs.planning import plan
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.visits import ENDLESS, begun, end, timed
from parakit.scaling.study.advice import Advice, Layout
from parakit.scaling.study.records import Measurement
from parakit.strategies.base import Strategy
from parakit.system.this_host import cores_here, host_here, name_here
from parakit.validation import brief, check_positive, check_whole, plain
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
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    clip_norm: float | None = None,
    strategy: Strategy | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    limit_seconds: float = 10.0,
    progress: bool = True,
) -> Advice:
    """Try for a few seconds which layout of processes and threads trains this model fastest on this machine.

    Plain PyTorch with one thread and with all cores, and parakit with processes and threads that together fill the
    cores (on 16 cores 16 x 1, 8 x 2, 4 x 4, 2 x 8 and 1 x 16), take turns until the time is over. All train the same
    few batches of the data, drawn at random. A pool with fewer processes than cores is not grown: what it cannot try,
    the advice says.

    Plain PyTorch is timed in one of the workers, while all others stand still.

    Parameters
    ----------
    model, data, loss, optimizer, clip_norm, strategy, limit_seconds
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
    pool = check_pool(on)
    seconds, seed = map(plain, (seconds, seed))
    check_positive("seconds", seconds)
    check_whole("seed", seed, 0)
    if not isinstance(progress, bool):
        raise InputError(f"progress is {brief(progress)}; it must be True or False.")
    _check_real(pool)
    check_on_cores(pool, "parakit.advise")

    def make(layout: Layout, rows: Any) -> Plan:
        return plan(
            model, rows, on=on, workers=layout.workers, threads=layout.threads, loss=loss, optimizer=optimizer,
            clip_norm=clip_norm, strategy=strategy, batch_size=batch_size, steps=ENDLESS, seed=seed,
            limit_seconds=limit_seconds, on_nonfinite="continue",
        )  # fmt: skip

    size = make(Layout(1, 1), data).start.batch_size  # refuses what cannot be right, by the whole data
    few = _few(Samples.of(data), _BATCHES * size, seed)
    first = make(Layout(1, 1), few)
    pool.hold("advice", lambda: None)
    pool.free("advice")
    choice = _choice(pool, len(first.assignment.training.sizes))
    trial = _Trial(pool, lambda layout: make(layout, few), first, choice, float(seconds), shown=progress)
    return trial.go(np.random.default_rng(seed))


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


class _Trial:
    """What is going on, and what it has so far."""

    def __init__(
        self, pool: Workers, make: Callable[[Layout], Plan], first: Plan, choice: _Choice, seconds: float,
        *, shown: bool,
    ) -> None:  # fmt: skip
        self._pool, self._make, self._choice = pool, make, choice
        self._batch_size, self._parameters = first.start.batch_size, first.start.parameters
        visits = _BLOCKS * len(choice.tried)
        self._visit_seconds = min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, seconds / visits - _AROUND_SECONDS))
        self._rivals = PlainArm(first.job, pool, self._visit_seconds, seconds)
        self._began = time.monotonic()
        self._soft, self._hard = self._began + seconds, self._began + max(_LEAST_SECONDS, _PATIENCE * seconds)
        self._ticker = Ticker(visits, seconds / visits, shown=shown)
        self._found: list[Measurement] = []
        self._failed: dict[Layout, str] = {}
        self._stopped = ""

    def go(self, generator: np.random.Generator) -> Advice:
        try:
            for block, layout in self._order(generator):
                self._ticker.show(str(layout))
                self._try(block, layout)
                self._ticker.tick()
        except KeyboardInterrupt:
            self._give_up("interrupted.")
        except ParakitError as error:
            self._give_up(str(error).splitlines()[0])
        finally:
            self._ticker.end(f"{many(len(self._found), 'measurement')} made")
        if not self._found:
            raise RunError("Nothing could be measured.", cause=" ".join(self._failed.values()) or self._stopped)
        return Advice(
            self._found, parameters=self._parameters, where=self._choice.where, cores=self._choice.cores,
            notes=[*self._choice.notes, *self._failed.values()], stopped=self._stopped,
        )  # fmt: skip

    def _order(self, generator: np.random.Generator) -> Iterator[tuple[int, Layout]]:
        """Visits as long as there is time: everything once in any case, unless that takes far too long."""
        for block in itertools.takewhile(lambda block: block < _MOST_BLOCKS, itertools.count()):
            for place in generator.permutation(len(self._choice.tried)).tolist():
                if time.monotonic() > (self._soft if block else self._hard):
                    self._note_untried()
                    return
                yield block, self._choice.tried[place]

    def _note_untried(self) -> None:
        known = {Layout(m.workers, m.threads) for m in self._found} | set(self._failed)
        if missing := [str(layout) for layout in self._choice.tried if layout not in known]:
            self._stopped = f"there was no time for {'; '.join(missing)}."

    def _give_up(self, why: str) -> None:
        """End with what there is; where there is nothing, let the error go on."""
        self._stopped = why
        if not self._found:
            raise

    def _try(self, block: int, layout: Layout) -> None:
        if layout in self._failed:
            return
        try:
            self._found.append(self._at_workers(block, layout) if layout.workers else self._plain(block, layout))
        except Unreachable as error:
            self._failed[layout] = f"{layout}: {str(error).splitlines()[0]}"

    def _at_workers(self, block: int, layout: Layout) -> Measurement:
        run = begun(self._make(layout), self._pool)
        try:
            found = timed(run, layout.workers, self._visit_seconds, max(1.0, self._hard - time.monotonic()))
        finally:
            end(run)
        return self._measurement(
            block, layout, found.rate, found.step_seconds, len(found.steps), found.seconds, found.breakdown()
        )

    def _plain(self, block: int, layout: Layout) -> Measurement:
        spent = [self._batch_size / rate for rate in self._rivals.visit(layout.threads).rates]
        seconds = sum(spent)
        rate = self._batch_size * len(spent) / seconds
        return self._measurement(block, layout, rate, float(np.median(spent)), len(spent), seconds, ())

    def _measurement(
        self, block: int, layout: Layout, rate: float, step_seconds: float, steps: int, seconds: float,
        breakdown: tuple[float, ...],
    ) -> Measurement:  # fmt: skip
        before = sum((m.workers, m.threads) == (layout.workers, layout.threads) for m in self._found)
        return Measurement(
            layout.workers, before, block, rate, step_seconds, steps, seconds, breakdown,
            time.monotonic() - self._began, "workers" if layout.workers else "plain", layout.threads,
            self._choice.cores,
        )  # fmt: skip


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
