"""How the members of a generation come to talk to each other: through the memory of a host, by connections, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parakit.collectives.base import Exchange, ExchangeMethod, ProcessGroup, ReduceScatterGroup, Store
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
        Bytes of memory that the members of a host are to have in common, where they share memory; 0 if they are not to
        divide the update.
    device : torch.device
        Where the vector lies. From a GPU it is added by connections, whatever the exchange.

    Returns
    -------
    ProcessGroup
        The group, which says by its `method` how it exchanges.
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
    shares = exchange != "gloo" and device.type == "cpu"
    if shares and size > 1:
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
    gloo = GlooGroup(store, rank, size, hosts[rank], limit_seconds)
    if shares and size == 1:  # its memory is its own, and so is the update
        gloo.method = ExchangeMethod("shared memory", divided=common > 0)
    return gloo, None
