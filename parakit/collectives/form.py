"""How the members of a generation come to talk to each other: through the memory of a host, by connections, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parakit.collectives.base import Exchange, ProcessGroup, ReduceScatterGroup, Store
from parakit.collectives.gloo import GlooGroup
from parakit.collectives.hierarchical import HierarchicalGroup
from parakit.collectives.shared_memory import CannotShare, SharedMemoryGroup
from parakit.collectives.topology import hierarchical
from parakit.system.devices import CPU

__all__ = ["form_group"]


def form_group(
    store: Store,
    rank: int,
    hosts: Sequence[str],
    limit_seconds: float,
    *,
    exchange: Exchange,
    numel: int,
    dtype: torch.dtype,
    common: int,
    device: torch.device = CPU,
) -> tuple[ProcessGroup, Tensor | None]:
    """Form a group.

    Parameters
    ----------
    store : Store
        Of this generation alone.
    rank : int
    hosts : sequence of str
        By rank, the address that each member listens on, where connections are needed.
    limit_seconds : float
        The longest that any operation may wait for a member.
    exchange : {"auto", "shared memory", "gloo"}
        "auto" shares memory within hosts where all members can, and makes connections otherwise.
    numel : int
    dtype : torch.dtype
        Of the vector that is to be added most often.
    common : int
        Bytes of memory that the members of a host are to have in common, where they share memory.
    device : torch.device
        Where the vector lies. From a GPU it is added by connections, whatever the exchange.

    Returns
    -------
    ProcessGroup
        The group.
    tensor or None
        A vector, zero, from which the group adds without a copy; None if any place is as good.

    Raises
    ------
    CannotShare
        If shared memory is wanted, and one of the members cannot reach the others'.
    GroupBroken
        If the others do not come in time.
    """
    size, capacity = len(hosts), numel * dtype.itemsize
    if exchange != "gloo" and size > 1 and device.type == "cpu":
        try:
            group: ReduceScatterGroup
            if exchange == "auto" and hierarchical(hosts):
                group = HierarchicalGroup(
                    store, rank, hosts, limit_seconds=limit_seconds, capacity=capacity, common=common
                )
            else:
                group = SharedMemoryGroup(
                    store, rank, size, limit_seconds=limit_seconds, capacity=capacity, common=common
                )
            return group, group.buffer(numel, dtype)
        except CannotShare:
            if exchange == "shared memory":
                raise
    return GlooGroup(store, rank, size, hosts[rank], limit_seconds), None
