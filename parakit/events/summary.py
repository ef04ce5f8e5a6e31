"""The course of a run in few numbers: what pictures and panels show, however long the run was.

A `RunSummary` follows a history event by event and keeps a bounded summary: two curves against time, the rate at each
worker count that was visited, where the time of the last steps went, the baselines, and the sentences of a log. It
draws nothing.

A rate is counted over whole segments, control included, so it is what a user gets; pauses, resizes and evaluations
stand between segments and do not count. The first segment after each change of the group is left out: caches are cold.
A curve is broken where time passed without training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from parakit.errors import InputError
from parakit.events.curve import Curve, Floats
from parakit.events.history import History
from parakit.events.log import sentence
from parakit.events.records import (
    KINDS,
    PHASES,
    PLAIN,
    Baseline,
    Event,
    Requested,
    RunEnd,
    RunStart,
    SegmentDone,
    StepDone,
    baseline_name,
)
from parakit.formatting import unit_of

__all__ = [
    "PLAIN",
    "UNCERTAIN_SPREAD",
    "Rate",
    "RunSummary",
]

#: A rival whose quartiles lie further apart than so many times is uncertain.
UNCERTAIN_SPREAD = 1.5
_SEGMENTS_PER_COUNT = 400
_LAST_STEPS = 96
_LAST_SECONDS = 3.0
_LOG_LINES = 200
_FEWEST_SEGMENTS = 2


@dataclass(frozen=True)
class Rate:
    """Samples per second at one worker count: median and quartiles over segments, weighted by their seconds.

    Attributes
    ----------
    world_size : int
    median, low, high : float
        In samples per second; `low` and `high` are the quartiles.
    segments : int
        How many segments they rest on.
    """

    world_size: int
    median: float
    low: float
    high: float
    segments: int


class RunSummary:
    """A bounded summary of a run, kept up to date from its history."""

    def __init__(self) -> None:
        self.start: RunStart | None = None
        self.end: RunEnd | None = None
        #: Loss of the batch against seconds.
        self.loss = Curve()
        #: Samples per second against seconds, a value a segment.
        self.rate = Curve()
        self.baselines: dict[str, Baseline] = {}
        self.last: StepDone | None = None
        #: Sentences of what happened, each with its seconds; the newest last.
        self.log: deque[tuple[float, str]] = deque(maxlen=_LOG_LINES)
        #: Steps that were finished most recently, perhaps of several groups.
        self._recent: deque[StepDone] = deque(maxlen=_LAST_STEPS)
        self._segments: dict[int, deque[tuple[float, float]]] = {}
        #: Seconds of training at each worker count, in all segments that count for its rate.
        self.seconds_at: dict[int, float] = {}
        self._rates: dict[int, Rate] = {}
        self._generation: int | None = None
        self._seen: dict[type[Event], float] = {}
        self._trained_until: float | None = None  # by what segments say
        #: Requests, each by its name and value, that are about to be submitted although no person has them.
        self.unasked: list[tuple[str, float | None]] = []

    @classmethod
    def of(cls, data: Any) -> RunSummary:
        """The course of a run, of a history, or a course itself.

        Raises
        ------
        InputError
            If it is something else.
        """
        if isinstance(data, RunSummary):
            return data
        history = getattr(data, "history", data)
        if not isinstance(history, History):
            raise InputError(
                f"{type(data).__name__} {str(data)[:60]!r} has no course of a run to draw.",
                remedy="give a run, run.history, or a history from History.from_json(text)",
            )
        summary = cls()
        summary.follow(history)
        return summary

    def follow(self, history: History) -> bool:
        """Take in what a history has more than before; says whether there was anything."""
        news: list[Event] = []
        for kind in KINDS:
            fresh = history.newer(kind, self._seen.get(kind, -1.0))
            if fresh:
                self._seen[kind] = fresh[-1].at_seconds
                news.extend(fresh)
        for event in sorted(news, key=lambda event: event.at_seconds):
            self._take(event)
        return bool(news)

    def _take(self, event: Event) -> None:
        match event:
            case StepDone():
                gap = self._gap_before(event)
                self.loss.add(event.at_seconds, event.loss, event.world_size, event.step, gap)
                self.last = event
                self._recent.append(event)
            case SegmentDone():
                self._take_segment(event)
            case RunStart():
                self.start = event
            case RunEnd():
                self.end = event
            case Baseline():
                self._take_baseline(event)
        if told := sentence(event, steps=self.start.steps if self.start else None):
            self.log.append((event.at_seconds, told + self._whose(event)))

    def _whose(self, event: Event) -> str:
        """Tell a request that no person submitted."""
        if not isinstance(event, Requested) or (event.request, event.value) not in self.unasked:
            return ""
        self.unasked.remove((event.request, event.value))
        return " by the panel"

    def _gap_before(self, step: StepDone) -> float:
        """Seconds before a step in which nothing was trained."""
        last = self.last
        if last is None:
            return 0.0
        # A long history has thinned its older steps: those that are missing took their time.
        missing = max(0, step.step - last.step - 1) * max(step.seconds, last.seconds)
        until = max(last.at_seconds, self._trained_until or 0.0)
        return max(0.0, step.at_seconds - step.seconds - missing - until)

    def _take_baseline(self, measured: Baseline) -> None:
        # A rival gets the best of its measurements: what else a machine does only makes it slower.
        best = self.baselines.get(measured.name)
        if best is None or measured.samples_per_second > best.samples_per_second:
            self.baselines[measured.name] = measured

    def _take_segment(self, segment: SegmentDone) -> None:
        rate = segment.samples / max(1e-9, segment.seconds)
        began, until = segment.at_seconds - segment.seconds, self._trained_until
        gap = 0.0 if until is None else max(0.0, began - until)
        self.rate.add(segment.at_seconds, rate, segment.world_size, segment.first_step, gap)
        self._trained_until = segment.at_seconds
        warm = segment.generation == self._generation
        self._generation = segment.generation
        if warm:
            kept = self._segments.setdefault(segment.world_size, deque(maxlen=_SEGMENTS_PER_COUNT))
            kept.append((rate, segment.seconds))
            self.seconds_at[segment.world_size] = self.seconds_at.get(segment.world_size, 0.0) + segment.seconds
            self._rates.pop(segment.world_size, None)

    @property
    def seconds(self) -> float:
        """When the newest event happened."""
        return max(self._seen.values(), default=0.0)

    # --- speed

    @property
    def rates(self) -> dict[int, Rate]:
        """The rate at each worker count that was visited long enough, by ascending count."""
        for count, kept in self._segments.items():
            if count not in self._rates and len(kept) >= _FEWEST_SEGMENTS:
                self._rates[count] = _rate(count, kept)
        return dict(sorted(self._rates.items()))

    @property
    def one(self) -> Rate | None:
        """The rate with one worker, to which speedups are relative."""
        return self.rates.get(1)

    @property
    def plain(self) -> Baseline | None:
        """Plain PyTorch in one process with all cores, if it was measured."""
        return self.baselines.get(PLAIN)

    @property
    def uncertain(self) -> bool:
        """Whether the quartiles of plain PyTorch lie so far apart that little can be said of it."""
        plain = self.plain
        return plain is not None and plain.high > UNCERTAIN_SPREAD * plain.low

    @property
    def rival(self) -> str:
        """What plain PyTorch is called in a legend or a table, with a mark if it is uncertain; "" if not measured."""
        return (
            baseline_name(self.plain.cores, self.plain.device) + " (uncertain)" * self.uncertain if self.plain else ""
        )

    def speedup(self, count: int) -> float:
        """Rate at a worker count over the rate with one; NaN while one of them is not measured."""
        rates = self.rates
        if count not in rates or 1 not in rates:
            return float("nan")
        return rates[count].median / rates[1].median

    def efficiency(self, count: int) -> float:
        """Speedup over the number of workers; NaN while it is not measured."""
        return self.speedup(count) / count

    @property
    def crowded_above(self) -> int | None:
        """The most workers that have a core for each of their threads, or None before the start."""
        if self.start is None:
            return None
        return max(1, self.start.cores // max(1, self.start.threads_per_worker))

    @property
    def unit(self) -> str:
        """What `crowded_above` counts: "core" or "GPU"."""
        return unit_of(self.start.device if self.start else "cpu")

    # --- the last steps

    def recent(self, steps: int | None = None) -> tuple[StepDone, ...]:
        """The last steps of the present group: so many, or those of the last seconds."""
        if self.last is None:
            return ()
        present = [step for step in self._recent if step.generation == self.last.generation]
        if steps is not None:
            return tuple(present[-steps:])
        since = self.last.at_seconds - _LAST_SECONDS
        return tuple(step for step in present if step.at_seconds >= since)

    def shares(self) -> tuple[tuple[str, ...], Floats]:
        """Where the last steps' time went: names of the workers, and seconds a step; float64, (workers, phases)."""
        steps = self.recent()
        if not steps:
            return (), np.zeros((0, len(PHASES)))
        seconds = np.array([[part.seconds() for part in step.workers] for step in steps])
        return tuple(part.worker for part in steps[-1].workers), seconds.mean(axis=0)


def _rate(count: int, kept: Iterable[tuple[float, float]]) -> Rate:
    rates, weights = np.array(sorted(kept)).T
    # The middle of each segment's weight, so that the quantiles of equal weights are the usual ones.
    places = (np.cumsum(weights) - weights / 2) / weights.sum()
    low, median, high = np.interp([0.25, 0.5, 0.75], places, rates)
    return Rate(count, float(median), float(low), float(high), len(rates))
