"""A group whose members add vectors in memory that they share: `SharedMemoryGroup`.

Owns the forming of the group and its end; what its members do together is in `operations`. It refuses vectors of types
that cannot be added, and whatever an operation finds wrong closes the group, so that the others need not wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from parakit.collectives.base import ExchangeMethod, GroupBroken, ReduceScatterGroup, Store, Summed
from parakit.collectives.shared_memory.barrier import Barrier
from parakit.collectives.shared_memory.join import join
from parakit.collectives.shared_memory.layout import MemoryLayout, Plan
from parakit.collectives.shared_memory.operations import Operations, cut, flat_of
from parakit.errors import InputError
from parakit.system.cores import usable_cores
from parakit.system.shared_memory import SharedMemory

__all__ = ["SharedMemoryGroup"]

_SPIN_SECONDS = 0.0001


class SharedMemoryGroup(ReduceScatterGroup):
    """Members on one host that add vectors together.

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
        self._inside: Operations | None = Operations(MemoryLayout(segment, plan, rank), barriers[0], rank, size)

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
        flat = flat_of(vector)
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
        flat = flat_of(vector)
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
        flat = flat_of(vector)
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
        return cut(numel, self.size)

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

    def _open(self) -> Operations:
        inside = self._inside
        if inside is None:
            raise GroupBroken("The group was closed.")
        return inside

    @contextmanager
    def _operation(self) -> Iterator[Operations]:
        """The group's inside; if anything goes wrong with it, the others need not wait."""
        inside = self._open()
        try:
            yield inside
        except BaseException:
            self.close()
            raise
