"""Turns: when a run is looked at. Often in its first steps, up to some seconds; then as a share of its time allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

__all__ = ["MOST_SECONDS", "Purse", "Turns"]

MOST_SECONDS = 2.0  # for looks at first steps that come whatever they cost
_EVERY = 25  # steps; later looks come at most as often


class Purse:
    """Seconds that looks at the first steps may take together.

    Parameters
    ----------
    seconds : float
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds


class Turns:
    """When one kind of look comes round.

    Parameters
    ----------
    first : iterable of int
        Steps of a run at its beginning, as long as the purse lasts.
    purse : Purse
    share : float
        Of the time, from then on; 1 looks at every step.
    always : iterable of int
        Steps at its beginning that are looked at whatever the purse holds, up to `MOST_SECONDS` together.
    clock : callable, optional
        Returns seconds.
    """

    def __init__(
        self,
        first: tuple[int, ...],
        purse: Purse,
        share: float,
        clock: Callable[[], float] = perf_counter,
        *,
        always: tuple[int, ...] = (),
    ) -> None:
        self._first, self._purse, self._share, self._clock = first, purse, share, clock
        self._always = always
        self._begin: int | None = None
        self._next = 0
        self._then = 0.0
        self._spent = 0.0

    def come_at(self, first: tuple[int, ...]) -> None:
        """Come at other steps of the beginning."""
        self._first = self._always = first

    def due(self, step: int) -> bool:
        """Whether it does at a step."""
        if self._begin is None:
            # A run that was resumed, and a worker that joined one, begin as any other.
            self._begin, self._then = step, self._clock()
            self._next = step + self._first[0]
        return step >= self._next or self._share >= 1

    def took(self, step: int, seconds: float) -> None:
        """Note that it did, and how long that took."""
        assert self._begin is not None
        self._purse.left -= seconds
        self._spent += seconds
        begin = self._begin
        wanted = self._first if self._purse.left > 0 else self._always if self._spent < MOST_SECONDS else ()
        early = [begin + at for at in wanted if begin + at > step]
        if early:
            self._next = early[0]
            return
        if step == begin:  # how long a step takes, nobody knows yet
            self._next = step + 1
            return
        done = max(1, step - begin)
        per_step = max(1e-6, (self._clock() - self._then - self._spent) / done)
        least = seconds / (self._share * per_step)
        # To powers of two, so that workers who measured about the same do it at the same steps.
        interval = _EVERY * 2 ** max(0, math.ceil(math.log2(max(1.0, least / _EVERY))))
        self._next = (step // interval + 1) * interval
