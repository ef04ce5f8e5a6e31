"""When a panel has plain PyTorch timed again, after the first time."""

from __future__ import annotations

from parakit.events.summary import RunSummary

__all__ = ["BaselineSchedule"]

_TRIES, _EVERY_SECONDS = 3, 6.0


class BaselineSchedule:
    """Pure: says when, and measures nothing.

    Threads of plain PyTorch wait for each other busily, so whatever else the machine does, such as starting workers,
    slows it down many times over. It is timed again after an itinerary, and while its quartiles lie far apart.
    """

    def __init__(self) -> None:
        self._tries = 0  # beyond the first

    def due(self, summary: RunSummary, *, came_home: bool) -> bool:
        """Whether to time it now; a time that is due is taken to be used.

        Parameters
        ----------
        summary : RunSummary
        came_home : bool
            Whether an itinerary has just ended.
        """
        if summary.plain is None or self._tries >= _TRIES:
            return False
        late_enough = summary.seconds > (1 + self._tries) * _EVERY_SECONDS
        due = came_home or (summary.uncertain and late_enough)
        self._tries += due
        return due
