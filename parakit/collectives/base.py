"""What a group of members can do together: add vectors, whole or by slices; and the store through which it forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from parakit.errors import RunError

__all__ = [
    "EXCHANGES",
    "Exchange",
    "ExchangeMethod",
    "GroupBroken",
    "ProcessGroup",
    "ReduceScatterGroup",
    "Store",
    "Summed",
]


class GroupBroken(RunError):
    """A member of the group died, or was silent for too long."""


class Store(Protocol):
    """Where the members of a generation leave notes for each other."""

    def set(self, key: str, value: bytes) -> None:
        """Leave a note."""

    def get(self, key: str, limit_seconds: float) -> bytes:
        """Read a note, waiting until it is there; raises TimeoutError at the limit."""


_DIVIDED = ", divided update"


@dataclass(frozen=True)
class ExchangeMethod:
    """How a group that was formed adds its gradients up.

    Attributes
    ----------
    way : str
        One of `parakit.events.records.EXCHANGE_WAYS`, or the algorithm that a simulation prices.
    divided : bool
        Whether members divide the update among them.
    """

    way: str
    divided: bool = False

    @classmethod
    def of(cls, text: str) -> ExchangeMethod:
        """The method that `str` wrote, as older files have it."""
        way = text.removesuffix(_DIVIDED)
        return cls(way, way != text)

    def __str__(self) -> str:
        return self.way + _DIVIDED * self.divided


class ProcessGroup(ABC):
    """Members that add vectors together."""

    size: int
    #: How they do.
    method: ExchangeMethod

    @abstractmethod
    def all_reduce(self, vector: Tensor) -> None:
        """Replace a vector by the sum of every member's, in place."""

    def all_reduce_gradient(self, vector: Tensor, tail: int) -> None:  # noqa: ARG002  # here all travels alike
        """The same for a gradient; its last elements, so many, are counts that must arrive as they are."""
        self.all_reduce(vector)

    @abstractmethod
    def close(self) -> None:
        """Leave the group: the others' operations fail at once instead of at their limit."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the members, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        self.all_reduce(flat)
        pieces = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


#: How resident workers add their gradients up.
Exchange = Literal["auto", "shared memory", "gloo"]
EXCHANGES: tuple[Exchange, ...] = ("auto", "shared memory", "gloo")


class Summed(NamedTuple):
    """The part of a sum that `ReduceScatterGroup.reduce_scatter` leaves with one member.

    Attributes
    ----------
    where : slice
        This member's part of the vector.
    pieces : list of tensors
        That part of the sum over the members, flat and end to end.
    tail : tensor
        The sum of the last elements of the vectors, in memory of its own; the same on every member.
    """

    where: slice
    pieces: list[Tensor]
    tail: Tensor


class ReduceScatterGroup(ProcessGroup):
    """Members that can divide a vector among those who have memory in common."""

    rank: int
    #: Whether they can in this group.
    divides: bool = True

    @property
    @abstractmethod
    def place(self) -> int:
        """Of this member among those who have memory in common."""

    @abstractmethod
    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that `reduce_scatter` can sum."""

    @abstractmethod
    def common(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that some members have in common."""

    @abstractmethod
    def slices(self, numel: int) -> list[slice]:
        """The part of each of those in a vector, by their places."""

    @abstractmethod
    def reduce_scatter(self, vector: Tensor, *, tail: int = 0, own: Sequence[Tensor] | None = None) -> Summed:
        """Replace this member's slice of its vector by the sum of every member's; the rest stays as it is."""

    @abstractmethod
    def add_in_common(self, values: Tensor) -> None:
        """Replace a few numbers by their sums over those who have memory in common."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for those who have memory in common; what each wrote there before is then seen by all."""
