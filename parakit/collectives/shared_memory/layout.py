"""What lies where in a group's shared memory.

Behind the barrier, each member has a buffer, in which its vectors may live, and a scratch, through which vectors from
elsewhere come piece by piece; then there are the results of pieces, and what all have in common. Scratches and results
are double: one half is filled while the other is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parakit.collectives.shared_memory.barrier import barrier_nbytes
from parakit.errors import InputError
from parakit.system.shared_memory import SharedMemory

__all__ = ["MemoryLayout", "Plan"]

_PAGE = 4096
_ALIGNED = 64


class Plan(NamedTuple):
    """Sizes of a group's memory, in bytes; the same on every member.

    Parameters
    ----------
    size : int
        Number of members.
    capacity : int
        Of each member's buffer.
    common : int
        Of what all have in common.
    piece : int
        Of a vector that are under way at a time.
    """

    size: int
    capacity: int
    common: int
    piece: int

    @property
    def buffers(self) -> int:
        """Where the first member's buffer begins."""
        return _rounded(barrier_nbytes(self.size), _PAGE)

    @property
    def scratches(self) -> int:
        """Where the first member's scratch begins."""
        return self.buffers + self.size * _rounded(self.capacity, _PAGE)

    @property
    def results(self) -> int:
        """Where the results of pieces begin."""
        return self.scratches + 2 * self.size * self.piece

    @property
    def commons(self) -> int:
        """Where the common part begins."""
        return self.results + 2 * self.piece

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.commons + _rounded(self.common, _PAGE)


class MemoryLayout:
    """A group's memory, as one member sees it.

    Parameters
    ----------
    segment : SharedMemory
    plan : Plan
    rank : int
        Of this member.
    """

    def __init__(self, segment: SharedMemory, plan: Plan, rank: int) -> None:
        self._segment = segment
        self._buffer = _Room(plan.buffers + rank * _rounded(plan.capacity, _PAGE), plan.capacity, "capacity")
        self._common = _Room(plan.commons, plan.common, "common")
        self._scratches, self._results = plan.scratches, plan.results
        self.piece_bytes = plan.piece

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next part of this member's buffer."""
        return self._segment.tensor(self._buffer.take(numel * dtype.itemsize), numel, dtype)

    def common(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next part of what all have in common."""
        return self._segment.tensor(self._common.take(numel * dtype.itemsize), numel, dtype)

    def place_of(self, vector: Tensor) -> int | None:
        """Where a flat vector lies in this member's buffer; None if it does not."""
        place = vector.data_ptr() - self._segment.address
        inside = self._buffer.first <= place and place + vector.nbytes <= self._buffer.end
        return place if inside and vector.device.type == "cpu" and place % vector.itemsize == 0 else None

    def at(self, place: int, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that lies at a place."""
        return self._segment.tensor(place, numel, dtype)

    def scratch(self, rank: int, piece: int) -> int:
        """Where a member's vectors from elsewhere come through."""
        return self._scratches + (2 * rank + piece % 2) * self.piece_bytes

    def result(self, piece: int) -> int:
        """Where the sum of a piece is put together."""
        return self._results + piece % 2 * self.piece_bytes


class _Room:
    """Memory that is given out from the front, and never taken back."""

    def __init__(self, first: int, nbytes: int, name: str) -> None:
        self.first, self.end = first, first + nbytes
        self._next, self._name = first, name

    def take(self, nbytes: int) -> int:
        first = self._next
        if first + nbytes > self.end:
            raise InputError(
                f"{nbytes} bytes of shared memory were asked for, and {self.end - first} are left.",
                remedy=f"give the group more `{self._name}` when it is formed",
            )
        self._next = first + _rounded(nbytes, _ALIGNED)
        return first


def _rounded(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to
