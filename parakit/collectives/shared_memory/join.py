"""How the members of a group come to map one segment: a short exchange of notes on the generation's board.

Rank 0 makes the segment and says where it is; each other one attaches it and says so, or what kept it from that; rank
0 says how it went. From then on nobody can attach. All members draw the same conclusion, so that all can form another
kind of group on the same board.
"""

from __future__ import annotations

from collections.abc import Callable

from parakit.collectives.base import Board, GroupBroken
from parakit.errors import StaleGeneration
from parakit.system.shared_memory import CannotShare, Segment, SegmentKey

__all__ = ["join"]

_SEGMENT, _VERDICT = "shared-segment", "shared-verdict"
_GOOD, _BAD = b"+", b"-"


def join(
    board: Board,
    rank: int,
    size: int,
    limit_seconds: float,
    make: Callable[[], Segment],
    enter: Callable[[Segment], None],
) -> Segment:
    """Map the segment of a generation.

    Parameters
    ----------
    board : Board
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
    joining = _Joining(board, limit_seconds, make, enter)
    try:
        return joining.lead(size) if rank == 0 else joining.come(rank)
    except (CannotShare, StaleGeneration):
        raise
    except (RuntimeError, OSError) as error:  # of the board: its keeper died, or a note did not come
        raise GroupBroken(
            f"The group of {size} workers in shared memory was not formed within {limit_seconds:g} s: {error}",
            cause="a worker died while it was joining",
        ) from error


class _Joining:
    def __init__(
        self, board: Board, limit_seconds: float, make: Callable[[], Segment], enter: Callable[[Segment], None]
    ) -> None:
        self._board, self._limit = board, limit_seconds
        self._make, self._enter = make, enter

    def lead(self, size: int) -> Segment:
        try:
            segment = self._make()
        except CannotShare as error:
            self._board.put(_SEGMENT, _BAD + str(error).encode())
            raise
        try:
            self._enter(segment)
            self._board.put(_SEGMENT, _GOOD + segment.key.note())
            told = [self._board.take(f"shared-{rank}", self._limit) for rank in range(1, size)]
            verdict = next((note for note in told if not note.startswith(_GOOD)), _GOOD)
            self._board.put(_VERDICT, verdict)
        finally:
            segment.hide()
        _content(verdict)
        return segment

    def come(self, rank: int) -> Segment:
        key = SegmentKey.of_note(_content(self._board.take(_SEGMENT, self._limit)))
        try:
            segment, note = self._attach(key)
            self._board.put(f"shared-{rank}", note)
            _content(self._board.take(_VERDICT, self._limit))  # also of one's own failure: it may be a death of rank 0
        except BaseException:
            key.remove()  # nobody else may be left to do it
            raise
        assert segment is not None
        return segment

    def _attach(self, key: SegmentKey) -> tuple[Segment | None, bytes]:
        try:
            segment = Segment.attach(key)
            self._enter(segment)
        except CannotShare as error:
            return None, _BAD + str(error).encode()
        return segment, _GOOD


def _content(note: bytes) -> bytes:
    if note.startswith(_GOOD):
        return note[len(_GOOD) :]
    raise CannotShare(note[len(_BAD) :].decode())
