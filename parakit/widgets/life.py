"""Where a panel is in its life, which goes one way."""

from __future__ import annotations

import threading
from enum import Enum

__all__ = ["Life", "Stage"]


class Stage(Enum):
    """A part of the life of a panel, by what may be asked of it there."""

    READY = "a run may be started"
    LIVE = "a run may be steered, and is watched"
    SETTLED = "nothing but a plain picture is left"


class Life:
    """The present stage; callbacks and the thread of a panel ask for it.

    Attributes
    ----------
    stage : Stage
    lock : lock
        While it is held, a panel that has widgets keeps them.
    """

    def __init__(self) -> None:
        self.stage = Stage.READY
        self.lock = threading.RLock()

    @property
    def settled(self) -> bool:
        """Whether it is over."""
        return self.stage is Stage.SETTLED

    def settle(self) -> bool:
        """End it; says whether it had not ended before."""
        with self.lock:
            first, self.stage = not self.settled, Stage.SETTLED
        return first
