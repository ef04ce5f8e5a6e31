"""The memory that backward adds gradients up in."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parakit.gradients.gradient_sum import _TAIL, GradientSum, _room_for
from parakit.losses.summed import ShareLoss
from parakit.tensor_layout import in_order_of, shaped_like

__all__ = ["GradientBuffer"]


class _Arrival:
    """Brings the gradient of one parameter to its place; called by torch when there is one, unless it is to wait.

    It does not know its parameter: torch holds on to whom it is to call, where Python cannot see that, and so would
    never let go of two that know each other.
    """

    def __init__(self) -> None:
        self._told: RemovableHandle | None = None
        self.used = False

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
        self.used = grad is not None
        if grad is not None and grad.is_sparse:
            parameter.grad = grad.to_dense()

    def bring(self, parameter: Tensor, *, all_of_it: bool = False) -> None:
        """Copy it to its place, unless it is there: what a model accumulates in several goes is added in place."""
        if not self.used:
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
        found = self._view if not self.used or grad is None else grad.detach()
        return in_order_of(found, self._view)[self._kept]


@dataclass
class GradientBuffer:
    """The flat gradient of a model: ``parameter.grad`` of each parameter becomes a view into one vector.

    Before a backward pass parameters have no gradient, and torch gives each the tensor that it comes to; that is copied
    to its place while it is still in the cache. To add to zeros in place would take two passes more over the memory.
    Where nobody else adds to it, it is copied only if somebody asks for it, and so is a slice that nobody else reads.
    Parameters in half precision keep gradients of their own beside: sums are in float32, because a count beyond 256
    does not fit into bfloat16.

    A parameter that no share of a batch used (a branch not taken) has no gradient after `load`, as in a plain loop,
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

    def leave_slice(self, where: slice) -> None:
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
        self.sum.defer(None)
        self.sum.unit = unit
        self.sum.vector.zero_()

    def begin(self) -> None:
        """Make ready for a backward pass: parameters have no gradient then."""
        for parameter, arrival in zip(self.parameters, self._arrivals, strict=True):
            parameter.grad, arrival.used = None, False

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
            elif not arrival.used:
                arrival.bring(parameter)
        self.sum.note_used([float(arrival.used) for arrival in self._arrivals])
        if self._waits:
            self.sum.defer(self._gather)
        elif self._apart:
            self.sum.defer(self._gather, self._kept_pieces)

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
            used = [p.grad for p in self.parameters if p.grad is not None]
            if used and divisor != 1.0:
                torch._foreach_div_(used, divisor)
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
        used = self.sum.used
        if not all(used):
            for parameter, by in zip(self.parameters, used, strict=True):
                if not by:
                    parameter.grad = None
