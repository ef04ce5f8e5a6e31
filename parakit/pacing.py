"""Pacing: how long a segment is to be. One rule, for runs and for what predicts them."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["NEWS_SECONDS", "SEGMENT_SECONDS", "Pace", "segment_seconds"]

#: As long as a segment is where nothing speaks for more: so often there are news, and a commit.
SEGMENT_SECONDS = 0.25
#: How old news should be at most, for somebody who watches.
NEWS_SECONDS = 0.4
_LONGEST_SECONDS = 0.8
_CONTROL_SHARE = 0.006
_CONTROLS = 9  # segments whose median is gone by
_GROWTH = 4  # a segment is at most this many times longer than the one before


def segment_seconds(control_seconds: float, news_seconds: float = _LONGEST_SECONDS) -> float:
    """Seconds of a segment, if its orders and commits take so many beside its steps.

    A segment is longer than usual where they would take more than 0.6 % of the time. Besides, each costs those who
    compute about twice as much by the messages that go with it, on a machine whose cores are all in use; so what is
    lost stays below 2 %. A request does not wait for the end of a segment, and a loss costs one.

    Parameters
    ----------
    control_seconds : float
    news_seconds : float
        How old news may be. No segment is longer than that, or than 0.8 s.
    """
    longest = max(SEGMENT_SECONDS, min(news_seconds, _LONGEST_SECONDS))
    return min(max(SEGMENT_SECONDS, control_seconds / _CONTROL_SHARE), longest)


class Pace:
    """How many steps make a segment."""

    def __init__(self) -> None:
        self.steps = 1
        self._step_seconds = SEGMENT_SECONDS
        self._control: deque[float] = deque(maxlen=_CONTROLS)

    def learn(self, steps: int, seconds: float, control_seconds: float, news_seconds: float) -> None:
        """Take a segment into account: its steps, their time, and that of control."""
        self._step_seconds = max(1e-6, seconds / steps)
        self._control.append(control_seconds)
        wanted = round(segment_seconds(median(self._control), news_seconds) / self._step_seconds)
        self.steps = max(1, min(wanted, _GROWTH * self.steps))

    def seconds(self, steps: int) -> float:
        """How long some steps should take."""
        return steps * self._step_seconds
