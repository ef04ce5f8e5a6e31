"""What a divided update needs of a group: members that sum a vector by slices, in memory that some have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parakit.workers.group import Adders

__all__ = ["Slicing", "Summed"]


class Summed(NamedTuple):
    """The part of a sum that `Slicing.sum_slice` leaves with one member.

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


class Slicing(Adders):
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
        """A vector that `sum_slice` can sum."""

    @abstractmethod
    def common(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector that some members have in common."""

    @abstractmethod
    def slices(self, numel: int) -> list[slice]:
        """The part of each of those in a vector, by their places."""

    @abstractmethod
    def sum_slice(self, vector: Tensor, *, tail: int = 0, own: Sequence[Tensor] | None = None) -> Summed:
        """Replace this member's slice of its vector by the sum of every member's; the rest stays as it is."""

    @abstractmethod
    def add_in_common(self, values: Tensor) -> None:
        """Replace a few numbers by their sums over those who have memory in common."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for those who have memory in common; what each wrote there before is then seen by all."""
