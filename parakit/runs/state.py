"""What a run's next action depends on: where the run stands, what is wanted of it, and who is in its group.

Plain values, frozen, so that any situation can be written down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Copied", "Goals", "GroupState", "Growth", "RunState", "Segment", "Staged"]


@dataclass(frozen=True)
class Segment:
    """Some steps that were ordered in one go.

    Parameters
    ----------
    first, count : int
    number : int
        Of the newest request that was known when it was ordered; a higher one ends it early.
    ordered_at : float
        Seconds since the start of the run.
    """

    first: int
    count: int
    number: int
    ordered_at: float = 0.0

    @property
    def end(self) -> int:
        """The step after its last."""
        return self.first + self.count


@dataclass(frozen=True)
class Copied:
    """The state on the notebook's side: of which step it is, and when a newer one and a checkpoint are due.

    Parameters
    ----------
    step : int
        -1 if there is none yet.
    fetch_at, save_at : float
        Seconds since the start of the run; infinite for what is never due.
    """

    step: int = -1
    fetch_at: float = 0.0
    save_at: float = math.inf

    def due(self, now: float) -> bool:
        """Whether it is time for a newer one."""
        return now >= min(self.fetch_at, self.save_at)


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Parameters
    ----------
    steps, steps_per_epoch : int
        Of the whole run, and of an epoch.
    validates : bool
        Whether each epoch ends with an evaluation.
    step : int
        Committed steps.
    epochs : int
        That were closed.
    ordered : tuple of Segment
        Those without a report, the one that is going on first.
    paused : bool
        Whether it stands still.
    reported : bool
        Whether a report came since somebody last looked after the copy.
    segment_steps : int
        How many steps make a segment at present.
    copied : Copied
    """

    steps: int
    steps_per_epoch: int
    validates: bool = False
    step: int = 0
    epochs: int = 0
    ordered: tuple[Segment, ...] = ()
    paused: bool = False
    reported: bool = False
    segment_steps: int = 1
    copied: Copied = Copied()


@dataclass(frozen=True)
class Goals:
    """What is wanted of a run.

    Parameters
    ----------
    target : int
        Workers.
    asked_at : float
        When the target was last asked for, by the clock of the pool.
    paused, stopping : bool
    rate : float or None
        A learning rate to go on at, until it is granted.
    measuring : bool
        Whether plain PyTorch is to be measured, until it is.
    number : int
        Counts requests; a segment ordered under a number is ended by a higher one.
    """

    target: int
    asked_at: float = 0.0
    paused: bool = False
    stopping: bool = False
    rate: float | None = None
    measuring: bool = False
    number: int = 0


@dataclass(frozen=True)
class Staged:
    """A group that is being staged.

    Parameters
    ----------
    target : int
        The worker count that it was staged for; those who are there may be fewer.
    members : tuple of str
    since : float
        Seconds since the start of the run.
    ready : bool
        Whether its members have what they need, or cannot get it.
    error : str
        Why not; empty if all is well.
    lost : bool
        Whether that is the loss of a worker.
    """

    target: int
    members: tuple[str, ...]
    since: float
    ready: bool = False
    error: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Growth:
    """How many workers the cluster was asked for, and when."""

    target: int
    since: float


@dataclass(frozen=True)
class GroupState:
    """Who is in a run's group, and what is under way to change that.

    Parameters
    ----------
    members : tuple of str
        The active workers; before there is a group, those to begin with.
    there : tuple of str
        All workers of the pool, where that matters: without a group, or without the one that is wanted.
    formed : bool
        Whether the members are a group that can be spoken to.
    recovering : bool
        Whether that is so for a loss.
    staged : Staged or None
    growth : Growth or None
    fruitless : int
        Losses in a row without a segment between them.
    in_vain : int
        Changes in a row of which somebody was lost before they took place, the last of them `vain_at`.
    vain_at, looked_at : float
        Seconds since the start of the run; the second is when a paused run last looked whether everybody is there.
    lost_at : float
        When somebody was last lost, by the clock of the pool.
    patience : float
        Seconds that staging may take.
    orders_ahead : bool
        Whether its session takes an order while another has no report.
    """

    members: tuple[str, ...]
    there: tuple[str, ...] = ()
    formed: bool = True
    recovering: bool = False
    staged: Staged | None = None
    growth: Growth | None = None
    fruitless: int = 0
    in_vain: int = 0
    vain_at: float = -math.inf
    looked_at: float = 0.0
    lost_at: float = -math.inf
    patience: float = 40.0
    orders_ahead: bool = True
