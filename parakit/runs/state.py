"""What a run's next action depends on: where the run stands, what is wanted of it, and who is in its group.

Plain values, frozen, so that any situation can be written down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Copied", "Goals", "GroupState", "Growth", "RunState", "Segment", "Staged"]


@dataclass(frozen=True)
class Segment:
    """Some steps that were ordered in one go."""

    first: int
    count: int
    number: int  # of the newest request that was known then; a higher one ends it early
    ordered_at: float = 0.0  # seconds since the start of the run, as all moments that are not said to be others

    @property
    def end(self) -> int:
        """The step after its last."""
        return self.first + self.count


@dataclass(frozen=True)
class Copied:
    """The state on the notebook's side: of which step it is, and when a newer one and a checkpoint are due."""

    step: int = -1  # if there is none yet
    fetch_at: float = 0.0
    save_at: float = math.inf  # if nothing is saved

    def due(self, now: float) -> bool:
        """Whether it is time for a newer one."""
        return now >= min(self.fetch_at, self.save_at)


@dataclass(frozen=True)
class RunState:
    """Where a run stands."""

    steps: int  # of the whole run
    steps_per_epoch: int
    validates: bool = False  # whether each epoch ends with an evaluation
    step: int = 0  # committed steps
    epochs: int = 0  # that were closed
    ordered: tuple[Segment, ...] = ()  # without a report; the first one is going on
    paused: bool = False  # whether it stands still
    reported: bool = False  # whether a report came since somebody last looked after the copy
    segment_steps: int = 1  # that make a segment at present
    copied: Copied = Copied()


@dataclass(frozen=True)
class Goals:
    """What is wanted of a run."""

    target: int  # workers
    asked_at: float = 0.0  # for the target, by the clock of the pool
    paused: bool = False
    stopping: bool = False
    rate: float | None = None  # a learning rate to go on at, until it is granted
    measuring: bool = False  # plain PyTorch, until that is done
    number: int = 0  # counts requests; a segment ordered under a number is ended by a higher one


@dataclass(frozen=True)
class Staged:
    """A group that is being staged."""

    target: int  # the worker count that it was staged for; those who are there may be fewer
    members: tuple[str, ...]
    since: float
    ready: bool = False  # whether its members have what they need, or cannot get it
    error: str = ""  # why not
    lost: bool = False  # whether that is the loss of a worker


@dataclass(frozen=True)
class Growth:
    """How many workers the cluster was asked for, and when."""

    target: int
    since: float


@dataclass(frozen=True)
class GroupState:
    """Who is in a run's group, and what is under way to change that."""

    members: tuple[str, ...]  # the active workers; before there is a group, those to begin with
    there: tuple[str, ...] = ()  # all workers of the pool, where the group is not the one that is wanted
    formed: bool = True  # whether the members can be spoken to as a group
    recovering: bool = False  # whether they cannot since a loss
    staged: Staged | None = None
    growth: Growth | None = None
    fruitless: int = 0  # losses in a row without a segment between them
    in_vain: int = 0  # changes in a row of which somebody was lost before they took place
    vain_at: float = -math.inf  # when the last of them was
    looked_at: float = 0.0  # when a paused run last looked whether everybody is there
    lost_at: float = -math.inf  # when somebody was last lost, by the clock of the pool
    patience: float = 40.0  # seconds that staging may take
    orders_ahead: bool = True  # whether an order can be given while another has no report
