"""The thread of a panel, which looks at its run a few times a second."""

from __future__ import annotations

import threading
from collections.abc import Callable

from parakit.system.threads import yield_to_others

__all__ = ["JOIN_SECONDS", "Watcher"]

#: That a thread, or the end of a run, is waited for.
JOIN_SECONDS = 10.0


class Watcher:
    """Looks until there is nothing more to see, or until it is told to leave.

    Parameters
    ----------
    look : callable
        Returns the seconds until the next look; None if there is nothing more to see.
    end : callable
        Called then, in the same thread, unless it was told to leave.
    pace_seconds : float
        Until the first look.
    """

    def __init__(self, look: Callable[[], float | None], end: Callable[[], None], pace_seconds: float) -> None:
        self._look, self._end, self._pace_seconds = look, end, pace_seconds
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="parakit-panel", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def leave(self) -> None:
        """Look no more; from another thread, wait until the present look is over."""
        self._leaving.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _watch(self) -> None:
        yield_to_others()
        pace: float | None = self._pace_seconds
        while pace is not None and not self._leaving.wait(pace):
            pace = self._look()
        if not self._leaving.is_set():
            self._end()
