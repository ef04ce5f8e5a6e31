"""One visit to a worker count: a run that is brought there, and timed for a moment once it has warmed up.

Owns what counts as warm-up, and what is timed. All times are those that events tell, by the clock of the workers.
Refuses to know in which order visits are made, and what becomes of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parakit.errors import ParakitError, RunError, Unreachable
from parakit.events.history import History
from parakit.events.records import GradientNorms, Resized, Said, SegmentDone, StepDone
from parakit.formatting import many
from parakit.runs.plan import Plan
from parakit.runs.run import Run
from parakit.system.threads import uninterrupted
from parakit.workers.pool import Workers

__all__ = ["ENDLESS", "LOOK_SECONDS", "Timed", "check_going", "end", "start_run", "time_run"]

#: Steps of a run that is timed: whoever times it ends it.
ENDLESS = 10**9
#: Between looks at a run that is waited for.
LOOK_SECONDS = 0.01

_WARM_UP_SECONDS = 0.2  # a segment in any case: caches are cold, and the pace of segments is still that of before
_FIRST_SEGMENTS = 3  # of a run are warm-up too: each keeps its state in memory that was never used before
_ARRIVAL_SECONDS = 120.0  # that a count may take to come about, all growing and recovering included
_END_SECONDS = 10.0
_KEPT_STEPS = 64  # of a visit, for a cost model: more would say the same again


@dataclass(frozen=True)
class Timed:
    """What a visit to a worker count brought: whole segments, without those of the warm-up.

    Parameters
    ----------
    segments : sequence of SegmentDone
    steps : sequence of StepDone
        Of these segments.
    norms : sequence of GradientNorms
    groups : sequence of Resized
        Of the group that did them: how it exchanges.
    """

    segments: Sequence[SegmentDone]
    steps: Sequence[StepDone]
    norms: Sequence[GradientNorms]
    groups: Sequence[Resized] = ()

    @property
    def seconds(self) -> float:
        """That were timed, with all that segments cost."""
        return sum(segment.seconds for segment in self.segments)

    @property
    def rate(self) -> float:
        """Samples per second."""
        return sum(segment.samples for segment in self.segments) / max(1e-9, self.seconds)

    @property
    def step_seconds(self) -> float:
        """Median of a step."""
        return float(np.median([step.seconds for step in self.steps]))

    def breakdown(self) -> tuple[float, ...]:
        """Seconds a step in each phase, the mean over steps and workers."""
        shares = [np.mean([part.seconds() for part in step.workers], axis=0) for step in self.steps]
        return tuple(np.mean(shares, axis=0).tolist())

    def excerpt(self, since_seconds: float) -> list[Any]:
        """Some events for a cost model, moved to the time of the sweep.

        They bear one generation for each worker count: the warm-up is not among them, so a change of the group is none
        that anybody has to skip steps for.
        """
        places = np.unique(np.linspace(0, len(self.steps) - 1, _KEPT_STEPS).round().astype(int)).tolist()
        events: list[Any] = [*self.groups, *(self.steps[place] for place in places), *self.segments]
        count = self.segments[0].world_size
        moved = [replace(e, at_seconds=e.at_seconds + since_seconds, generation=count) for e in events]
        return [*moved, *(replace(n, at_seconds=n.at_seconds + since_seconds) for n in self.norms)]


def start_run(made: Plan, pool: Workers) -> Run:
    """A run that begins; an interrupt in the middle leaves none that nobody knows of."""
    return uninterrupted(lambda: Run(made, pool, History()), end, _END_SECONDS)


def end(run: Run) -> None:
    """End a run; bounded in time, and never raises an error of the run."""
    run.stop()
    with suppress(ParakitError):
        run.wait(_END_SECONDS, progress=False)


def time_run(run: Run, count: int, seconds: float, limit_seconds: float = math.inf) -> Timed:
    """Let a run train at a worker count until so many seconds are timed.

    Segments are as long as in a run that nobody watches: where control costs much, up to 0.8 s. With shorter ones,
    large models would look slower than they are.

    Parameters
    ----------
    run : Run
    count : int
    seconds : float
    limit_seconds : float
        That it may take in all.

    Raises
    ------
    Unreachable
        If the count does not come about, or not in time.
    RunError, PoolError
        If the run ended.
    """
    check_going(run)
    if run.target != count:
        run.resize(count)
    newest = run.history.latest(SegmentDone)
    since, least = (-1.0, _FIRST_SEGMENTS) if newest is None else (newest.at_seconds, 1)
    if run.status == "paused":
        run.resume()
    asked = time.monotonic()
    while True:
        segments = _warm(run.history.newer(SegmentDone, since), count, least)
        if sum(segment.seconds for segment in segments) >= seconds:
            return _cut(run.history, _enough(segments, seconds))
        if run.world_size != count and (run.target != count or time.monotonic() - asked > _ARRIVAL_SECONDS):
            raise _unreachable(run, count)
        check_going(run)
        if time.monotonic() - asked > limit_seconds:
            raise Unreachable(f"{many(count, 'worker')} did too few steps within {limit_seconds:.0f} s to be timed.")
        time.sleep(LOOK_SECONDS)


def _warm(segments: Sequence[SegmentDone], count: int, least: int) -> list[SegmentDone]:
    """Those at a count, of the newest group, after its warm-up, which has at least so many."""
    mine = [segment for segment in segments if segment.world_size == count]
    mine = [segment for segment in mine if segment.generation == mine[-1].generation]
    spent, cold = 0.0, 0
    while cold < len(mine) and spent < _WARM_UP_SECONDS:
        spent += mine[cold].seconds
        cold += 1
    return mine[max(least, cold) :]


def _enough(segments: Sequence[SegmentDone], seconds: float) -> list[SegmentDone]:
    """The first that together last so long; more may have passed by since, the faster the more."""
    ends = np.cumsum([segment.seconds for segment in segments])
    return list(segments[: int(np.searchsorted(ends, seconds)) + 1])


def _cut(history: History, segments: Sequence[SegmentDone]) -> Timed:
    first, end = segments[0].first_step, segments[-1].first_step + segments[-1].steps
    steps = [step for step in history.steps if first <= step.step < end]
    norms = [found for found in history.of(GradientNorms) if first <= found.step < end]
    groups = [formed for formed in history.of(Resized) if formed.generation == segments[0].generation]
    return Timed(segments, steps, norms, groups)


def check_going(run: Run) -> None:
    """Raise why a run ended, if it did."""
    if run.error is not None:
        raise run.error
    if run.status == "finished":
        run.pool.check_open()
        raise RunError(f"The run of the sweep was ended after step {run.step}.", cause="somebody stopped it")


def _unreachable(run: Run, count: int) -> Unreachable:
    said = run.history.latest(Said)
    why = said.text if said is not None else f"the run has {run.world_size} workers."
    return Unreachable(f"{count} workers could not be measured: {why}")
