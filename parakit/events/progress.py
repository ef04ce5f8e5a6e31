"""Progress in words: one line for people who wait in a script or a terminal."""

from __future__ import annotations

import sys
import threading
import time
from typing import Protocol

from parakit.events.history import History
from parakit.events.records import SegmentDone, StepDone
from parakit.formatting import clock, many, three_digits

__all__ = ["Running", "progress_line", "samples_per_second", "show_progress"]

_EVERY_SECONDS = 0.25
_WINDOW_SECONDS = 2.0


class Running(Protocol):
    """As much of a run as progress is read from."""

    @property
    def status(self) -> str:
        """What it is doing."""

    @property
    def step(self) -> int:
        """Committed steps."""

    @property
    def steps(self) -> int:
        """Of the whole run."""

    @property
    def world_size(self) -> int:
        """Active workers."""

    @property
    def history(self) -> History:
        """The events so far."""


def samples_per_second(run: Running, window_seconds: float = _WINDOW_SECONDS) -> float:
    """Samples that the run trained on per second of wall time, over its last segments.

    Only segments at the present worker count are counted; NaN until there is one.
    """
    newest = run.history.latest(SegmentDone)
    if newest is None or newest.world_size != run.world_size:
        return float("nan")
    late = run.history.newer(SegmentDone, newest.at_seconds - window_seconds)
    recent = [segment for segment in late if segment.world_size == newest.world_size]
    return sum(segment.samples for segment in recent) / max(1e-9, sum(segment.seconds for segment in recent))


def progress_line(run: Running, efficiency: float | None = None, *, workers: bool = True) -> str:
    """Epoch, loss, samples per second, workers and time left, in one line.

    Parameters
    ----------
    run : Run
    efficiency : float, optional
        From 0 to 1, shown as per cent where it is known.
    workers : bool
        Whether to count the workers: not where that stands above, and the line has to fit into a narrow page.
    """
    latest = run.history.latest(StepDone)
    if latest is None:
        return "starting"
    rate = samples_per_second(run)
    left = (run.steps - run.step) * latest.samples / rate if rate > 0 else float("nan")
    speed = f"{three_digits(rate) if rate == rate else '?'} samples/s"
    share = "" if efficiency is None else f", efficiency {100 * efficiency:.0f} %"
    count = f", {many(run.world_size, 'worker')}" if workers else ""
    return (
        f"epoch {latest.epoch + 1:,}, step {run.step:,}/{run.steps:,}, loss {latest.loss:.4f}, "
        f"{speed}{share}{count}, {clock(left)} left"
    )


def show_progress(run: Running, ended: threading.Event, timeout: float | None) -> None:
    """Show the line until the run ends or the time is up: rewritten in place on a terminal, else once at the end."""
    live = sys.stderr.isatty()
    deadline = None if timeout is None else time.monotonic() + timeout
    width = 0
    while not ended.is_set() and (deadline is None or time.monotonic() < deadline):
        left = _EVERY_SECONDS if deadline is None else min(_EVERY_SECONDS, max(0.0, deadline - time.monotonic()))
        ended.wait(left)
        if live:
            line = progress_line(run)
            sys.stderr.write("\r" + line.ljust(width))
            sys.stderr.flush()
            width = len(line)
    sys.stderr.write(("\r" if live else "") + f"{run.status}: {progress_line(run)}".ljust(width) + "\n")
    sys.stderr.flush()
