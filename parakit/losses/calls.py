"""Calls of torch's losses for classes, wherever code makes them: in a function, a partial, a subclass, or in forward.

Torch divides a mean over classes by the sum of the weights of the labels that are not ignored, a number that one share
of a batch does not know of the whole. `CallsOfLosses` sees each such call, however deep it is, so that the sum can be
divided by what it is for the whole batch; and it sees what is compared with which labels, from which follows whether an
accuracy means anything, and which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["CallsOfLosses", "Judged", "weight_sum"]

_NLL = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
_NAMES: dict[Any, tuple[str, ...]] = {F.cross_entropy: (*_NLL, "label_smoothing"), F.nll_loss: _NLL}
_BY_CLASS = (F.cross_entropy, F.nll_loss, F.multi_margin_loss)
_BY_YES_OR_NO = {F.binary_cross_entropy_with_logits: 0.0, F.binary_cross_entropy: 0.5}

#: From the number of a call and the weights that a share has in it to the weights to divide by.
Divide = Callable[[int, Tensor | float], Tensor | float]


@dataclass(frozen=True)
class Judged:
    """Predictions that were judged.

    Attributes
    ----------
    right, of : int
    """

    right: int = 0
    of: int = 0


@dataclass
class _Comparison:
    """What a loss compared."""

    output: Tensor
    target: Tensor
    ignored: int
    middle: float | None  # between yes and no; None for classes

    def is_like(self, other: _Comparison) -> bool:
        return self.output is other.output and self.target is other.target

    def judge(self) -> Judged:
        output, target = self.output.detach(), self.target.detach()
        if self.middle is not None:
            return Judged(int(((output > self.middle) == (target > 0.5)).sum()), target.numel())
        labels = target.long()
        counted = labels != self.ignored
        found = output.argmax(1 if output.ndim > 1 else 0)
        return Judged(int(((found == labels) & counted).sum()), int(counted.sum()))


class CallsOfLosses(TorchFunctionMode):
    """Sees calls of torch's losses while it is entered.

    Parameters
    ----------
    divide : callable, optional
        Where it is given, means over classes become sums over a share, divided by what it returns.
    judging : bool
        Whether to keep what was compared, for `count_right`.
    apart : bool
        Whether means over classes are to be leaves of the graph, so that it can be told what becomes of each.

    Attributes
    ----------
    weights : list
        The sum of weights of each mean over classes, in the order of the calls.
    ignored : set of int
        Labels that such a mean leaves out.
    weighted : bool
        Whether one of them had weights for classes.
    means : list of tensors
        Those that are leaves.
    """

    def __init__(self, divide: Divide | None = None, *, judging: bool = False, apart: bool = False) -> None:
        super().__init__()
        self.weights: list[Tensor | float] = []
        self.ignored: set[int] = set()
        self.weighted = False
        self._divide = divide
        self._judging, self._apart = judging, apart
        self.means: list[Tensor] = []
        self._compared: list[_Comparison] = []

    def __torch_function__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names = _NAMES.get(function)
        if self._judging:
            self._note(function, args, kwargs)
        if names is None:
            return function(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        target = given["target"]
        averages = given.get("reduction", "mean") == "mean" and given.get("reduce") is None
        if not averages or given.get("size_average") is not None or target.is_floating_point():
            return function(*args, **kwargs)
        ignored = given.get("ignore_index", -100)
        weight = weight_sum(target, given.get("weight"), ignored)
        self.ignored.add(ignored)
        self.weighted |= given.get("weight") is not None
        number = len(self.weights)
        self.weights.append(weight)
        if self._apart:
            # A mean over nothing is no number; it adds nothing where others have some.
            mean = function(*args, **kwargs) if float(weight) else given["input"].new_zeros(())
            self.means.append(mean.detach().requires_grad_())
            return self.means[-1]
        if self._divide is None:
            return function(*args, **kwargs)
        return function(**given | {"reduction": "sum"}) / self._divide(number, weight)

    def _note(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if function not in _BY_CLASS and function not in _BY_YES_OR_NO:
            return
        given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
        output, target = given.get("input"), given.get("target")
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return
        if function in _BY_YES_OR_NO:
            if output.shape == target.shape and bool(((target == 0) | (target == 1)).all()):
                self._compared.append(_Comparison(output, target, 0, _BY_YES_OR_NO[function]))
        elif not target.is_floating_point():
            names = _NAMES.get(function, ())
            ignored = {**dict(zip(names, args, strict=False)), **kwargs}.get("ignore_index", -100)
            self._compared.append(_Comparison(output, target, ignored, None))

    def count_right(self) -> Judged | None:
        """How many classes were predicted rightly; None where nothing, or not one thing alone, was compared."""
        compared = self._compared
        if not compared or any(not other.is_like(compared[0]) for other in compared[1:]):
            return None
        return compared[0].judge()


def weight_sum(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor | float:
    """What torch divides by in a mean over classes: the weights of the targets that are not ignored.

    Parameters
    ----------
    target : integer tensor
    weight : tensor, (classes,), optional
    ignored : int
    """
    # In eight bits, -100 would be a class.
    counted = target.long() != ignored
    if weight is None:
        return float(counted.sum())
    weights: Tensor = weight[target.long() * counted]  # class 0 stands in for what is ignored
    return torch.where(counted, weights, 0.0).sum()
