"""An experiment: everything that is compared is visited in blocks, once in each, until the order or the time ends.

Owns the order, the clock, what each visit brought and how an experiment ends: complete, out of time, interrupted or
failed. What was measured by then is kept; an error goes on only where that is nothing. Refuses to choose what is
compared, and to sum up. `parakit.sweep` and `parakit.advise` are experiments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from parakit.baselines.measure import PlainArm
from parakit.errors import ParakitError, RunError, Unreachable
from parakit.formatting import many
from parakit.scaling.experiments.arms import Arm
from parakit.scaling.experiments.progress_bar import Ticker
from parakit.scaling.experiments.schedule import blocks
from parakit.scaling.study.records import Measurement
from parakit.workers.pool import Workers

__all__ = ["Clock", "Experiment", "Place", "check_free"]


class Place(Protocol):
    """What is visited: workers with some threads each, or plain PyTorch (no workers); its text names it."""

    @property
    def workers(self) -> int:
        """Number of workers."""

    @property
    def threads(self) -> int:
        """Of each process."""

    def __hash__(self) -> int: ...


P = TypeVar("P", bound=Place)


class Clock:
    """Time since the start of an experiment, and how much of it there is.

    Parameters
    ----------
    now : callable
        Seconds; only differences matter.
    seconds : float
        That an experiment may take, but for its first block.
    first_seconds : float
        That the first block may take.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, seconds: float = math.inf, first_seconds: float = math.inf
    ) -> None:
        self._now = now
        self._seconds, self._first_seconds = seconds, first_seconds
        self._began = 0.0

    def start(self) -> None:
        """The experiment begins."""
        self._began = self._now()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._began

    def left(self) -> float:
        """Seconds that a visit of the first block may still take; one at least."""
        return max(1.0, self._first_seconds - self.elapsed())

    def over(self, block: int) -> bool:
        """Whether there is no time for another visit of a block."""
        return self.elapsed() > (self._seconds if block else self._first_seconds)


@dataclass
class Experiment(Generic[P]):
    """Arms that are visited, and what came of it so far.

    Parameters
    ----------
    arm : Arm
        Trains with workers.
    plain : PlainArm or None
        Trains without; None where no place has no workers.
    pool : Workers
    seconds : float
        That each visit is timed.
    batch_size : int
        Of plain PyTorch.
    cores : int
        That all places share.
    clock : Clock
    ticker : Ticker
    named : bool
        Whether what says why a place could not be measured needs the place's name before it.

    Attributes
    ----------
    found : list of Measurement
    unreachable : dict
        Why a place could not be measured; it is not visited again.
    stopped : str
        Why it ended before its order did; "" if it did not.
    """

    arm: Arm
    plain: PlainArm | None
    pool: Workers
    seconds: float
    batch_size: int
    cores: int
    clock: Clock
    ticker: Ticker
    named: bool = False
    found: list[Measurement] = field(default_factory=list)
    unreachable: dict[P, str] = field(default_factory=dict)
    stopped: str = ""

    def run(self, places: Sequence[P], repeats: int, seed: int) -> None:
        """Visit all places in blocks.

        Raises
        ------
        RunError
            If nothing could be measured.
        """
        try:
            self.clock.start()
            for block, place in blocks(places, repeats, seed):
                if self.clock.over(block):
                    self._note_unvisited(places)
                    break
                self.ticker.show(str(place))
                self._visit(block, place)
                self.ticker.tick()
            if not self.found:
                cause = " ".join(self.unreachable.values()) or self.stopped
                raise RunError("Nothing could be measured.", cause=cause)
        except KeyboardInterrupt:
            self._give_up("interrupted.")
        except ParakitError as error:
            self._give_up(str(error).splitlines()[0])
        finally:
            self.arm.close()

    @property
    def summary(self) -> str:
        """How much was measured, in words."""
        return f"{many(len(self.found), 'measurement')} made"

    def _give_up(self, why: str) -> None:
        """End with what there is; where there is nothing, let the error go on."""
        self.stopped = why
        if not self.found:
            raise

    def _note_unvisited(self, places: Sequence[P]) -> None:
        known = {(m.workers, m.threads) for m in self.found}
        missing = [p for p in places if (p.workers, p.threads) not in known and p not in self.unreachable]
        if missing:
            self.stopped = f"there was no time for {'; '.join(map(str, missing))}."

    def _visit(self, block: int, place: P) -> None:
        if place in self.unreachable:
            return
        try:
            self.found.append(self._measure(block, place))
        except Unreachable as error:
            self.unreachable[place] = f"{place}: " * self.named + str(error).splitlines()[0]

    def _measure(self, block: int, place: P) -> Measurement:
        if place.workers:
            timed = self.arm.visit(place.workers, self.seconds, place.threads)
            parts = timed.rate, timed.step_seconds, len(timed.steps), timed.seconds, timed.breakdown()
        else:
            parts = self._time_plain(place.threads)
        before = sum((m.workers, m.threads) == (place.workers, place.threads) for m in self.found)
        return Measurement(
            place.workers, before, block, *parts, self.clock.elapsed(), "workers" if place.workers else "plain",
            place.threads, self.cores, self.pool.simulated,
        )  # fmt: skip

    def _time_plain(self, threads: int) -> tuple[float, float, int, float, tuple[float, ...]]:
        """Rate, median of a step, steps, seconds and no phases."""
        assert self.plain is not None
        self.arm.rest()
        spent = [self.batch_size / rate for rate in self.plain.visit(threads).rates]
        seconds = sum(spent)  # and not the median of a step, as hiccups count at workers too
        return self.batch_size * len(spent) / seconds, float(np.median(spent)), len(spent), seconds, ()


def check_free(pool: Workers, what: str) -> None:
    """Refuse a pool on which a run is going on, before anything is measured there."""
    pool.hold(what, lambda: None)
    pool.free(what)
