"""What a panel adds to the log of a run: sentences of its own, and which requests no person has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from parakit.errors import ParakitError
from parakit.events.summary import RunSummary
from parakit.runs.run import Run
from parakit.widgets import report

__all__ = ["Log"]


class Log:
    """The log of a summary, written by callbacks and read by the thread of a panel.

    Parameters
    ----------
    summary : RunSummary
    """

    def __init__(self, summary: RunSummary) -> None:
        self._summary = summary
        self._lock = threading.Lock()

    def say(self, text: str, run: Run | None) -> None:
        """Add a sentence, at the present time of a run."""
        now = self._summary.seconds if run is None or report.is_over(run) else run.elapsed_seconds
        with self._lock:
            self._summary.log.append((now, text))

    def html(self) -> str:
        """All that happened, the newest first."""
        with self._lock:
            return report.log_html(self._summary.log)

    @contextmanager
    def unasked(self, request: str, value: float | None) -> Iterator[None]:
        """Submit a request that no person has; the log tells it apart."""
        self._summary.unasked.append((request, value))
        try:
            yield
        except ParakitError:
            self._summary.unasked.remove((request, value))
            raise
