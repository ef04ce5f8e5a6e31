"""What workers say to each other in the middle of a step: sums that gradients go through, and rows of all of them.

Most steps need nothing of the kind: each worker computes its share alone, and gradients are added up at the end. Batch
normalisation that is synchronised, a loss that compares the samples of a batch, and means over labels that are not
ignored look at the whole batch. All workers of a group then meet at the same places of a step, in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["ALONE", "Alone", "Peers", "present", "rows_of_all", "speaking_to", "sum_of_all"]


class Peers(Protocol):
    """The workers of a group, as one of them sees it.

    Attributes
    ----------
    rank, size : int
    """

    rank: int
    size: int

    def sum(self, values: Tensor) -> None:
        """Replace numbers by their sums over all workers; each calls it with a tensor of the same shape and type."""


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> None:
        """They are the sums."""


ALONE = Alone()

_speaking = threading.local()


@contextmanager
def speaking_to(peers: Peers, *, standing_in: bool = False) -> Iterator[None]:
    """Let the layers of a model find the group, and whether this worker has rows of its own in this step."""
    before = getattr(_speaking, "to", (ALONE, False))
    _speaking.to = peers, standing_in
    try:
        yield
    finally:
        _speaking.to = before


def present() -> tuple[Peers, bool]:
    """The group that a forward pass going on belongs to, and whether this worker only stands in."""
    found: tuple[Peers, bool] = getattr(_speaking, "to", (ALONE, False))
    return found


class _Sum(torch.autograd.Function):
    """A sum over workers; the gradient of what all use is the sum of what each finds."""

    @staticmethod
    def forward(ctx: Any, peers: Peers, values: Tensor) -> Tensor:
        ctx.peers = peers
        total = values.detach().clone()
        peers.sum(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        total = gradients[0].detach().clone()
        ctx.peers.sum(total)
        return None, total


def sum_of_all(peers: Peers, values: Tensor) -> Tensor:
    """The sum of a tensor over all workers, with its gradient."""
    if peers.size == 1:
        return values
    total: Tensor = _Sum.apply(peers, values)  # type: ignore[no-untyped-call]
    return total


_CARRIED = {torch.bool: torch.int64, torch.uint8: torch.int64, torch.int8: torch.int64, torch.int16: torch.int64}


def rows_of_all(peers: Peers, mine: Tensor, places: Tensor, rows: int) -> Tensor:
    """The rows of all workers, each at its place in the batch.

    Parameters
    ----------
    peers : Peers
    mine : tensor, (len(places), ...)
        Of this worker; no gradient goes through here.
    places : int64 tensor
        Of this worker's rows in the batch.
    rows : int
        Of the batch.
    """
    values = mine.detach()
    carried = values.to(_CARRIED.get(values.dtype, values.dtype))
    every = carried.new_zeros(rows, *values.shape[1:])
    every[places] = carried
    if peers.size > 1:
        peers.sum(every)
    return every.to(values.dtype)
