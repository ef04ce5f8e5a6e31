"""One line of progress, for people who wait in a script or a terminal."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from parakit.events import SegmentDone, StepDone

if TYPE_CHECKING:
    from parakit.run import Run

__all__ = ["in_a_notebook", "progress_line", "samples_per_second", "show_progress"]

_EVERY_SECONDS = 0.25
_WINDOW_SECONDS = 2.0


def in_a_notebook() -> bool:
    """Whether this process is a Jupyter kernel, where a line written over and over only fills the page."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def samples_per_second(run: Run, window_seconds: float = _WINDOW_SECONDS) -> float:
    """Samples that the run trained on per second of wall time, over its last segments; NaN before the first."""
    segments = run.history.of(SegmentDone)
    if not segments:
        return float("nan")
    newest = segments[-1].at_seconds
    recent = [s for s in segments if s.at_seconds >= newest - window_seconds]
    steps = run.history.steps[-sum(r.steps for r in recent) :]
    return sum(step.samples for step in steps) / max(1e-9, sum(s.seconds for s in recent))


def progress_line(run: Run) -> str:
    """Epoch, loss, samples per second, workers and time left, in one line."""
    latest = run.history.latest(StepDone)
    if latest is None:
        return "starting"
    rate = samples_per_second(run)
    left = (run.steps - run.step) * latest.samples / rate if rate > 0 else float("nan")
    many = "1 worker" if run.world_size == 1 else f"{run.world_size} workers"
    return (
        f"epoch {latest.epoch + 1}, step {run.step}/{run.steps}, loss {latest.loss:.4f}, "
        f"{rate:,.0f} samples/s, {many}, {_clock(left)} left"
    )


def _clock(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def show_progress(run: Run, ended: threading.Event, timeout: float | None) -> None:
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
