"""Where the gradients of a backward pass go: three ways, of which a buffer has one at a time.

`Copied`: into the flat vector, for others to add to. `InPlace`: they stay where torch makes them, where nobody else
adds to them. `Sliced`: copied, but for a slice that nobody else reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parakit.gradients.gradient_sum import GradientSum
from parakit.tensor_layout import in_order_of, shaped_like

__all__ = ["Copied", "InPlace", "Sliced"]


class _Arrival:
    """Brings the gradient of one parameter to its place; called by torch when there is one.

    It does not know its parameter: torch holds on to whom it is to call, where Python cannot see that, and so would
    never let go of two that know each other.
    """

    def __init__(self, view: Tensor) -> None:
        self._view = view
        self.used = False

    def __call__(self, parameter: Tensor) -> None:
        self.look(parameter)
        self.bring(parameter)

    def look(self, parameter: Tensor) -> None:
        """Note whether there is a gradient, and make it dense."""
        grad = parameter.grad
        self.used = grad is not None
        if grad is not None and grad.is_sparse:
            parameter.grad = grad.to_dense()

    def bring(self, parameter: Tensor) -> None:
        """Copy it to its place, unless it is there: what a model accumulates in several goes is added in place."""
        if not self.used:
            self._view.zero_()
        elif (grad := parameter.grad) is not None and grad is not self._view:
            self._copy(grad.detach())

    def _copy(self, grad: Tensor) -> None:
        self._view.copy_(grad)


class _StayingArrival(_Arrival):
    """The same, and the place is the gradient of the parameter from then on."""

    def bring(self, parameter: Tensor) -> None:
        super().bring(parameter)
        if self.used and parameter.grad is not self._view:
            parameter.grad = self._view


class _ArrivalAround(_Arrival):
    """Leaves a part of a gradient, of its elements in their order, where torch makes it."""

    def __init__(self, view: Tensor, kept: slice) -> None:
        super().__init__(view)
        self._kept = kept
        flat = in_order_of(view, view)
        around = (slice(0, kept.start), slice(kept.stop, flat.numel()))
        self._brought = [(flat[part], part) for part in around if part.start < part.stop]

    def _copy(self, grad: Tensor) -> None:
        flat = in_order_of(grad, self._view)
        for place, part in self._brought:
            place.copy_(flat[part])

    def bring_all(self, parameter: Tensor) -> None:
        """Copy the part that was left too."""
        if self.used and parameter.grad is not None:
            self._view.copy_(parameter.grad.detach())

    def piece(self, parameter: Tensor) -> Tensor:
        """The part that is left, wherever it lies."""
        grad = parameter.grad
        found = self._view if not self.used or grad is None else grad.detach()
        return in_order_of(found, self._view)[self._kept]


class Copied:
    """Gradients are copied into the flat vector as they are made, while they are still in the cache.

    Parameters
    ----------
    parameters : sequence of Parameter
    total : GradientSum
        Around the flat vector.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], total: GradientSum) -> None:
        self._parameters, self._sum = parameters, total
        pieces = total.total.split([parameter.numel() for parameter in parameters])
        self._views = [shaped_like(piece, p) for p, piece in zip(parameters, pieces, strict=True)]
        self._direct = all(parameter.dtype == total.vector.dtype for parameter in parameters)
        self._grads = self._views if self._direct else [_room_for(parameter) for parameter in parameters]
        self._arrivals = self._arrivals_of()
        self._told = self._registered()
        self._set_all()

    def _arrivals_of(self) -> Sequence[_Arrival]:
        kind = _StayingArrival if self._direct else _Arrival
        return [kind(view) for view in self._views]

    def _registered(self) -> list[torch.utils.hooks.RemovableHandle]:
        pairs = zip(self._parameters, self._arrivals, strict=True)
        return [parameter.register_post_accumulate_grad_hook(arrival) for parameter, arrival in pairs]

    def close(self) -> None:
        """Let gradients go elsewhere."""
        for handle in self._told:
            handle.remove()

    def _set_all(self) -> None:
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad

    def begin(self) -> None:
        """Make ready for a backward pass: parameters have no gradient then."""
        for parameter, arrival in zip(self._parameters, self._arrivals, strict=True):
            parameter.grad, arrival.used = None, False

    def take_arrivals(self) -> None:
        """Let the sum have what backward passes since `begin` have left."""
        for parameter, arrival in zip(self._parameters, self._arrivals, strict=True):
            if not arrival.used:
                arrival.bring(parameter)
        self._note_used()

    def _note_used(self) -> None:
        self._sum.note_used([float(arrival.used) for arrival in self._arrivals])

    def detach_slice(self) -> tuple[Tensor, list[Tensor] | None]:
        """The vector, and the pieces of a slice that is not in it; from now on nobody brings them there."""
        return self._sum.vector, None

    def load(self, total: GradientSum) -> None:
        """Make the mean of a global sum the gradient that an optimizer sees."""
        if total is not self._sum:
            self._sum.vector.copy_(total.vector)
        if total.divisor != 1.0:
            self._sum.total.div_(total.divisor)
        self._set_all()
        if not self._direct:
            for grad, view in zip(self._grads, self._views, strict=True):
                grad.copy_(view)
        used = self._sum.used
        if not all(used):
            for parameter, by in zip(self._parameters, used, strict=True):
                if not by:
                    parameter.grad = None


