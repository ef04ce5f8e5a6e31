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
from parakit.tensor_layout import shaped_like
from parakit.trees import unpack

__all__ = ["GradientSum", "flatten", "unflatten_into"]

_TAIL = 3  # count, loss_sum and votes ride behind all else, so that one exchange carries everything


class GradientSum:
    """A sum of per-sample gradients, with how much it is a sum of.

    Sums add with ``+``. All parts lie in one flat vector, so that a collective operation on the vector adds everything
    at once.

    Parameters
    ----------
    total : tensor, (parameters,)
        Sum over samples of the gradient of the loss; float32 or float64.
    count : float
        What the sum is to be divided by; 0 for a loss that is itself a sum.
    loss_sum : float
        Sum over samples of the loss.

    Attributes
    ----------
    unit : float
        What `total` was divided by already; the same for all that are added. Where it is the count of a whole batch,
        nobody needs to go over the gradient again to make it a mean.
    pieces : list of tensors
        What `beside` was told; else empty.
    """

    __slots__ = ("_apart", "_flags", "_late", "_numbers", "_vector", "pieces", "unit")

    def __init__(self, total: Tensor, count: float, loss_sum: float) -> None:
        self._fill(torch.cat([total, total.new_tensor([count, loss_sum, 0.0])]), 0, 1.0)

    def _fill(self, vector: Tensor, flags: int, unit: float) -> None:
        self._vector, self._flags, self.unit = vector, flags, unit
        behind = vector[len(vector) - flags - _TAIL :]
        # What is behind the gradient, in the same memory; numpy reads and writes single numbers far faster than torch.
        self._numbers: Any = behind.numpy() if behind.device.type == "cpu" else behind
        self.pieces: list[Tensor] = []
        self.defer(None)

    @classmethod
    def around(cls, vector: Tensor, flags: int = 0, unit: float = 1.0) -> GradientSum:
        """See a vector of the right layout as a sum, without a copy; `flags` numbers stand behind the gradient."""
        new = cls.__new__(cls)
        new._fill(vector, flags, unit)
        return new

    @property
    def vector(self) -> Tensor:
        """All parts, flat."""
        if self._late is not None:
            late = self._late
            self.defer(None)
            late()
        return self._vector

    def defer(self, gather: Callable[[], None] | None, apart: Callable[[], list[Tensor]] | None = None) -> None:
        """Have the gradient brought into the vector when somebody first asks for it; count and loss are there.

        Parameters
        ----------
        gather : callable or None
            Brings it; None where it is there.
        apart : callable, optional
            Where a slice alone is missing: gives the pieces of which it consists, flat and end to end.
        """
        self._late, self._apart = gather, apart

    def detach_slice(self) -> tuple[Tensor, list[Tensor] | None]:
        """The vector, and the pieces of a slice that is not in it; from now on nobody brings them there."""
        apart = self._apart
        if apart is None:
            return self.vector, None
        self.defer(None)
        return self._vector, apart()

    @property
    def is_late(self) -> bool:
        """Whether nobody has asked for the gradient yet."""
        return self._late is not None

    @property
    def total(self) -> Tensor:
        """The summed gradient, divided by `unit`; a view."""
        return self.vector[: -_TAIL - self._flags]

    @property
    def used(self) -> list[float]:
        """For each parameter, how many shares it had a gradient from; empty if nobody counted."""
        return self._numbers[: self._flags].tolist()  # type: ignore[no-any-return]

    def note_used(self, used: list[float]) -> None:
        """Note the same of one share: 1 or 0."""
        on_cpu = isinstance(self._numbers, np.ndarray)
        self._numbers[: self._flags] = used if on_cpu else self._vector.new_tensor(used)

    def note(self, share: ShareLoss) -> None:
        """Note what the sum is of, and no vote."""
        on_cpu = isinstance(self._numbers, np.ndarray)
        value = share.value.detach()
        self._numbers[-_TAIL] = share.count
        self._numbers[-_TAIL + 1] = (value.item() if on_cpu else value.reshape(())) * share.weight
        self._numbers[-_TAIL + 2] = 0.0

    @property
    def count(self) -> float:
        """What the sum is to be divided by; 0 for one that is not."""
        return float(self._numbers[-_TAIL])

    @property
    def divisor(self) -> float:
        """What makes `total` the mean."""
        return (self.count or 1.0) / self.unit

    @property
    def loss_sum(self) -> float:
        """Sum of the loss over the samples."""
        return float(self._numbers[-_TAIL + 1])

    @property
    def mean_loss(self) -> float:
        """The loss of these samples, as the user's loss would have said."""
        return self.loss_sum / (self.count or 1.0)

    @property
    def mean_squared_norm(self) -> float:
        """Squared 2-norm of the mean gradient; 0 if it is of no samples."""
        return float(torch.dot(self.total, self.total)) / self.divisor**2 if self.count else 0.0

    @property
    def votes(self) -> float:
        """How many workers ask to end the segment after this step."""
        return float(self._numbers[-1])

    @property
    def tail(self) -> int:
        """How many numbers ride behind the gradient."""
        return _TAIL + self._flags

    def with_tail(self, tail: Tensor, pieces: list[Tensor]) -> GradientSum:
        """The sum whose last numbers these are, and whose gradient lies elsewhere: of a slice of it, the pieces."""
        new = self._like(tail)
        new.pieces = pieces
        return new

    def vote(self) -> None:
        """Ask for the end of the segment."""
        self._numbers[-1] = 1.0

    def clone(self) -> GradientSum:
        """A copy that shares no memory."""
        return self._like(self.vector.clone())

    def on_cpu(self) -> GradientSum:
        """A copy that shares no memory, on the CPU."""
        return self._like(self.vector.to("cpu", copy=True))

    def _like(self, vector: Tensor) -> GradientSum:
        return self.around(vector, self._flags, self.unit)

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
        return _from_array, (self.vector.cpu().numpy(), self._flags, self.unit)

    def __repr__(self) -> str:
        return f"GradientSum({len(self.total)} parameters, count={self.count:g}, loss_sum={self.loss_sum:.6g})"


def _from_array(array: Any, flags: int, unit: float) -> GradientSum:
    return GradientSum.around(unpack(array), flags, unit)


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


def _room_for(parameter: Tensor) -> Tensor:
    """Zeros for the gradient of a parameter, laid out as that is."""
    return shaped_like(torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device), parameter)
