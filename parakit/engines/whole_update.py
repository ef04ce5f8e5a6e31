"""The whole update: this worker's optimizer, over all parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parakit.gradients.gradient_buffer import GradientBuffer
from parakit.gradients.gradient_sum import GradientSum
from parakit.model_state.hooks import ParameterHooks

__all__ = ["WholeUpdate"]


class WholeUpdate:
    """A step of an optimizer over all parameters.

    Parameters
    ----------
    optimizer : Optimizer
    buffer : GradientBuffer
    hooks : ParameterHooks
        That were taken off the parameters.
    closure : bool
        Whether the optimizer evaluates the loss itself, several times a step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, buffer: GradientBuffer, hooks: ParameterHooks, *, closure: bool
    ) -> None:
        self._optimizer, self._buffer, self._hooks, self._closure = optimizer, buffer, hooks, closure

    def load(self, total: GradientSum) -> None:
        """Make the mean over the batch the gradient."""
        self._buffer.load(total)

    def squared_norm(self) -> float:
        """Of the gradient."""
        gradient = self._buffer.sum.total
        return float(torch.dot(gradient, gradient))

    def call_hooks(self) -> None:
        """Let hooks have the gradients of their parameters."""
        self._hooks.call()

    def clip(self, most: float) -> None:
        """Scale the gradient down to a 2-norm."""
        nn.utils.clip_grad_norm_(self._buffer.parameters, most)

    def step(self, evaluate: Callable[[], float]) -> None:
        """One step of the optimizer."""
        if not self._closure:
            evaluate()
            self._optimizer.step()
            return

        def closure() -> Tensor:
            return torch.tensor(evaluate(), dtype=torch.float64)

        self._optimizer.step(closure)  # type: ignore[arg-type]  # as torch's own may return tensors too
