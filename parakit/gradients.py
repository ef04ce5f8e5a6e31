"""Gradients as sums with a count: the one thing that travels between workers.

Owns the flat layout of a gradient and the gradient of one share. Means are never averaged here: sums are added, and
whoever updates the parameters divides once by the true global count.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parakit.data import unpack
from parakit.layout import in_order_of, shaped_like
from parakit.losses import ShareLoss

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
        self.come_late(None)

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
            self.come_late(None)
            late()
        return self._vector

    def come_late(self, gather: Callable[[], None] | None, apart: Callable[[], list[Tensor]] | None = None) -> None:
        """Have the gradient brought into the vector when somebody first asks for it; count and loss are there.

        Parameters
        ----------
        gather : callable or None
            Brings it; None where it is there.
        apart : callable, optional
            Where a slice alone is missing: gives the pieces of which it consists, flat and end to end.
        """
        self._late, self._apart = gather, apart

    def take_apart(self) -> tuple[Tensor, list[Tensor] | None]:
        """The vector, and the pieces of a slice that is not in it; from now on nobody brings them there."""
        apart = self._apart
        if apart is None:
            return self.vector, None
        self.come_late(None)
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
    def reached(self) -> list[float]:
        """For each parameter, how many shares it had a gradient from; empty if nobody counted."""
        return self._numbers[: self._flags].tolist()  # type: ignore[no-any-return]

    def note_reached(self, reached: list[float]) -> None:
        """Note the same of one share: 1 or 0."""
        on_cpu = isinstance(self._numbers, np.ndarray)
        self._numbers[: self._flags] = reached if on_cpu else self._vector.new_tensor(reached)

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

    def beside(self, tail: Tensor, pieces: list[Tensor]) -> GradientSum:
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


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _room_for(parameter: Tensor) -> Tensor:
    """Zeros for the gradient of a parameter, laid out as that is."""
    return shaped_like(torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device), parameter)


class _Arrival:
    """Brings the gradient of one parameter to its place; called by torch when there is one, unless it is to wait.

    It does not know its parameter: torch holds on to whom it is to call, where Python cannot see that, and so would
    never let go of two that know each other.
    """

    def __init__(self) -> None:
        self._told: RemovableHandle | None = None
        self.reached = False

    def write_to(self, view: Tensor, parameter: nn.Parameter, *, stays: bool, waits: bool) -> None:
        """Bring it there from now on; it may stay there, to be the gradient of the parameter, or wait until asked."""
        self._view, self._stays = view, stays
        self._kept: slice | None = None
        if self._told is not None:
            self._told.remove()
        self._told = None if waits else parameter.register_post_accumulate_grad_hook(self)

    def keep(self, kept: slice) -> None:
        """Leave a part of it, of its elements in their order, where torch makes it."""
        self._kept, self._stays = kept, False
        flat = in_order_of(self._view, self._view)
        around = (slice(0, kept.start), slice(kept.stop, flat.numel()))
        self._brought = [(flat[part], part) for part in around if part.start < part.stop]

    def __call__(self, parameter: Tensor) -> None:
        self.look(parameter)
        self.bring(parameter)

    def look(self, parameter: Tensor) -> None:
        """Note whether there is a gradient, and make it dense."""
        grad = parameter.grad
        self.reached = grad is not None
        if grad is not None and grad.is_sparse:
            parameter.grad = grad.to_dense()

    def bring(self, parameter: Tensor, *, all_of_it: bool = False) -> None:
        """Copy it to its place, unless it is there: what a model accumulates in several goes is added in place."""
        if not self.reached:
            self._view.zero_()
            return
        grad = parameter.grad
        if grad is None or grad is self._view:
            return
        grad = grad.detach()
        if self._kept is not None and not all_of_it:
            flat = in_order_of(grad, self._view)
            for place, part in self._brought:
                place.copy_(flat[part])
            return
        self._view.copy_(grad)
        if self._stays:
            parameter.grad = self._view

    def piece(self, parameter: Tensor) -> Tensor:
        """The part that is kept, wherever it lies."""
        grad = parameter.grad
        found = self._view if not self.reached or grad is None else grad.detach()
        return in_order_of(found, self._view)[self._kept]


@dataclass
class GradientBuffer:
    """The flat gradient of a model: ``parameter.grad`` of each parameter becomes a view into one vector.

    Before a backward pass parameters have no gradient, and torch gives each the tensor that it comes to; that is copied
    to its place while it is still in the cache. To add to zeros in place would take two passes more over the memory.
    Where nobody else adds to it, it is copied only if somebody asks for it, and so is a slice that nobody else reads.
    Parameters in half precision keep gradients of their own beside: sums are in float32, because a count beyond 256
    does not fit into bfloat16.

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
        self._arrivals = [_Arrival() for _ in self.parameters]
        self._root = 1.0, torch.ones(1)
        self.live_in(self.fresh_vector())

    def fresh_vector(self) -> Tensor:
        """Zeros for `live_in`, where the parameters are; on a CPU, those that nobody writes to take no memory."""
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        if device.type != "cpu":
            return torch.zeros(self.numel, dtype=self.dtype, device=device)
        # Not from malloc, which here keeps and clears what others have left.
        return torch.frombuffer(mmap.mmap(-1, self.numel * self.dtype.itemsize), dtype=self.dtype)

    def live_in(self, vector: Tensor, *, alone: bool = False) -> None:
        """Keep the gradient in a vector from now on.

        Parameters
        ----------
        vector : tensor, (numel,)
            Of the buffer's `dtype`. What is in it counts as a gradient, so let it be zero.
        alone : bool
            Whether nobody adds to it, so that an optimizer may use gradients where torch makes them.
        """
        self._waits = alone and self.direct
        self._apart: list[tuple[nn.Parameter, _Arrival]] = []
        self.sum = GradientSum.around(vector, len(self.parameters))
        pieces = self.sum.total.split([parameter.numel() for parameter in self.parameters])
        self._views = [shaped_like(piece, p) for p, piece in zip(self.parameters, pieces, strict=True)]
        self._grads = self._views if self.direct else [_room_for(parameter) for parameter in self.parameters]
        for parameter, arrival, view in zip(self.parameters, self._arrivals, self._views, strict=True):
            arrival.write_to(view, parameter, stays=self.direct, waits=self._waits)
        self._set_all()

    def keep_apart(self, where: slice) -> None:
        """Leave a slice of the gradient where torch makes it, for whoever sums it reads it there.

        Parameters
        ----------
        where : slice
            Of the flat vector; of gradients that are `direct`.
        """
        self._apart = []
        first = 0
        for parameter, arrival in zip(self.parameters, self._arrivals, strict=True):
            begin, end = (min(max(edge - first, 0), parameter.numel()) for edge in (where.start, where.stop))
            if begin < end:
                arrival.keep(slice(begin, end))
                self._apart.append((parameter, arrival))
            first += parameter.numel()

    def _set_all(self) -> None:
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad

    def clear(self, unit: float = 1.0) -> None:
        """Set the sum to nothing."""
        self.sum.come_late(None)
        self.sum.unit = unit
        self.sum.vector.zero_()

    def begin(self) -> None:
        """Make ready for a backward pass: parameters have no gradient then."""
        for parameter, arrival in zip(self.parameters, self._arrivals, strict=True):
            parameter.grad, arrival.reached = None, False

    def backward(self, share: ShareLoss, unit: float = 1.0) -> None:
        """Make the gradient of the loss of a share, in a unit, the sum; after `begin`, and forward.

        Parameters
        ----------
        share : ShareLoss
        unit : float
            What the gradient is divided by on its way; the same on all workers.
        """
        self.sum.unit = unit
        self.sum.note(share)
        root = share.weight / unit
        share.value.backward(None if root == 1.0 and share.value.dim() == 0 else self._root_of(root, share.value))
        self.arrived()

    def arrived(self) -> None:
        """Let the sum have what backward passes since `begin` have left."""
        for parameter, arrival in zip(self.parameters, self._arrivals, strict=True):
            if self._waits:
                arrival.look(parameter)
            elif not arrival.reached:
                arrival.bring(parameter)
        self.sum.note_reached([float(arrival.reached) for arrival in self._arrivals])
        if self._waits:
            self.sum.come_late(self._gather)
        elif self._apart:
            self.sum.come_late(self._gather, self._kept_pieces)

    def _root_of(self, root: float, value: Tensor) -> Tensor:
        """What a backward pass begins with; nearly always the same as last time."""
        known, tensor = self._root
        if known != root or tensor.dtype != value.dtype or tensor.shape != value.shape:
            tensor = value.new_full(value.shape, root)
            self._root = root, tensor
        return tensor

    def _gather(self) -> None:
        for parameter, arrival in self._apart or zip(self.parameters, self._arrivals, strict=True):
            arrival.bring(parameter, all_of_it=True)

    def _kept_pieces(self) -> list[Tensor]:
        return [arrival.piece(parameter) for parameter, arrival in self._apart]

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
        divisor = total.divisor
        if total is self.sum and total.is_late:
            reached = [p.grad for p in self.parameters if p.grad is not None]
            if reached and divisor != 1.0:
                torch._foreach_div_(reached, divisor)
            return total.mean_loss
        if total is not self.sum:
            self.sum.vector.copy_(total.vector)
        if divisor != 1.0:
            self.sum.total.div_(divisor)
        self._set_all()
        if not self.direct:
            for grad, view in zip(self._grads, self._views, strict=True):
                grad.copy_(view)
        self._unset_unreached()
        return total.mean_loss

    def _unset_unreached(self) -> None:
        reached = self.sum.reached
        if not all(reached):
            for parameter, by in zip(self.parameters, reached, strict=True):
                if not by:
                    parameter.grad = None
