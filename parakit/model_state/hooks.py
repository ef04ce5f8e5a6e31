"""Hooks on parameters: what somebody does to a gradient before the optimizer sees it.

In a plain loop such a hook gets the gradient of the whole batch. A share's gradient is a part of it, and a hook that
clips, normalises or thresholds would do something else to parts than to the whole. So hooks are taken off the
parameters of a worker's model, and called when gradients have been added up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from parakit.tensor_layout import shaped_like

__all__ = ["ParameterHooks"]

#: Hooks by the numbers of their handles.
Table = MutableMapping[int, Callable[..., Any]]


class ParameterHooks:
    """The hooks of some parameters, which have none any more.

    Parameters
    ----------
    parameters : sequence of Parameter
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        tables = [(parameter, *_taken_off(parameter)) for parameter in parameters]
        self._of = [(parameter, before, after) for parameter, before, after in tables if before or after]

    def __bool__(self) -> bool:
        return bool(self._of)

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """All of them, by parameters, in the order in which they were registered."""
        return [hook for _, before, after in self._of for hook in (*before.values(), *after.values())]

    def call(self, only: Tensor | None = None) -> None:
        """Call them with the gradients that parameters have now, in the order in which they were registered.

        Parameters
        ----------
        only : Parameter, optional
            Whose hooks to call; all by default.
        """
        for parameter, before, after in self._of:
            if parameter.grad is None or (only is not None and parameter is not only):
                continue
            grad = parameter.grad
            for hook in list(before.values()):  # one may take itself off, by its handle
                changed = hook(grad)
                grad = grad if changed is None else changed
            if grad is not parameter.grad:
                parameter.grad = _laid_out(grad.detach(), parameter)
            for hook in list(after.values()):
                hook(parameter)


def _taken_off(parameter: nn.Parameter) -> tuple[Table, Table]:
    """The tables of a parameter's hooks, which handles know; the parameter has others from now on."""
    before = parameter._backward_hooks or {}
    after = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    if before:
        parameter._backward_hooks = OrderedDict()
    if after:
        parameter._post_accumulate_grad_hooks = OrderedDict()
    return before, after


def _laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient laid out as its parameter is, as updates that go by memory need it."""
    if grad.stride() == parameter.stride() and grad.dtype == parameter.dtype:
        return grad
    made = shaped_like(parameter.new_empty(parameter.numel()), parameter)
    return made.copy_(grad)
