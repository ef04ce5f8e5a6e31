"""Requests: what the user wants of a run, submitted in any thread and granted between segments."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Requests"]


class Requests:
    """What the user wants, submitted in any thread and granted by the run loop.

    Parameters
    ----------
    target : int
        Workers wanted.
    clock : callable
        Tells the time of the run's pool.
    """

    def __init__(self, target: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.changed = threading.Condition()
        self.target = target
        self.paused = False
        self.stopping = False
        #: A learning rate to go on at, until it is granted.
        self.rate: float | None = None
        #: How old news may be, for whoever watches.
        self.news_seconds = math.inf
        #: Whether plain PyTorch is to be measured, until it is.
        self.measuring = False
        #: Counts requests; a segment ordered under a number is ended by a higher one.
        self.number = 0
        #: When the target was last asked for, by the clock.
        self.asked_at = clock()
        self.interrupt: Callable[[int], None] = lambda _: None

    def submit(self, change: Callable[[Requests], Any]) -> None:
        """Change what is wanted, and end the present segment."""
        with self.changed:
            change(self)
        self.interrupt_segment()

    def aim(self, target: int) -> None:
        """Want a number of workers from now on."""
        self.target, self.asked_at = target, self._clock()

    def interrupt_segment(self) -> None:
        """End the present segment, so that the run loop looks here."""
        with self.changed:
            self.number += 1
            number = self.number
            self.changed.notify_all()
        self.interrupt(number)
