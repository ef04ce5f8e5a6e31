"""Gradients that travel in another form: what a codec is, and a group that exchanges through one.

Owns which numbers a codec may touch: gradients alone. Counts, buffers and whatever else members add up travel as they
are, so that all members keep to the same course. It refuses codecs whose messages do not add up, such as lists of the
largest elements: a sum of what members send must stand for the sum of what they have, as with shorter floats, or with
the factors of PowerSGD.

References
----------
Vogels, Karimireddy, Jaggi: "PowerSGD: Practical low-rank gradient compression for distributed optimization", NeurIPS
2019.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from parakit.collectives.base import ProcessGroup

__all__ = ["Codec", "CompressedGroup"]


class Codec(Protocol):
    """A form in which gradients travel. It is sent to workers, and each has one of its own."""

    def encode(self, values: Tensor) -> Tensor:
        """The flat vector that travels in place of another; its sum over the members is decoded."""

    def decode(self, encoded: Tensor, values: Tensor) -> None:
        """Write what a sum of encoded vectors stands for in the place of the values."""

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes that travel for so many values of a type."""


class CompressedGroup(ProcessGroup):
    """A group whose members exchange gradients through a codec.

    Parameters
    ----------
    group : ProcessGroup
        Which the encoded vectors are added by.
    codec : Codec
    """

    def __init__(self, group: ProcessGroup, codec: Codec) -> None:
        self.size, self.method = group.size, group.method
        self._group, self._codec = group, codec

    def all_reduce(self, vector: Tensor) -> None:
        """Replace a vector by the sum of every member's, in place and as it is."""
        self._group.all_reduce(vector)

    def all_reduce_gradient(self, vector: Tensor, tail: int) -> None:
        """The same for a gradient, through the codec; its last elements, so many, travel as they are."""
        values, behind = vector.split([len(vector) - tail, tail])
        encoded = self._codec.encode(values)
        self._group.all_reduce(encoded)
        self._codec.decode(encoded, values)
        self._group.all_reduce(behind)

    def close(self) -> None:
        """Leave the group: the others' operations fail at once instead of at their limit."""
        self._group.close()
