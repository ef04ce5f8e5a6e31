"""The memory that backward adds gradients up in."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parakit.gradients.gradient_sum import TAIL, GradientSum
from parakit.gradients.placement import Copied, InPlace, Sliced
from parakit.losses.summed import ShareLoss

__all__ = ["GradientBuffer"]


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
    parameters : sequence of Parameter
        The trainable ones, in a fixed order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        kinds = {parameter.dtype for parameter in parameters}
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        #: Whether the gradients that parameters have are views into the flat vector.
        self.direct = kinds == {self.dtype}
        #: Elements of the flat vector: the gradient, and what rides behind it.
        self.numel = sum(parameter.numel() for parameter in parameters) + len(parameters) + TAIL
        self._root = 1.0, torch.ones(1)
        self._placement: Copied | None = None
        self.live_in(self.fresh_vector())

    def fresh_vector(self) -> Tensor:
        """Zeros for `live_in`, where the parameters are; on a CPU, those that nobody writes to take no memory."""
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        if device.type != "cpu":
            return torch.zeros(self.numel, dtype=self.dtype, device=device)
        # Not from malloc, which here keeps and clears what others have left.
        return torch.frombuffer(mmap.mmap(-1, self.numel * self.dtype.itemsize), dtype=self.dtype)

    def live_in(self, vector: Tensor, *, alone: bool = False, kept: slice | None = None) -> None:
        """Keep the gradient in a vector from now on.

        Parameters
        ----------
        vector : tensor, (numel,)
            Of the buffer's `dtype`. What is in it counts as a gradient, so let it be zero.
        alone : bool
            Whether nobody adds to it, so that an optimizer may use gradients where torch makes them.
        kept : slice, optional
            Of the gradient, where torch makes it: whoever sums that slice reads it there. Only of one that is `direct`.
        """
        if self._placement is not None:
            self._placement.close()
        self.sum = GradientSum(vector, len(self.parameters))
        if kept is not None:
            self._placement = Sliced(self.parameters, self.sum, kept)
        else:
            self._placement = (InPlace if alone and self.direct else Copied)(self.parameters, self.sum)

    @property
    def _placed(self) -> Copied:
        assert self._placement is not None
        return self._placement

    def clear(self, unit: float = 1.0) -> None:
        """Set the sum to nothing."""
        self.sum.defer(None)
        self.sum.unit = unit
        self.sum.vector.zero_()

    def begin(self) -> None:
        """Make ready for a backward pass: parameters have no gradient then."""
        self._placed.begin()

    def backward(self, share: ShareLoss, unit: float = 1.0) -> None:
        """Make the gradient of the loss of a share, in a unit, the sum; after `begin`, and forward.

        Parameters
        ----------
        share : ShareLoss
        unit : float
            What the gradient is divided by on its way; the same on all workers.
        """
        root = share.weight / unit
        share.value.backward(None if root == 1.0 and share.value.dim() == 0 else self._root_of(root, share.value))
        self.take_arrivals(share, unit)

    def take_arrivals(self, share: ShareLoss, unit: float = 1.0) -> None:
        """Let the sum have what backward passes since `begin` have left: the gradient of a share, in a unit."""
        self.sum.unit = unit
        self.sum.note(share)
        self._placed.take_arrivals()

    def _root_of(self, root: float, value: Tensor) -> Tensor:
        """What a backward pass begins with; nearly always the same as last time."""
        known, tensor = self._root
        if known != root or tensor.dtype != value.dtype or tensor.shape != value.shape:
            tensor = value.new_full(value.shape, root)
            self._root = root, tensor
        return tensor

    def detach_slice(self, part: GradientSum) -> tuple[Tensor, list[Tensor] | None]:
        """The vector of a part, and the pieces of a slice that is not in it; from now on nobody brings them there."""
        return self._placed.detach_slice() if part is self.sum else (part.vector, None)

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
        self._placed.load(total)
        return total.mean_loss
