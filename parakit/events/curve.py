"""A bounded curve against time: two curves of it fit in a picture, however long the run was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Curve", "Point"]

Floats = npt.NDArray[np.float64]
_CURVE_POINTS = 600
_GAP_SECONDS = 0.5  # without training, from which on a curve is broken: a resize among warm workers takes less


class Point(NamedTuple):
    """A point of a curve.

    Attributes
    ----------
    at_seconds, value : float
    world_size : int
    step : float
    gap_seconds : float
        How long nothing was trained before it.
    """

    at_seconds: float
    value: float
    world_size: int
    step: float
    gap_seconds: float


class Curve:
    """A value against time in at most so many points, each the mean of neighbours with one worker count and no gap.

    Parameters
    ----------
    most : int
        The most points to keep. When there are more, neighbours are joined.
    """

    def __init__(self, most: int = _CURVE_POINTS) -> None:
        self._most = most
        self._points: list[Point] = []
        # The point that is still open, as sums: it may come to stand for any number of values.
        self._at = self._value = self._step = self._gap = 0.0
        self._count = self._size = 0
        #: How many values were joined into a point.
        self.each = 1
        #: A point that was waited for longer than this does not belong to the piece before it.
        self.longest_gap_seconds = _GAP_SECONDS

    def add(
        self, at_seconds: float, value: float, world_size: int, step: float = 0.0, gap_seconds: float = 0.0
    ) -> None:
        """Go on to a later value, before which nothing was trained for some seconds."""
        if self._count and (self._size != world_size or gap_seconds > self.longest_gap_seconds):
            self._close_point()
        if not self._count:
            self._gap = gap_seconds
        self._at += at_seconds
        self._value += value
        self._step += step
        self._count += 1
        self._size = world_size
        if self._count >= self.each:
            self._close_point()

    @property
    def _open(self) -> Point:
        count = self._count
        return Point(self._at / count, self._value / count, self._size, self._step / count, self._gap)

    def _close_point(self) -> None:
        self._points.append(self._open)
        self._at, self._value, self._step, self._count = 0.0, 0.0, 0.0, 0
        # An even number, so that with one worker count no point is left without a partner.
        if len(self._points) >= max(2, self._most - self._most % 2):
            self._thin()
            self.each *= 2

    def _thin(self) -> None:
        enough = 3 * self._most
        if 4 * len(_joined(self._points, math.inf)) > enough:
            # Where the count changes all the time there is little to join, and every other point has to go.
            self._points = _every_other(_joined(self._points, self.longest_gap_seconds))
            return
        # Where training pauses all the time, only its longer pauses can be told.
        while 4 * len(joined := _joined(self._points, self.longest_gap_seconds)) > enough:
            self.longest_gap_seconds *= 2
        self._points = joined

    @property
    def points(self) -> Floats:
        """The points, a row each, with the columns of `Point`; float64, (points, 5)."""
        rows = [*self._points, self._open] if self._count else self._points
        return np.array(rows, np.float64).reshape(-1, len(Point._fields))


def _joined(points: Iterable[Point], longest_gap_seconds: float) -> list[Point]:
    """Neighbours in pairs, as far as they have one worker count and no gap: a short visit keeps a point of its own."""
    pairs: list[list[Point]] = []
    for point in points:
        alone = bool(pairs) and len(pairs[-1]) == 1 and pairs[-1][0].world_size == point.world_size
        if alone and point.gap_seconds <= longest_gap_seconds:
            pairs[-1].append(point)
        else:
            pairs.append([point])
    return [_mean(pair) for pair in pairs]


def _mean(points: Iterable[Point]) -> Point:
    times, values, sizes, steps, gaps = zip(*points, strict=True)
    count = len(times)
    return Point(sum(times) / count, sum(values) / count, sizes[-1], sum(steps) / count, gaps[0])


def _every_other(points: list[Point]) -> list[Point]:
    """The last of each two neighbours, which takes over the gap of the other."""
    kept = points[1 - len(points) % 2 :: 2]
    gone = points[len(points) % 2 :: 2]
    gaps = [0.0] * (len(kept) - len(gone)) + [point.gap_seconds for point in gone]
    return [point._replace(gap_seconds=max(point.gap_seconds, gap)) for point, gap in zip(kept, gaps, strict=True)]