class InPlace(Copied):
    """Gradients stay where torch makes them, and are copied only if somebody asks for the sum."""

    def _registered(self) -> list[torch.utils.hooks.RemovableHandle]:
        return []

    def take_arrivals(self) -> None:
        """Let the sum have what backward passes since `begin` have left, when it is asked for it."""
        for parameter, arrival in zip(self._parameters, self._arrivals, strict=True):
            arrival.look(parameter)
        self._note_used()
        self._sum.defer(self._gather)

    def _gather(self) -> None:
        for parameter, arrival in zip(self._parameters, self._arrivals, strict=True):
            arrival.bring(parameter)

    def load(self, total: GradientSum) -> None:
        """Divide gradients where they are, if they are the global sum."""
        if total is not self._sum or not total.is_late:
            super().load(total)
        elif total.divisor != 1.0 and (used := [p.grad for p in self._parameters if p.grad is not None]):
            torch._foreach_div_(used, total.divisor)


class Sliced(Copied):
    """Gradients are copied, but for a slice that stays where torch makes it, for whoever sums it reads it there.

    Parameters
    ----------
    parameters : sequence of Parameter
        All of the flat vector's type.
    total : GradientSum
    where : slice
        Of the flat vector.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], total: GradientSum, where: slice) -> None:
        self._where = where
        self._apart: list[tuple[nn.Parameter, _ArrivalAround]] = []
        super().__init__(parameters, total)

    def _arrivals_of(self) -> Sequence[_Arrival]:
        arrivals: list[_Arrival] = []
        first = 0
        for parameter, view in zip(self._parameters, self._views, strict=True):
            begin, end = (min(max(edge - first, 0), view.numel()) for edge in (self._where.start, self._where.stop))
            first += view.numel()
            if begin < end:
                around = _ArrivalAround(view, slice(begin, end))
                self._apart.append((parameter, around))
                arrivals.append(around)
            else:
                arrivals.append(_StayingArrival(view))
        return arrivals

    def take_arrivals(self) -> None:
        """Let the sum have what backward passes since `begin` have left; the slice when it is asked for it."""
        super().take_arrivals()
        self._sum.defer(self._gather if self._apart else None)

    def _gather(self) -> None:
        for parameter, arrival in self._apart:
            arrival.bring_all(parameter)

    def detach_slice(self) -> tuple[Tensor, list[Tensor] | None]:
        """The vector, and the pieces of the slice, unless somebody asked for it before."""
        if not self._sum.is_late:
            return self._sum.vector, None
        return self._sum.without_what_is_late(), [arrival.piece(parameter) for parameter, arrival in self._apart]


def _room_for(parameter: Tensor) -> Tensor:
    """Zeros for the gradient of a parameter, laid out as that is."""
    return shaped_like(torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device), parameter)
