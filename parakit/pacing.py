"""Pacing: how long a segment is to be. One rule, for runs and for what predicts them."""

from __future__ import annotations

__all__ = ["SEGMENT_SECONDS", "segment_seconds"]

#: As long as a segment is where nothing speaks for more: so often there are news, and a commit.
SEGMENT_SECONDS = 0.25
_LONGEST_SECONDS = 0.4
_CONTROL_SHARE = 0.02


def segment_seconds(control_seconds: float) -> float:
    """Seconds of a segment, if its orders and commits take so many beside its steps.

    Where they would take more than 2 % of the time, a segment is longer, up to 0.4 s. A wish does not wait for
    its end.
    """
    return min(max(SEGMENT_SECONDS, control_seconds / _CONTROL_SHARE), _LONGEST_SECONDS)
