"""How the members of a group come to map one segment: a short exchange of notes on the generation's store.

Rank 0 makes the segment and says where it is; each other one attaches it and says so, or what kept it from that; rank
0 says how it went. From then on nobody can attach. All members draw the same conclusion, so that all can form another
kind of group on the same store.
"""

from __future__ import annotations

from collections.abc import Callable

from parakit.collectives.base import GroupBroken, Store
from parakit.errors import StaleGeneration
from parakit.system.shared_memory import CannotShare, SharedMemory, SharedMemoryKey

__all__ = ["join"]

_SEGMENT, _VERDICT = "shared-segment", "shared-verdict"
_GOOD, _BAD = b"+", b"-"


def join(
    store: Store,
    rank: int,
    size: int,
    limit_seconds: float,
    make: Callable[[], SharedMemory],
    enter: Callable[[SharedMemory], None],
) -> SharedMemory:
    """Map the segment of a generation.

    Parameters
    ----------
    store : Store
    rank, size : int
    limit_seconds : float
        For each note of another member.
    make : callable
        Makes the segment; called on rank 0.
    enter : callable
        Called with the segment on every member, before the others are told that it is there.

    Raises
    ------
    CannotShare
        On all members, if one of them cannot reach the segment.
    GroupBroken
        If a note does not come.
    """
    joining = _Joining(store, limit_seconds, make, enter)
    try:
        return joining.lead(size) if rank == 0 else joining.come(rank)
    except (CannotShare, StaleGeneration):
        raise
    except (RuntimeError, OSError) as error:  # of the store: its keeper died, or a note did not come
        raise GroupBroken(
            f"The group of {size} workers in shared memory was not formed within {limit_seconds:g} s: {error}",
            cause="a worker died while it was joining",
        ) from error


class _Joining:
    def __init__(
        self,
        store: Store,
        limit_seconds: float,
        make: Callable[[], SharedMemory],
        enter: Callable[[SharedMemory], None],
    ) -> None:
        self._store, self._limit = store, limit_seconds
        self._make, self._enter = make, enter

    def lead(self, size: int) -> SharedMemory:
        try:
            segment = self._make()
        except CannotShare as error:
            self._store.set(_SEGMENT, _BAD + str(error).encode())
            raise
        try:
            self._enter(segment)
            self._store.set(_SEGMENT, _GOOD + segment.key.note())
            told = [self._store.get(f"shared-{rank}", self._limit) for rank in range(1, size)]
            verdict = next((note for note in told if not note.startswith(_GOOD)), _GOOD)
            self._store.set(_VERDICT, verdict)
        finally:
            segment.hide()
        _content(verdict)
        return segment

    def come(self, rank: int) -> SharedMemory:
        key = SharedMemoryKey.of_note(_content(self._store.get(_SEGMENT, self._limit)))
        try:
            segment, note = self._attach(key)
            self._store.set(f"shared-{rank}", note)
            _content(self._store.get(_VERDICT, self._limit))  # also of one's own failure: it may be a death of rank 0
        except BaseException:
            key.remove()  # nobody else may be left to do it
            raise
        assert segment is not None
        return segment

    def _attach(self, key: SharedMemoryKey) -> tuple[SharedMemory | None, bytes]:
        try:
            segment = SharedMemory.attach(key)
            self._enter(segment)
        except CannotShare as error:
            return None, _BAD + str(error).encode()
        return segment, _GOOD


def _content(note: bytes) -> bytes:
    if note.startswith(_GOOD):
        return note[len(_GOOD) :]
    raise CannotShare(note[len(_BAD) :].decode())
