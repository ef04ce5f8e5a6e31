"""Gradients as sums with a count: the one thing that travels between workers.

Owns the flat layout of a gradient and the gradient of one share. Means are never averaged here: sums are added, and
whoever updates the parameters divides once by the true global count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data import Samples, unpack
from parakit.losses import SummedLoss

__all__ = ["GradientBuffer", "GradientSum", "call_model", "flatten", "unflatten_into"]

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
    """

    __slots__ = ("_flags", "vector")

    def __init__(self, total: Tensor, count: float, loss_sum: float) -> None:
        self.vector = torch.cat([total, total.new_tensor([count, loss_sum, 0.0])])
        self._flags = 0

    @classmethod
    def around(cls, vector: Tensor, flags: int = 0) -> GradientSum:
        """See a vector of the right layout as a sum, without a copy; `flags` numbers stand behind the gradient."""
        new = cls.__new__(cls)
        new.vector = vector
        new._flags = flags
        return new

    @property
    def total(self) -> Tensor:
        """The summed gradient, a view."""
        return self.vector[: -_TAIL - self._flags]

    @property
    def reached(self) -> Tensor:
        """For each parameter, a view of how many shares it had a gradient from; empty if nobody counted."""
        return self.vector[len(self.vector) - _TAIL - self._flags : -_TAIL]

    @property
    def count(self) -> float:
        """What the sum is to be divided by."""
        return float(self.vector[-_TAIL])

    @property
    def loss_sum(self) -> float:
        """Sum of the loss over the samples."""
        return float(self.vector[-_TAIL + 1])

    @property
    def mean_squared_norm(self) -> float:
        """Squared 2-norm of the mean gradient; 0 if it is of no samples."""
        return float(torch.dot(self.total, self.total)) / self.count**2 if self.count else 0.0

    @property
    def votes(self) -> float:
        """How many workers ask to end the segment after this step."""
        return float(self.vector[-1])

    @property
    def tail(self) -> int:
        """How many numbers ride behind the gradient."""
        return _TAIL + self._flags

    def beside(self, tail: Tensor) -> GradientSum:
        """The sum whose last numbers these are, without a gradient: that lies elsewhere."""
        return self.around(tail, self._flags)

    def vote(self) -> None:
        """Ask for the end of the segment."""
        self.vector[-1] = 1.0

    def clone(self) -> GradientSum:
        """A copy that shares no memory."""
        return self.around(self.vector.clone(), self._flags)

    def __add__(self, other: GradientSum) -> GradientSum:
        return self.around(self.vector + other.vector, self._flags)

    def __iadd__(self, other: GradientSum) -> GradientSum:
        self.vector += other.vector
        return self

    @staticmethod
    def of_all(parts: Iterable[GradientSum]) -> GradientSum:
        """The sum of some parts, added in their order, in memory of its own."""
        first, *others = parts
        total = first.clone()
        for part in others:
            total += part
        return total

    def __reduce__(self) -> tuple[Callable[[Any, int], GradientSum], tuple[Any, int]]:
        return _from_array, (self.vector.numpy(), self._flags)

    def __repr__(self) -> str:
        return f"GradientSum({len(self.total)} parameters, count={self.count:g}, loss_sum={self.loss_sum:.6g})"


def _from_array(array: Any, flags: int) -> GradientSum:
    return GradientSum.around(unpack(array), flags)


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


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class _Mark:
    """Notes that a parameter had a gradient; called by torch after each accumulation."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._mark: Tensor | None = None

    def write_to(self, reached: Tensor) -> None:
        """Note it there from now on."""
        self._mark = reached[self._place : self._place + 1]

    def __call__(self, _: Tensor) -> None:
        assert self._mark is not None
        self._mark.fill_(1.0)


@dataclass
class GradientBuffer:
    """The flat gradient of a model: ``parameter.grad`` of each parameter is a view into one vector.

    Backward then writes where the exchange reads, and nothing is copied. Parameters in half precision are the
    exception: their sums are kept in float32, because a count beyond 256 does not fit into bfloat16.

    A parameter that no share of a batch reached (a branch not taken) has no gradient after `load`, as in a plain loop,
    so that an optimizer leaves it alone; whether any share did is summed with the gradient.

    Parameters
    ----------
    parameters : sequence of tensors
        The trainable parameters, in a fixed order.
    """

    parameters: Sequence[nn.Parameter]

    def __post_init__(self) -> None:
        kinds = {parameter.dtype for parameter in self.parameters}
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        #: Whether the gradients that parameters have are views into the flat vector.
        self.direct = kinds == {self.dtype}
        #: Elements of the flat vector.
        self.numel = sum(parameter.numel() for parameter in self.parameters) + len(self.parameters) + _TAIL
        self._marks = [_Mark(place) for place in range(len(self.parameters))]
        for parameter, mark in zip(self.parameters, self._marks, strict=True):
            parameter.register_post_accumulate_grad_hook(mark)
        self.live_in(torch.zeros(self.numel, dtype=self.dtype))

    def live_in(self, vector: Tensor) -> None:
        """Keep the gradient in a vector from now on.

        Parameters
        ----------
        vector : tensor, (numel,)
            Of the buffer's `dtype`. What is in it counts as a gradient, so let it be zero.
        """
        self.sum = GradientSum.around(vector, len(self.parameters))
        pieces = self.sum.total.split([parameter.numel() for parameter in self.parameters])
        self._views = [piece.view_as(p) for p, piece in zip(self.parameters, pieces, strict=True)]
        self._grads = self._views if self.direct else [torch.zeros_like(p) for p in self.parameters]
        for mark in self._marks:
            mark.write_to(self.sum.reached)
        self._all_set = False
        self._set_all()

    def _set_all(self) -> None:
        if not self._all_set:
            for parameter, grad in zip(self.parameters, self._grads, strict=True):
                parameter.grad = grad
            self._all_set = True

    def clear(self) -> None:
        """Set the sum to nothing."""
        self._set_all()
        self.sum.vector.zero_()
        if not self.direct:
            torch._foreach_zero_(self._grads)

    def forward(self, model: nn.Module, loss: SummedLoss, share: Samples) -> Tensor:
        """The summed loss of a share, still attached to its graph; notes loss and count in the sum."""
        total, count = loss(call_model(model, share.inputs), share.targets)
        tail = self.sum.vector[-_TAIL:]
        tail[0] = count
        tail[1] = total.detach()
        return total

    def backward(self, total: Tensor) -> None:
        """Add the gradient of a summed loss to the sum."""
        total.backward()
        if not self.direct:
            for view, grad in zip(self._views, self._grads, strict=True):
                view.copy_(grad)

    def load(self, total: GradientSum) -> float:
        """Make a global sum the gradient that an optimizer sees.

        Parameters
        ----------
        total : GradientSum
            Over the whole batch.

        Returns
        -------
        float
            The loss of the batch, as the user's loss would have said.
        """
        count = total.count
        divisor = count if count else 1.0
        if total is not self.sum:
            self.sum.vector.copy_(total.vector)
        self.sum.total.div_(divisor)
        self._set_all()
        if not self.direct:
            unflatten_into(self.sum.total, self._grads)
        self._unset_unreached()
        return total.loss_sum / divisor

    def _unset_unreached(self) -> None:
        reached = self.sum.reached
        if not bool(reached.all()):
            for parameter, by in zip(self.parameters, reached.tolist(), strict=True):
                if not by:
                    parameter.grad = None
            self._all_set = False
