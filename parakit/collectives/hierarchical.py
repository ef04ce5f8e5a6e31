"""Members on several hosts: they share memory within each host, and connections lead from host to host.

Each host is a group in shared memory. Where all hosts have as many members, those with the same place on their hosts
are connected: a vector is summed by slices within each host, each member adds its slice to those of its peers on the
other hosts, all at the same time, and updates it there. So only the gradient travels between hosts, once, and each
member sends its part of it. Otherwise, and for whole vectors, the first member of each host speaks for the others.

This is the hierarchical all-reduce of Horovod and NCCL. Hosts are told apart by the addresses that workers listen on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from parakit.collectives.base import ExchangeMethod, GroupBroken, ReduceScatterGroup, Store, Summed
from parakit.collectives.gloo import GlooGroup
from parakit.collectives.shared_memory import CannotShare, SharedMemoryGroup
from parakit.collectives.topology import equal_counts

__all__ = ["HierarchicalGroup"]

_GOOD, _BAD = b"+", b"-"


class HierarchicalGroup(ReduceScatterGroup):
    """Members on several hosts that add vectors together.

    Parameters
    ----------
    store : Store
        Of this generation alone.
    rank : int
        The place of this member.
    hosts : sequence of str
        The addresses that the members listen on, by rank; equal ones are taken for one host.
    limit_seconds : float
        The longest that any operation may wait for a member.
    capacity, common : int
        As of `SharedMemoryGroup`.

    Attributes
    ----------
    divides : bool
        Whether all hosts have as many members.

    Raises
    ------
    CannotShare
        On all members alike, if those of one host cannot reach each other's memory.
    GroupBroken
        If the others do not come in time.
    """

    def __init__(
        self, store: Store, rank: int, hosts: Sequence[str], *, limit_seconds: float, capacity: int, common: int
    ) -> None:
        places = list(dict.fromkeys(hosts))
        neighbours = [other for other, host in enumerate(hosts) if host == hosts[rank]]
        counts = [list(hosts).count(host) for host in places]
        here, within = places.index(hosts[rank]), neighbours.index(rank)
        self.rank, self.size = rank, len(hosts)
        self.divides = equal_counts(hosts)
        self.method = ExchangeMethod("hierarchical", divided=common > 0 and self.divides)
        self._local = _of_host(
            store, here, within, counts, limit_seconds=limit_seconds, capacity=capacity, common=common
        )
        self._across: GlooGroup | None = None
        try:
            if self.divides or within == 0:
                self._across = GlooGroup(
                    _Part(store, f"across-{within}"), here, len(places), hosts[rank], limit_seconds
                )
        except BaseException:
            self.close()
            raise

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector in this member's own part of the memory of its host; see `SharedMemoryGroup.buffer`."""
        return self._local.buffer(numel, dtype)

    def common(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that the members of a host have in common."""
        return self._local.common(numel, dtype)

    def slices(self, numel: int) -> list[slice]:
        """The part of each member of this host in a vector without a tail."""
        return self._local.slices(numel)

    @property
    def place(self) -> int:
        """Of this member among those of its host."""
        return self._local.rank

    def all_reduce(self, vector: Tensor) -> None:
        """Replace a vector by the sum of every member's, in place.

        Raises
        ------
        GroupBroken
            If a member leaves, dies, or does not come within the limit.
        """
        flat = vector.detach().reshape(-1).contiguous()
        with self._together():
            self._local.all_reduce(flat)
            if self.place == 0:
                self._connected.all_reduce(flat)
            self._local.broadcast(flat)
        if flat.data_ptr() != vector.data_ptr():
            vector.detach().copy_(flat.view_as(vector))

    def reduce_scatter(self, vector: Tensor, *, tail: int = 0, own: Sequence[Tensor] | None = None) -> Summed:
        """As `SharedMemoryGroup.reduce_scatter`, over the members of all hosts; only where `divides`.

        Raises
        ------
        GroupBroken
            If a member leaves, dies, or does not come within the limit.
        """
        with self._together():
            summed = self._local.reduce_scatter(vector, tail=tail, own=own)
            part = vector[summed.where]  # all in one, because each piece that travels takes its time
            for place, piece in zip(part.split([p.numel() for p in summed.pieces]), summed.pieces, strict=True):
                if place.data_ptr() != piece.data_ptr():
                    place.copy_(piece)
            self._connected.all_reduce_each([values for values in (part, summed.tail) if values.numel()])
        return summed._replace(pieces=[part])

    def add_in_common(self, values: Tensor) -> None:
        """Replace a few numbers by their sums over the members of this host, who have the slices of one vector."""
        with self._together():
            self._local.add_in_common(values)

    def barrier(self) -> None:
        """Wait for the members of this host; what each wrote to common memory before is then seen by all."""
        with self._together():
            self._local.barrier()

    def close(self) -> None:
        """Leave the group: the others' operations fail at once instead of at their limit."""
        self._local.close()
        if self._across is not None:
            self._across.close()

    @property
    def _connected(self) -> GlooGroup:
        if self._across is None:
            raise GroupBroken("This member has no connection to other hosts.")
        return self._across

    @contextmanager
    def _together(self) -> Iterator[None]:
        """If anything goes wrong on one side, those on the other need not wait."""
        try:
            yield
        except BaseException:
            self.close()
            raise


class _Part:
    """A store within a store, for a few of its members."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def set(self, key: str, value: bytes) -> None:
        self._store.set(f"{self._name}/{key}", value)

    def get(self, key: str, limit_seconds: float) -> bytes:
        return self._store.get(f"{self._name}/{key}", limit_seconds)


def _of_host(
    store: Store, here: int, within: int, counts: Sequence[int], *, limit_seconds: float, capacity: int, common: int
) -> SharedMemoryGroup:
    """The group of one host; if any host has none, nobody has."""
    group: SharedMemoryGroup | None = None
    verdict = _GOOD
    try:
        group = SharedMemoryGroup(
            _Part(store, f"host-{here}"), within, counts[here],
            limit_seconds=limit_seconds, capacity=capacity, common=common,
        )  # fmt: skip
    except CannotShare as error:
        verdict = _BAD + str(error).encode()
    try:
        if within == 0:
            store.set(f"host-{here}-verdict", verdict)
        for host in range(len(counts)):
            told = store.get(f"host-{host}-verdict", limit_seconds)
            if not told.startswith(_GOOD):
                raise CannotShare(told[len(_BAD) :].decode())
    except BaseException as error:
        if group is not None:
            group.close()
        if isinstance(error, OSError):  # TimeoutError included: of the store
            raise GroupBroken(
                f"The group of {sum(counts)} workers on {len(counts)} hosts was not formed within {limit_seconds:g} s: "
                f"{error}",
                cause="a worker died while it was joining",
            ) from error
        raise
    assert group is not None
    return group
