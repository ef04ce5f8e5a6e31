"""How the members of a generation come to talk to each other: through shared memory on one host, or by connections."""

from __future__ import annotations

import torch
from torch import Tensor

from parakit.workers.base import Exchange
from parakit.workers.group import Adders, Board, Group
from parakit.workers.shared import CannotShare, SharedGroup

__all__ = ["meet"]


def meet(
    board: Board,
    rank: int,
    size: int,
    host: str,
    limit_seconds: float,
    *,
    exchange: Exchange,
    numel: int,
    dtype: torch.dtype,
    common: int,
) -> tuple[Adders, Tensor | None]:
    """Form a group.

    Parameters
    ----------
    board : Board
        Of this generation alone.
    rank, size : int
    host : str
        Of the interface to listen on, where connections are needed.
    limit_seconds : float
        The longest that any operation may wait for a member.
    exchange : {"auto", "shared memory", "gloo"}
        "auto" shares memory where all members can, and makes connections otherwise.
    numel : int
    dtype : torch.dtype
        Of the vector that is to be added most often.
    common : int
        Bytes of memory that a `SharedGroup` is to have for all members in common.

    Returns
    -------
    Adders
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
    if exchange != "gloo" and size > 1:
        try:
            group = SharedGroup(
                board, rank, size, limit_seconds=limit_seconds, capacity=numel * dtype.itemsize, common=common
            )
            return group, group.buffer(numel, dtype)
        except CannotShare:
            if exchange == "shared memory":
                raise
    return Group(board, rank, size, host, limit_seconds), None
