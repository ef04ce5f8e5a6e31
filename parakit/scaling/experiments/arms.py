"""The arms of an experiment that train with workers: one run that is resized, or a run for each visit.

Own the runs, and excerpts of what they timed; leave nothing running once they are closed. Plain PyTorch, the other arm,
is `parakit.baselines.measure.PlainArm`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from parakit.events.history import History
from parakit.events.records import Resized, RunStart
from parakit.runs.plan import Plan
from parakit.runs.run import Run
from parakit.scaling.experiments.visits import LOOK_SECONDS, Timed, check_going, end, start_run, time_run
from parakit.workers.pool import Workers

__all__ = ["Arm", "FreshRun", "ResizedRun"]


class Arm:
    """A way to bring training to a worker count.

    Parameters
    ----------
    pool : Workers
    elapsed : callable, optional
        Seconds since the experiment began; with it, some events of each visit are kept.

    Attributes
    ----------
    run : Run or None
        The present one, or the last.
    """

    def __init__(self, pool: Workers, elapsed: Callable[[], float] | None = None) -> None:
        self._pool = pool
        self._elapsed = elapsed
        self._kept: dict[int, History] = {}
        self.run: Run | None = None

    @property
    def histories(self) -> list[History]:
        """What was kept for a cost model: a history for each size of a batch."""
        return [history for _, history in sorted(self._kept.items())]

    def visit(self, count: int, seconds: float, threads: int = 0) -> Timed:
        """Train with some workers until so many seconds are timed.

        Raises
        ------
        Unreachable
            If the count does not come about, or not in time.
        RunError, PoolError
            If the run ended.
        """
        raise NotImplementedError

    def rest(self) -> None:
        """Let all workers stand still."""

    def close(self) -> None:
        """End what is going on."""
        if self.run is not None:
            end(self.run)

    def _keep(self, found: Timed, key: int = 0) -> Timed:
        if self._elapsed is not None and self.run is not None:
            history = self._kept.setdefault(key, History())
            began = self.run.history.latest(RunStart)
            if began is not None and history.latest(RunStart) is None:
                history.append(replace(began, at_seconds=0.0))
            # What a group of as many said of how it exchanges is known.
            if any(formed.generation == found.segments[0].world_size for formed in history.of(Resized)):
                found = replace(found, groups=())
            history.append(*found.excerpt(self._elapsed() - self.run.elapsed_seconds))
        return found


class ResizedRun(Arm):
    """One run that is resized from visit to visit, and stands still in between when it has to.

    Parameters
    ----------
    made : Plan
    pool, elapsed
        As for `Arm`. Every worker has the threads of the plan.
    """

    def __init__(self, made: Plan, pool: Workers, elapsed: Callable[[], float] | None = None) -> None:
        super().__init__(pool, elapsed)
        self._made = made

    def visit(self, count: int, seconds: float, threads: int = 0) -> Timed:  # noqa: ARG002 - those of the plan
        """Train with some workers until so many seconds are timed; errors as for `Arm.visit`."""
        if self.run is None:
            self.run = start_run(self._made, self._pool)
        return self._keep(time_run(self.run, count, seconds))

    def rest(self) -> None:
        """Pause the run, and wait until it stands still."""
        run = self.run
        if run is None or run.status == "paused":
            return
        check_going(run)
        run.pause()
        while run.status != "paused":
            check_going(run)
            time.sleep(LOOK_SECONDS)


class FreshRun(Arm):
    """A run for each visit, where the size of a batch or the threads of a worker differ.

    Parameters
    ----------
    make : callable
        Plans the run for a worker count and threads of each worker.
    pool, elapsed
        As for `Arm`.
    left : callable, optional
        Seconds that a visit may take in all.
    """

    def __init__(
        self, make: Callable[[int, int], Plan], pool: Workers, elapsed: Callable[[], float] | None = None,
        left: Callable[[], float] = lambda: math.inf,
    ) -> None:  # fmt: skip
        super().__init__(pool, elapsed)
        self._make = make
        self._left = left

    def visit(self, count: int, seconds: float, threads: int = 0) -> Timed:
        """Train with some workers until so many seconds are timed, and end that run; errors as for `Arm.visit`."""
        self.run = start_run(self._make(count, threads), self._pool)
        try:
            found = time_run(self.run, count, seconds, self._left())
        finally:
            end(self.run)
        return self._keep(found, key=count)
