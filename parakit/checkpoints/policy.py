"""When a member of a group keeps its state, and where: by itself, where the driver can reach it, or not at all."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from parakit.checkpoints.in_memory import InMemorySnapshots
from parakit.checkpoints.in_shared_memory import Room, SharedMemorySnapshots, SnapshotsKey
from parakit.checkpoints.state import Snapshots, State
from parakit.system.malloc import return_free_memory

__all__ = ["SnapshotPolicy"]

_COMMITS = 2  # that a member keeps: the driver may be one segment behind


class HasState(Protocol):
    """Who has the state that is kept."""

    @property
    def whole(self) -> bool:
        """Whether it is that of the run, and not a part of it."""

    @property
    def room(self) -> Room:
        """What states will take, as far as can be foreseen."""

    def live_state(self) -> State:
        """The present one."""

    def commit_to(self, commits: Snapshots) -> None:
        """Keep commits there."""

    def commit(self) -> float:
        """Keep the present state; says how many seconds that took."""

    def go_on(self) -> None:
        """Do without."""


class SnapshotPolicy:
    """When a member keeps its state, and where.

    A group keeps states as a segment begins, when all of its members have come that far. A member alone knows that as
    the segment ends, and nobody else has what it did: it commits then, where it has shared snapshots. Where the driver
    holds on to those of rank 0, the others need no commits.

    Parameters
    ----------
    owner : HasState
    """

    def __init__(self, owner: HasState) -> None:
        self._owner = owner
        self._shared: SharedMemorySnapshots | None = None
        self._alone = True
        self._room = Room(0, 0)  # for a state in the snapshots of rank 0
        self._unsettled = 0  # segments in which that may move
        self._keep_privately()

    def _keep_privately(self) -> None:
        self._private = InMemorySnapshots(_COMMITS)
        self._owner.commit_to(self._private)

    @property
    def key(self) -> SnapshotsKey | None:
        """Where the commits are, if others can reach them."""
        return None if self._shared is None else self._shared.key

    def begin_generation(self, *, shared: bool, alone: bool) -> None:
        """Keep commits where others can reach them from now on, or in this process's own memory.

        The driver may still be where a segment began that this member has finished, and the one after it too. A group
        keeps a state as a segment begins, so there are two; a member alone keeps one more.
        """
        self._alone = alone
        self._room, self._unsettled = self._owner.room, 0
        shared = shared and self._owner.whole
        places = _COMMITS + alone
        if shared and (self._shared is None or self._shared.places != places):
            with suppress(OSError):
                snapshots = SharedMemorySnapshots(self._owner.live_state(), places, self._owner.room)
                self.close()
                self._shared = snapshots
                self._owner.commit_to(snapshots)
        elif not shared and self._shared is not None:
            self._keep_privately()
            self.close()

    def begin_segment(self, *, covered: bool) -> float:
        """Commit, or leave it to rank 0, whose snapshots the driver holds on to; says how many seconds that took.

        Shared snapshots get new memory when a state outgrows theirs, as with an optimizer that keeps much. The driver
        finds that with the report of the segment, and the next one may have been ordered before. So for two segments
        everybody commits; all members see that it is so, as all have the same state.
        """
        if not covered or self._shared is not None:
            return self._owner.commit()
        needed = Room.of(self._owner.live_state())
        if not self._room.holds(needed):
            self._room, self._unsettled = needed.grown(), _COMMITS
        if self._unsettled:
            self._unsettled -= 1
            return self._owner.commit()
        if self._private.give_up():
            return_free_memory()
        self._owner.go_on()
        return 0.0

    def commit_if_alone(self) -> float:
        """Commit what nobody else has, where others can reach it; says how many seconds that took."""
        return self._owner.commit() if self._alone and self._shared is not None else 0.0

    def close(self) -> None:
        """Let nobody open the snapshots any more."""
        snapshots, self._shared = self._shared, None
        if snapshots is not None:
            snapshots.close()
