"""Requests: what the user wants of a run, submitted in any thread and granted between segments."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parakit.runs.state import Goals

__all__ = ["Requests"]


class Requests:
    """What the user wants, submitted in any thread and granted by the run loop.

    Parameters
    ----------
    target : int
        Workers wanted.
    clock : callable
        Tells the time of the run's pool.
    rate : float, optional
        A learning rate to begin with.
    """

    def __init__(self, target: int, clock: Callable[[], float] = time.perf_counter, rate: float | None = None) -> None:
        self._clock = clock
        self.changed = threading.Condition()
        #: What is wanted at present; replaced as a whole.
        self.goals = Goals(target, clock(), rate=rate)
        #: How old news may be, for whoever watches.
        self.news_seconds = math.inf
        self.interrupt: Callable[[int], None] = lambda _: None

    def submit(self, **goals: Any) -> None:
        """Want something else from now on, and end the present segment."""
        if "target" in goals:
            goals["asked_at"] = self._clock()
        with self.changed:
            self.goals = replace(self.goals, **goals)
        self.interrupt_segment()

    def settle(self, name: str, granted: Any, then: Any) -> None:
        """Put something else in the place of a goal that was granted or given up, unless it is another one by now."""
        with self.changed:
            if getattr(self.goals, name) == granted:
                self.goals = replace(self.goals, **{name: then})

    def interrupt_segment(self) -> None:
        """End the present segment, so that the run loop looks here."""
        with self.changed:
            self.goals = replace(self.goals, number=self.goals.number + 1)
            number = self.goals.number
            self.changed.notify_all()
        self.interrupt(number)

    def wait(self, number: int, seconds: float) -> None:
        """Wait until requests have another number, or the time is up."""
        with self.changed:
            self.changed.wait_for(lambda: self.goals.number != number, seconds)
