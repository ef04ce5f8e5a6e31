"""Who decides the worker count: a person, an itinerary of visits, or code that resizes the run behind our back.

An itinerary is a tour of all counts, or the moment with one worker that speedup is relative to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from parakit.errors import ParakitError
from parakit.events.summary import RunSummary
from parakit.runs.run import Run
from parakit.workers.pool import Workers

__all__ = ["TOUR", "Itinerary", "Steering", "stops_of_a_tour", "stops_up_to"]

#: Why an itinerary visits every worker count.
TOUR = "visiting every worker count"

_STAY_SECONDS = 1.2  # of training in segments that count
_LONGEST_SECONDS = 60.0
_EVERY_COUNT = 8
_FEW_WORKERS = 4  # that a pool of one is grown to
_ENOUGH_SEGMENTS = 3


def stops_of_a_tour(pool: Workers, run: Run | None, most: int) -> list[int]:
    """Worker counts of a pool to visit with a run, which may not have begun: at most so many workers."""
    there = pool.size if pool.size > 1 else min(most, _FEW_WORKERS)
    chunks = most if run is None else len(run.plan.job.recipe.order.sizes)
    return stops_up_to(min(there, most, chunks))


def stops_up_to(most: int) -> list[int]:
    """Every count up to some, then doublings and the last."""
    counts = {n for n in range(1, most + 1) if n <= _EVERY_COUNT}
    doubling = 2 * _EVERY_COUNT
    while doubling < most:
        counts.add(doubling)
        doubling *= 2
    return sorted(counts | {most})


class Itinerary:
    """Worker counts to visit, each for a moment of training. Pure: says where to go, and resizes nothing.

    Parameters
    ----------
    stops : sequence of int
    purpose : str
        Why, for people.
    yields : bool
        Whether a person's request ends it; otherwise that request waits for its end.
    """

    def __init__(self, stops: Sequence[int], purpose: str, *, yields: bool) -> None:
        self._left = list(stops)
        self.purpose = purpose
        self.yields = yields
        self._since: float | None = None  # when the present stop was asked for
        self._before = 0.0  # how long it had been measured by then

    @property
    def left(self) -> tuple[int, ...]:
        """The counts that are still to be visited, the present one included."""
        return tuple(self._left)

    def next(self, now: float, summary: RunSummary) -> int | None:
        """Which count to have now; None when all were visited.

        Parameters
        ----------
        now : float
            Seconds; only differences matter. Time in which the run is paused must not count.
        summary : RunSummary
            What was seen of the run until now.
        """
        while self._left:
            stop = self._left[0]
            measured = summary.seconds_at.get(stop, 0.0)
            if self._since is None:
                self._since, self._before = now, measured
            rate = summary.rates.get(stop)
            enough = rate is not None and rate.segments >= _ENOUGH_SEGMENTS and measured - self._before >= _STAY_SECONDS
            if not enough and now - self._since < _LONGEST_SECONDS:
                return stop
            self._left.pop(0)
            self._since = None
        return None


class Steering:
    """Brings a run to the worker count that a person wants, by way of an itinerary if there is one.

    Parameters
    ----------
    run : Run
    wanted : int
        What the person wants in the end.
    unasked : callable, optional
        Given a count, the context in which the run is asked for it although no person asks now.
    """

    def __init__(
        self, run: Run, wanted: int, unasked: Callable[[int], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self._run = run
        self._unasked = unasked
        self._lock = threading.RLock()  # a person asks in one thread, and another looks
        self._trip: Itinerary | None = None
        self._set = run.target
        self._trained_seconds = 0.0
        self._looked_at = 0.0
        self.wanted = wanted

    @property
    def trip(self) -> Itinerary | None:
        """The itinerary that is being followed."""
        return self._trip

    def ask(self, count: int) -> bool:
        """Express a person's request; says whether it ended an itinerary.

        Raises
        ------
        WorkerCountError, RunEnded
            As `Run.resize`.
        """
        with self._lock:
            if self._trip is not None and not self._trip.yields:
                self.wanted = count
                return False
            ended, self._trip = self._trip is not None, None
            self._resize(count)
            self.wanted = count
            return ended

    def travel(self, trip: Itinerary) -> None:
        """Follow an itinerary from now on, and come back to what is wanted."""
        with self._lock:
            self._trip = trip

    def go_home(self) -> None:
        """Leave an itinerary, if there is one: the run is to have what the person wants."""
        with self._lock:
            if self._trip is not None:
                self._trip = None
                with suppress(ParakitError):  # it may have ended
                    self._resize(self.wanted, asked=False)

    def look(self, now: float, summary: RunSummary) -> None:
        """Go on to the next stop if it is time to; to be called several times a second.

        Parameters
        ----------
        now : float
            Seconds; only differences matter.
        summary : RunSummary
        """
        with self._lock:
            self._look(now, summary)

    def _look(self, now: float, summary: RunSummary) -> None:
        run = self._run
        if run.status == "running":
            self._trained_seconds += now - self._looked_at
        self._looked_at = now
        if run.target != self._set:  # resized by code, or the engine gave a request up
            self._set = self.wanted = run.target
            self._trip = None
        if self._trip is None or run.status != "running":
            return
        stop = self._trip.next(self._trained_seconds, summary)
        if stop is None:
            self._trip = None
        try:
            self._resize(self.wanted if stop is None else stop, asked=False)
        except ParakitError:  # the run ended meanwhile, or cannot have that many
            self.go_home()
            self.wanted = self._set

    def _resize(self, count: int, *, asked: bool = True) -> None:
        if count != self._run.target:
            with nullcontext() if asked else self._unasked(count):
                self._run.resize(count)
        self._set = count
