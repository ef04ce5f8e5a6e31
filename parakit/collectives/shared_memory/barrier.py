"""The barrier of a group in shared memory, and how its members know that one is lost.

Each member has lines of memory that it alone writes: how many barriers it has come to, whether it has left, and who
it is. So no instruction of the processor is needed but plain stores of 8 bytes. Members who wait look at everybody's
lines; the last to come rings a futex, which is only a hint to look again. See Mellor-Crummey and Scott 1991, ACM TOCS
9(1):21, for barriers by counters that one member each writes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

from parakit.collectives.base import GroupBroken
from parakit.collectives.shared_memory.futex import fence, make_bell, pause
from parakit.system.shared_memory import LINE, SharedMemory

__all__ = ["Barrier", "barrier_nbytes"]

_WORD = 8
_WORDS = LINE // _WORD  # of a member
_ARRIVED, _LEFT, _PID, _BIRTH, _NOTES = 0, 1, 2, 3, 4
_NOTE_WORDS = _WORDS - _NOTES
_LOOK_SECONDS = 0.02  # between looks at whether the others live


def barrier_nbytes(size: int) -> int:
    """Bytes at the beginning of a segment that a barrier of this size takes, the segment's title among them."""
    return (2 + size) * LINE


class Barrier:
    """A place that nobody leaves before everybody has come.

    Parameters
    ----------
    segment : SharedMemory
        Its first `barrier_nbytes` bytes are used.
    rank, size : int
    limit_seconds : float
        The longest wait.
    spin_seconds : float
        How long to look again and again before going to sleep: being woken takes some 50 microseconds. 0 where
        members share cores, as each then takes time from the one that it waits for.
    futex : bool, optional
        See `make_bell`.
    """

    def __init__(
        self,
        segment: SharedMemory,
        rank: int,
        size: int,
        limit_seconds: float,
        *,
        spin_seconds: float = 0.0,
        futex: bool | None = None,
    ) -> None:
        self._rank, self._size = rank, size
        self._limit, self._spin = limit_seconds, spin_seconds
        self._segment = segment  # mapped for as long as somebody waits here
        self._words = segment.words()
        self._futex = make_bell(self._words, _WORDS, segment.address + LINE, futex=futex)
        lines = self._words[2 * _WORDS : (2 + size) * _WORDS]
        self._arrived, self._left, self._pid, self._birth = (lines[word::_WORDS] for word in range(_NOTES))
        self._generation = 0
        self._pid[rank], self._birth[rank] = os.getpid(), _birth(os.getpid()) or 0
        start = (2 + rank) * _WORDS + _NOTES
        self.own_notes = self._words[start : start + _NOTE_WORDS]

    def notes(self, rank: int) -> list[int]:
        """What a member wrote into its `own_notes` before a barrier that everybody has passed."""
        start = (2 + rank) * _WORDS + _NOTES
        return self._words[start : start + _NOTE_WORDS].tolist()

    def wait(self) -> None:
        """Wait until everybody has come; all that they stored before is then seen here.

        Raises
        ------
        GroupBroken
            If somebody leaves, dies, or does not come within the limit.
        """
        self._generation += 1
        fence()
        self._arrived[self._rank] = self._generation
        fence()
        if self._complete():
            self._futex.ring(self._generation)
        else:
            self._wait()
        fence()

    def leave(self) -> None:
        """Never come again: the others' waits end at once, and so does one going on in another thread."""
        self._left[self._rank] = 1
        fence()
        self._futex.ring(2**63 + self._rank)  # unlike any generation

    def _complete(self) -> bool:
        return min(self._arrived.tolist()) >= self._generation

    def _wait(self) -> None:
        began = time.monotonic()
        looked = began
        while True:
            # In this order: the futex, so that none is missed; who left, as that may be after having come.
            heard = self._futex.value
            left = self._left.tolist()
            fence()
            if self._complete():
                return
            if any(left):
                self._broken("it left the group", left.index(1))
            now = time.monotonic()
            if now < began + self._spin:
                pause()
                continue
            if now - looked >= _LOOK_SECONDS:
                self._look(now - began)
                looked = now
            self._futex.wait(heard, _LOOK_SECONDS)

    def _look(self, waited_seconds: float) -> None:
        """See to it that the missing ones are there, and that the limit has not come."""
        missing = [rank for rank, arrived in enumerate(self._arrived.tolist()) if arrived < self._generation]
        for rank in missing:
            if _birth(self._pid[rank]) != self._birth[rank] and self._arrived[rank] < self._generation:
                self._broken("it died", rank)
        if missing and waited_seconds > self._limit:
            self._broken(f"it was silent for {waited_seconds:.1f} s", missing[0])

    def _broken(self, what: str, rank: int) -> None:
        if rank == self._rank:
            raise GroupBroken("The group was closed.")
        raise GroupBroken(
            f"Worker of rank {self._rank} lost the one of rank {rank}, of {self._size}, process {self._pid[rank]}: "
            f"{what}.",
            cause="the worker was killed, ran out of memory, met an error, or hangs",
        )


def _birth(pid: int) -> int | None:
    """When a process was started, on a clock of the system's own; None if it has ended. Numbers are used again."""
    if sys.platform != "linux":
        return _birth_elsewhere(pid)
    try:
        told = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # proc_pid_stat(5): the name, in parentheses, may contain anything; the time of birth is field 22.
    state, *rest = told.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _birth_elsewhere(pid: int) -> int | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time() * 1e6)
    except psutil.Error:
        return None
