"""What the members of a group do together in memory that they share: sums by slices, whole or in part, and a broadcast.

Each member adds up its own slice of everybody's vector, always in the order of ranks, so the result has the same bits
on every member, and is what a plain loop over the ranks gives. This is a reduce-scatter followed by an all-gather
(Thakur, Rabenseifner and Gropp 2005, IJHPCA 19(1):49) in which sending is reading. `reduce_scatter` is the first half
alone: who keeps parameters in memory that all map updates its own slice of them there, and needs no second half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parakit.collectives.base import GroupBroken, Summed
from parakit.collectives.shared_memory.barrier import Barrier
from parakit.collectives.shared_memory.layout import MemoryLayout
from parakit.errors import InputError

__all__ = ["Operations", "cut", "flat_of"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_KINDS = tuple(f"of {dtype}{how}" for how in ("", " in slices") for dtype in _DTYPES)
_LINE_ELEMENTS = 64  # a slice begins at a multiple, so that no two members write to one cache line
_BLOCK_BYTES = 1 << 17
_NOTE = 3  # words: elements, type and place of a vector


@dataclass(frozen=True)
class _Slices:
    """A member's slice of every member's vector, by rank, and what is behind the slices."""

    key: tuple[tuple[int, ...], int, int, torch.dtype]
    where: slice
    slices: list[Tensor]
    tails: list[Tensor]


@dataclass
class Operations:
    """What a member of an open group works with. An operation that goes on when the group is closed keeps it."""

    layout: MemoryLayout
    barrier: Barrier
    rank: int
    size: int
    _operations: int = 0
    _unsettled: bool = False
    _known: _Slices | None = None

    def pass_barrier(self) -> None:
        """Wait for all members; from then on nobody reads what this one gave to be summed by slices."""
        self._unsettled = False
        self.barrier.wait()

    def all_reduce(self, flat: Tensor) -> None:
        """Replace a vector by the sum of every member's, piece by piece."""
        place = self.layout.place_of(flat)
        pieces = flat.split(self.layout.piece_bytes // flat.itemsize)
        self._announce(flat, place)
        if place is None:
            self._bring(pieces[0], 0)
        self.barrier.wait()
        places = self._places()
        for number, piece in enumerate(pieces):
            self._sum_piece(number, piece, places)
            if place is None and number + 1 < len(pieces):
                self._bring(pieces[number + 1], number + 1)
            # Behind it, the sum is whole, and nobody reads any more what it is a sum of.
            self.barrier.wait()
            piece.copy_(self.layout.at(self.layout.result(number), piece.numel(), piece.dtype))

    def broadcast(self, flat: Tensor) -> None:
        """Replace a vector by that of rank 0."""
        self._announce(flat, None)
        self.barrier.wait()
        self._places()  # which says so if the vectors differ
        for number, piece in enumerate(flat.split(self.layout.piece_bytes // flat.itemsize)):
            place = self.layout.at(self.layout.result(number), piece.numel(), piece.dtype)
            if self.rank == 0:
                place.copy_(piece)
            self.barrier.wait()  # behind it, everybody has read the piece before, whose place is the next one's
            if self.rank != 0:
                piece.copy_(place)

    def reduce_scatter(self, flat: Tensor, body: int, own: Sequence[Tensor] | None) -> Summed:
        """Replace this member's slice of the first `body` elements by the sum of every member's, and sum the rest."""
        self._announce(flat, self.layout.place_of(flat), slices=True)
        self.barrier.wait()
        seen = self._slices_at(self._places(), flat.numel(), body, flat.dtype)
        if own is None:
            pieces = [seen.slices[self.rank]]
            self._add_in_place(seen.slices)
        else:
            pieces = list(own)
            lengths = [piece.numel() for piece in pieces]
            for piece, *parts in zip(pieces, *(part.split(lengths) for part in seen.slices), strict=True):
                self._add_in_place([piece if rank == self.rank else part for rank, part in enumerate(parts)])
        tail = torch.empty_like(seen.tails[0])
        _add(seen.tails, tail)
        self._unsettled = True
        return Summed(seen.where, pieces, tail)

    def _slices_at(self, places: list[int], numel: int, body: int, dtype: torch.dtype) -> _Slices:
        """What `_Slices` says of vectors that lie at some places; of those of the last step it is known."""
        key = (tuple(places), numel, body, dtype)
        if self._known is None or self._known.key != key:
            where = cut(body, self.size)[self.rank]
            vectors = [self.layout.at(place, numel, dtype) for place in places]
            slices, tails = [vector[where] for vector in vectors], [vector[body:] for vector in vectors]
            self._known = _Slices(key, where, slices, tails)
        return self._known

    def _announce(self, flat: Tensor, place: int | None, *, slices: bool = False) -> None:
        """Tell the others, who read it behind the next barrier, what this member adds."""
        if self._unsettled:
            self.pass_barrier()
        self._operations += 1
        first = self._first_note()
        kind = _DTYPES.index(flat.dtype) + (len(_DTYPES) if slices else 0)
        for word, value in enumerate((flat.numel(), kind, place or 0)):
            self.barrier.own_notes[first + word] = value

    def _first_note(self) -> int:
        # Two by turns: a member may announce its next operation before another has read about this one.
        return self._operations % 2 * _NOTE

    def _places(self) -> list[int]:
        """Where the vectors of all members lie, by rank; 0 for one that comes through the scratch."""
        first = self._first_note()
        notes = [self.barrier.notes(rank)[first : first + _NOTE] for rank in range(self.size)]
        kinds = [(numel, kind) for numel, kind, _ in notes]
        if len(set(kinds)) > 1:
            listed = ", ".join(f"{numel} {_KINDS[kind]}" for numel, kind in kinds)
            raise GroupBroken(f"The members add vectors that differ; by rank, they have these elements: {listed}.")
        return [place for _, _, place in notes]

    def _bring(self, piece: Tensor, number: int) -> None:
        self.layout.at(self.layout.scratch(self.rank, number), piece.numel(), piece.dtype).copy_(piece)

    def _sum_piece(self, number: int, piece: Tensor, places: list[int]) -> None:
        """Put this member's slice of a piece's sum where all find it."""
        where = cut(piece.numel(), self.size)[self.rank]
        numel, offset = where.stop - where.start, where.start * piece.itemsize
        begin = number * self.layout.piece_bytes
        firsts = [place + begin if place else self.layout.scratch(rank, number) for rank, place in enumerate(places)]
        parts = [self.layout.at(first + offset, numel, piece.dtype) for first in firsts]
        _add(parts, self.layout.at(self.layout.result(number) + offset, numel, piece.dtype))

    def _add_in_place(self, parts: list[Tensor]) -> None:
        """Replace this member's part by the sum of all, in the order of ranks."""
        own = parts[self.rank]
        if self.size <= 2:
            _add(parts, own)
            return
        # In the cache, because an own part that stands late in the order must stay until it is its turn.
        block = min(_BLOCK_BYTES, self.layout.piece_bytes) // own.itemsize
        held = self.layout.at(self.layout.scratch(self.rank, 0), block, own.dtype)
        for pieces in zip(*(part.split(block) for part in parts), strict=True):
            total = held[: pieces[0].numel()]
            _add(pieces, total)
            pieces[self.rank].copy_(total)


def _add(parts: Sequence[Tensor], out: Tensor) -> None:
    """The sum of vectors in their order; `out` may be the first or second if there are no more."""
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


def cut(numel: int, size: int) -> list[slice]:
    """The slice of each member in a vector, by rank."""
    lines = -(-numel // _LINE_ELEMENTS)
    edges = [min(numel, lines * rank // size * _LINE_ELEMENTS) for rank in range(size + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def flat_of(vector: Tensor) -> Tensor:
    """A vector as operations take it; refuses types that cannot be added."""
    if vector.dtype not in _DTYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in _DTYPES)
        raise InputError(f"A vector of {vector.dtype} cannot be added in shared memory.", remedy=f"use one of {names}")
    return vector.detach().reshape(-1)
