"""Stragglers: workers that compute slower than the others, found from the accounts of steps and named, not removed.

What is compared is computing (data, forward, backward) per sample, because shares of a batch differ by a few rows, and
exchange and idling only show who waits for whom. A single slow step means nothing: a median over some seconds does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from parakit.events.records import SlowWorker, StepDone

__all__ = ["Stragglers"]

SLOW_TIMES = 1.5
_FAST_TIMES = 1.2  # between the two nothing is said, so that nobody is named again and again
_WINDOW_SECONDS = 2.0
_FEWEST_STEPS = 8


class Stragglers:
    """Looks at steps as they are done, and says who is slow, and who no longer is."""

    def __init__(self) -> None:
        self._generation = -1
        self._steps: deque[StepDone] = deque()
        self._named: set[str] = set()

    def look(self, steps: Sequence[StepDone]) -> list[SlowWorker]:
        """Take in some more steps; what is to be said about their workers."""
        for step in steps:
            self._take(step)
        if len(self._steps) < _FEWEST_STEPS or self._steps[-1].at_seconds - self._steps[0].at_seconds < _WINDOW_SECONDS:
            return []
        return self._compare(self._steps[-1].at_seconds)

    def _take(self, step: StepDone) -> None:
        if step.generation != self._generation:  # other workers, other shares
            self._generation = step.generation
            self._steps.clear()
        self._steps.append(step)
        # One step more than the window, so that the window can be seen to be full.
        while len(self._steps) > _FEWEST_STEPS and step.at_seconds - self._steps[1].at_seconds > _WINDOW_SECONDS:
            self._steps.popleft()

    def _compare(self, at_seconds: float) -> list[SlowWorker]:
        paces = _paces(self._steps)
        told = []
        for worker, pace in paces.items():
            others = [other for name, other in paces.items() if name != worker]
            times = pace / max(1e-12, median(others)) if others else 1.0
            if times > SLOW_TIMES and worker not in self._named:
                self._named.add(worker)
                told.append(SlowWorker(at_seconds, worker, times, False))
            elif times < _FAST_TIMES and worker in self._named:
                self._named.discard(worker)
                told.append(SlowWorker(at_seconds, worker, times, True))
        return told


def _paces(steps: Sequence[StepDone]) -> dict[str, float]:
    """Seconds of computing a sample, by worker: the median over steps."""
    found: dict[str, list[float]] = {}
    for step in steps:
        for part in step.workers:
            if part.samples:
                computing = part.data_seconds + part.forward_seconds + part.backward_seconds
                found.setdefault(part.worker, []).append(computing / part.samples)
    return {worker: median(seconds) for worker, seconds in found.items()}
