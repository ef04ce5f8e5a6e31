"""A group whose members add vectors in memory that they share: `SharedMemoryGroup`.

Sums are by slices. Each member adds up its own slice of everybody's vector, always in the order of ranks, so the result
has the same bits on every member, and is what a plain loop over the ranks gives. This is a reduce-scatter followed by
an all-gather (Thakur, Rabenseifner and Gropp 2005, IJHPCA 19(1):49) in which sending is reading. `reduce_scatter` is
the first half alone: who keeps parameters in memory that all map updates its own slice of them there, and needs no
second half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from parakit.collectives.base import ExchangeMethod, GroupBroken, ReduceScatterGroup, Store, Summed
from parakit.collectives.shared_memory.barrier import Barrier
from parakit.collectives.shared_memory.join import join
from parakit.collectives.shared_memory.layout import MemoryLayout, Plan
from parakit.errors import InputError
from parakit.system.cores import usable_cores
from parakit.system.shared_memory import SharedMemory

__all__ = ["SharedMemoryGroup"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
_KINDS = tuple(f"of {dtype}{how}" for how in ("", " in slices") for dtype in _DTYPES)
_LINE_ELEMENTS = 64  # a slice begins at a multiple, so that no two members write to one cache line
_BLOCK_BYTES = 1 << 17
_SPIN_SECONDS = 0.0001
_NOTE = 3  # words: elements, type and place of a vector


class SharedMemoryGroup(ReduceScatterGroup):
    """Members on one host that add vectors together; has the interface of `group.Group`.

    A group belongs to one generation, and no other uses its memory: a member that was stopped, and wakes when the
    others have moved on, writes where nobody reads.

    Parameters
    ----------
    store : Store
        Of this generation alone.
    rank, size : int
        The place of this member, and how many there are.
    limit_seconds : float
        The longest that any operation may wait for a member.
    capacity : int
        Bytes that `buffer` can give out on each member; the same on all of them, as is `common`.
    common : int
        Bytes that `common` can give out. Pages that are never touched take no memory.
    spin_seconds : float, optional
        See `Barrier`. If it is not given, members do not spin where all their threads together are more than the cores.
    folder : Path, optional
        For a file, on systems whose shared memory needs one: best one that somebody removes in the end.
    piece_bytes : int
        Of a vector that are under way at a time; a multiple of 4096. Smaller pieces stay in the cache of a core, but
        each costs a barrier, and where members share cores that is a change of processes; from 1 to 4 MiB it makes
        little difference.
    named, futex : bool, optional
        Try what other systems have to do: see `SharedMemory.create` and `make_bell`.

    Raises
    ------
    CannotShare
        On all members alike, if one cannot reach the others' memory. Another kind of group can be formed then.
    GroupBroken
        If the others do not come in time.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        limit_seconds: float,
        capacity: int = 0,
        common: int = 0,
        spin_seconds: float | None = None,
        folder: Path | None = None,
        piece_bytes: int = 1 << 21,
        named: bool | None = None,
        futex: bool | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.method = ExchangeMethod("shared memory", divided=common > 0)
        if spin_seconds is None:
            spin_seconds = _SPIN_SECONDS if size * torch.get_num_threads() <= usable_cores() else 0.0
        plan = Plan(size, capacity, common, piece_bytes)
        barriers: list[Barrier] = []

        def enter(segment: SharedMemory) -> None:
            barriers.append(Barrier(segment, rank, size, limit_seconds, spin_seconds=spin_seconds, futex=futex))

        segment = join(
            store, rank, size, limit_seconds, lambda: SharedMemory.create(plan.nbytes, folder, named=named), enter
        )
        self._inside: _Inside | None = _Inside(MemoryLayout(segment, plan, rank), barriers[0], rank, size)

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector in this member's own part of the shared memory: what sums it, or a part of it, copies nothing in.

        Parameters
        ----------
        numel : int
        dtype : torch.dtype

        Returns
        -------
        tensor, (numel,)
            Zero at first. Stays usable when the group is closed.

        Raises
        ------
        InputError
            If more is asked for than the group's capacity.
        """
        return self._open().layout.buffer(numel, dtype)

    def common(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that all members have in common, if all ask for the same ones in the same order.

        Nothing keeps them from writing to it at the same time; `barrier` stands between writing and reading.

        Raises
        ------
        InputError
            If more is asked for than the group's `common`.
        """
        return self._open().layout.common(numel, dtype)

    def all_reduce(self, vector: Tensor) -> None:
        """Replace a vector by the sum of every member's, in place.

        Parameters
        ----------
        vector : tensor
            Floating point or integer; of the same length and type on every member. Half precision is rounded after each
            addition.

        Raises
        ------
        GroupBroken
            If a member leaves, dies, or does not come within the limit; or calls with another kind of vector.
        """
        flat = _flat(vector)
        with self._operation() as inside:
            if self.size > 1 and flat.numel():
                inside.all_reduce(flat)
        if flat.data_ptr() != vector.data_ptr():
            vector.detach().copy_(flat.view_as(vector))

    def broadcast(self, vector: Tensor) -> None:
        """Replace a vector by that of the member of rank 0, in place.

        Parameters
        ----------
        vector : tensor
            Contiguous; of the same length and type on every member.

        Raises
        ------
        GroupBroken
            As `all_reduce`.
        """
        flat = _flat(vector)
        with self._operation() as inside:
            if self.size > 1 and flat.numel():
                inside.broadcast(flat)

    def reduce_scatter(self, vector: Tensor, *, tail: int = 0, own: Sequence[Tensor] | None = None) -> Summed:
        """Replace this member's slice of its vector by the sum of every member's; the rest stays as it is.

        No member may write to its vector, outside its own slice, before the next `barrier`: the others read it.

        Parameters
        ----------
        vector : tensor, (n,)
            In memory that `buffer` gave; of the same length and type on every member.
        tail : int
            So many of the last elements belong to no slice; every member gets the sum of them.
        own : sequence of tensors, optional
            What this member adds to its own slice, in pieces, flat and end to end, where that is not in its vector.
            They become the sum then.

        Returns
        -------
        Summed

        Raises
        ------
        InputError
            If the vector lies elsewhere.
        GroupBroken
            As `all_reduce`.
        """
        flat = _flat(vector)
        with self._operation() as inside:
            if inside.layout.place_of(flat) is None:
                raise InputError("Only a vector that SharedMemoryGroup.buffer gave can be summed by slices.")
            return inside.reduce_scatter(flat, flat.numel() - tail, own)

    @property
    def place(self) -> int:
        """The rank: all members have memory in common."""
        return self.rank

    def add_in_common(self, values: Tensor) -> None:
        """As `all_reduce`."""
        self.all_reduce(values)

    def slices(self, numel: int) -> list[slice]:
        """The part of each member in a vector without a tail, by rank. Some are empty if there are few elements."""
        return _cut(numel, self.size)

    def barrier(self) -> None:
        """Wait for all members; what each wrote to shared memory before is then seen by all.

        Raises
        ------
        GroupBroken
            As `all_reduce`.
        """
        with self._operation() as inside:
            inside.pass_barrier()

    def close(self) -> None:
        """Leave the group: the others' operations fail at once instead of at their limit. Callable in any thread."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.barrier.leave()

    def _open(self) -> _Inside:
        inside = self._inside
        if inside is None:
            raise GroupBroken("The group was closed.")
        return inside

    @contextmanager
    def _operation(self) -> Iterator[_Inside]:
        """The group's inside; if anything goes wrong with it, the others need not wait."""
        inside = self._open()
        try:
            yield inside
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class _Slices:
    """A member's slice of every member's vector, by rank, and what is behind the slices."""

    key: tuple[tuple[int, ...], int, int, torch.dtype]
    where: slice
    slices: list[Tensor]
    tails: list[Tensor]


@dataclass
class _Inside:
    """What a member of an open group works with. An operation that goes on when the group is closed keeps it."""

    layout: MemoryLayout
    barrier: Barrier
    rank: int
    size: int
    _operations: int = 0
    _unsettled: bool = False
    _known: _Slices | None = None

    def pass_barrier(self) -> None:
        self._unsettled = False
        self.barrier.wait()

    def all_reduce(self, flat: Tensor) -> None:
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
            where = _cut(body, self.size)[self.rank]
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
        where = _cut(piece.numel(), self.size)[self.rank]
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


def _cut(numel: int, size: int) -> list[slice]:
    lines = -(-numel // _LINE_ELEMENTS)
    edges = [min(numel, lines * rank // size * _LINE_ELEMENTS) for rank in range(size + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


def _flat(vector: Tensor) -> Tensor:
    if vector.dtype not in _DTYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in _DTYPES)
        raise InputError(f"A vector of {vector.dtype} cannot be added in shared memory.", remedy=f"use one of {names}")
    return vector.detach().reshape(-1)
