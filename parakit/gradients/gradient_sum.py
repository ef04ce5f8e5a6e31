"""Gradients as sums with a count: the one thing that travels between workers.

Owns the flat layout of a gradient and the gradient of one share. Means are never averaged here: sums are added, and
whoever updates the parameters divides once by the true global count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parakit.losses.summed import ShareLoss
from parakit.trees import unpack

__all__ = ["TAIL", "Counts", "GradientSlice", "GradientSum", "flatten", "unflatten_into"]

#: Count, sum of the loss and votes ride behind all else, so that one exchange carries everything.
TAIL = 3


class Counts:
    """The numbers that ride behind a gradient: what it is a sum of, and what workers tell each other with it.

    Parameters
    ----------
    behind : tensor, (flags + 3,)
        For each parameter, how many shares it had a gradient from; then count, loss and votes.
    unit : float
        What the gradient was divided by already; the same for all that are added. Where it is the count of a whole
        batch, nobody needs to go over the gradient again to make it a mean.
    """

    __slots__ = ("_numbers", "unit")

    def __init__(self, behind: Tensor, unit: float) -> None:
        # In the same memory; numpy reads and writes single numbers far faster than torch.
        self._numbers: Any = behind.numpy() if behind.device.type == "cpu" else behind
        self.unit = unit

    @property
    def tail(self) -> int:
        """How many numbers ride behind the gradient."""
        return len(self._numbers)

    @property
    def used(self) -> list[float]:
        """For each parameter, how many shares it had a gradient from; empty if nobody counted."""
        return self._numbers[:-TAIL].tolist()  # type: ignore[no-any-return]

    def note_used(self, used: list[float]) -> None:
        """Note the same of one share: 1 or 0."""
        on_cpu = isinstance(self._numbers, np.ndarray)
        self._numbers[:-TAIL] = used if on_cpu else self._numbers.new_tensor(used)

    def note(self, share: ShareLoss) -> None:
        """Note what the sum is of, and no vote."""
        on_cpu = isinstance(self._numbers, np.ndarray)
        value = share.value.detach()
        self._numbers[-TAIL] = share.count
        self._numbers[-TAIL + 1] = (value.item() if on_cpu else value.reshape(())) * share.weight
        self._numbers[-TAIL + 2] = 0.0

    @property
    def count(self) -> float:
        """What the sum is to be divided by; 0 for one that is not."""
        return float(self._numbers[-TAIL])

    @property
    def divisor(self) -> float:
        """What makes the gradient the mean."""
        return (self.count or 1.0) / self.unit

    @property
    def loss_sum(self) -> float:
        """Sum of the loss over the samples."""
        return float(self._numbers[-TAIL + 1])

    @property
    def mean_loss(self) -> float:
        """The loss of these samples, as the user's loss would have said."""
        return self.loss_sum / (self.count or 1.0)

    @property
    def votes(self) -> float:
        """How many workers ask to end the segment after this step."""
        return float(self._numbers[-1])

    def vote(self) -> None:
        """Ask for the end of the segment."""
        self._numbers[-1] = 1.0


class GradientSlice(Counts):
    """One member's slice of a sum over the workers.

    Parameters
    ----------
    pieces : list of tensors
        The slice, flat and end to end: one for each parameter that it has a part of, or a single one.
    behind, unit : as for `Counts`
    """

    __slots__ = ("pieces",)

    def __init__(self, pieces: list[Tensor], behind: Tensor, unit: float) -> None:
        super().__init__(behind, unit)
        self.pieces = pieces


class GradientSum(Counts):
    """A sum of per-sample gradients, with how much it is a sum of.

    Sums add with ``+``. All parts lie in one flat vector, so that a collective operation on the vector adds everything
    at once.

    Parameters
    ----------
    vector : tensor
        The gradient of the loss, summed over samples and divided by `unit`; behind it the numbers of `Counts`.
    flags : int
        For how many parameters it is counted who reached them.
    unit : float
    """

    __slots__ = ("_late", "_vector")

    def __init__(self, vector: Tensor, flags: int = 0, unit: float = 1.0) -> None:
        super().__init__(vector[len(vector) - flags - TAIL :], unit)
        self._vector = vector
        self._late: Callable[[], None] | None = None

    @property
    def vector(self) -> Tensor:
        """All parts, flat."""
        if self._late is not None:
            late, self._late = self._late, None
            late()
        return self._vector

    def defer(self, gather: Callable[[], None] | None) -> None:
        """Have the gradient brought into the vector when somebody first asks for it; None where it is there."""
        self._late = gather

    @property
    def is_late(self) -> bool:
        """Whether nobody has asked for the gradient yet."""
        return self._late is not None

    def without_what_is_late(self) -> Tensor:
        """The vector as it is; from now on nobody brings the rest there."""
        self._late = None
        return self._vector

    @property
    def total(self) -> Tensor:
        """The summed gradient, divided by `unit`; a view."""
        return self.vector[: -self.tail]

    @property
    def mean_squared_norm(self) -> float:
        """Squared 2-norm of the mean gradient; 0 if it is of no samples."""
        return float(torch.dot(self.total, self.total)) / self.divisor**2 if self.count else 0.0

    def clone(self) -> GradientSum:
        """A copy that shares no memory."""
        return self._like(self.vector.clone())

    def on_cpu(self) -> GradientSum:
        """A copy that shares no memory, on the CPU."""
        return self._like(self.vector.to("cpu", copy=True))

    def _like(self, vector: Tensor) -> GradientSum:
        return GradientSum(vector, self.tail - TAIL, self.unit)

    def _vector_of(self, other: GradientSum) -> Tensor:
        if other.unit != self.unit:
            raise ValueError(f"Gradients in units of {self.unit:g} and of {other.unit:g} samples cannot be added.")
        return other.vector

    def __add__(self, other: GradientSum) -> GradientSum:
        return self._like(self.vector + self._vector_of(other))

    def __iadd__(self, other: GradientSum) -> GradientSum:
        self.vector.add_(self._vector_of(other))
        return self

    @staticmethod
    def of_all(parts: Iterable[GradientSum]) -> GradientSum:
        """The sum of some parts, added in their order, in memory of its own."""
        first, *others = parts
        total = first.clone()
        for part in others:
            total += part
        return total

    def __reduce__(self) -> tuple[Callable[[Any, int, float], GradientSum], tuple[Any, int, float]]:
        return _from_array, (self.vector.cpu().numpy(), self.tail - TAIL, self.unit)

    def __repr__(self) -> str:
        return f"GradientSum({len(self.total)} parameters, count={self.count:g}, loss_sum={self.loss_sum:.6g})"


def _from_array(array: Any, flags: int, unit: float) -> GradientSum:
    return GradientSum(unpack(array), flags, unit)


def flatten(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors as one flat vector of a type."""
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def unflatten_into(vector: Tensor, tensors: Iterable[Tensor]) -> None:
    """Copy a flat vector back into tensors, in their order and type."""
    place = 0
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(vector[place : place + tensor.numel()].view_as(tensor))
            place += tensor.numel()
