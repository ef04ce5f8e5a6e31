"""Losses as sums: what makes uneven shares exact.

A mean over one worker's share says nothing exact about the mean over the batch; a sum does. So a loss is seen as a
*sum over samples* and a *count*, both of which add up across workers, and one division by the global count gives the
loss and the gradient that a single process would have computed. For losses that torch averages by weights (class
weights, `ignore_index`), the count is the sum of those weights; a loss of a user's own may say sum and count itself.

Which form a loss has, `parakit.losses.forms` finds out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.errors import LossError
from parakit.losses.calls import CallsOfLosses, Divide, weight_sum
from parakit.trees import Tree, leaves

__all__ = [
    "ELEMENTWISE", "WEIGHTED", "Form", "ShareLoss", "SummedLoss", "as_object", "check_loss", "check_scalar", "describe",
    "form_of_known", "is_same", "mean_of", "rows_of", "together",
]  # fmt: skip

#: "mean", "sum": over samples. "weighted": torch's loss object with weights. "weighted calls": a function of calls of
#: torch's losses that all have the same weights, by whose sum its value counts. "several means": one of such calls with
#: weights of their own, which workers add up in each step. "counted": it says sum and count itself.
Form = Literal["mean", "sum", "weighted", "weighted calls", "several means", "counted"]

#: Torch's losses that take class labels, and weights for them.
WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss)
#: Torch's losses whose means are means over rows of what each row contributes.
ELEMENTWISE = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss,
    nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss, nn.MultiMarginLoss,
    nn.HingeEmbeddingLoss,
)  # fmt: skip
_FUNCTIONS: tuple[tuple[Any, Callable[[], nn.Module]], ...] = (
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.nll_loss, nn.NLLLoss),
    (F.mse_loss, nn.MSELoss),
    (F.l1_loss, nn.L1Loss),
    (F.smooth_l1_loss, nn.SmoothL1Loss),
    (F.huber_loss, nn.HuberLoss),
    (F.binary_cross_entropy, nn.BCELoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
)
# Float32 rounding over a handful of samples stays far below this; a wrong kind of mean does not.
_SAME = 1e-4
_NOTHING = 1e-6  # a loss is compared as if it were at least this large


@dataclass(frozen=True)
class ShareLoss:
    """The loss of some samples of a batch.

    Attributes
    ----------
    value : scalar tensor
        With its graph.
    weight : float
        By which the value is a sum over the samples.
    count : float
        What sums are divided by, once they are added up; 0 for a loss that is itself a sum.
    """

    value: Tensor
    weight: float
    count: float

    @property
    def total(self) -> float:
        """The sum over the samples."""
        return float(self.value.detach()) * self.weight


@dataclass(frozen=True)
class SummedLoss:
    """A loss as a sum over samples and a count.

    Parameters
    ----------
    function : callable
        The user's loss.
    form : Form
    calls : int
        How many means over classes it calls for, where they are "several means".
    """

    function: Callable[[Any, Any], Any]
    form: Form
    calls: int = 0

    def of_share(self, model: Callable[[], Tree], target: Tree, divide: Divide | None = None) -> ShareLoss:
        """The loss of what a model makes of some samples.

        Parameters
        ----------
        model : callable
            Returns the output for the samples; called once.
        target : tree of tensors
            Of the samples.
        divide : callable, optional
            Where it is "several means": from the number of a call and the weights of these samples to those of the
            batch, for as much of the batch as these samples are of its rows.
        """
        rows = rows_of(target)
        if self.form in ("mean", "sum"):
            value = self.function(model(), target)
            return ShareLoss(value, float(rows), float(rows)) if self.divides else ShareLoss(value, 1.0, 0.0)
        if self.form == "counted":
            value, count = self.function(model(), target)
            return ShareLoss(value, 1.0, float(count))
        if self.form == "weighted":
            output = model()
            loss: Any = self.function
            return ShareLoss(_summing(loss)(output, target), 1.0, float(_weights(loss, output, target)))
        if self.form == "weighted calls":
            with CallsOfLosses(_by_their_own) as seen:
                value = self.function(model(), target)
            weights = self._common(seen.weights)
            return ShareLoss(value, weights, weights)
        with CallsOfLosses(divide) as seen:
            value = self.function(model(), target)
        self._check_calls(seen.weights)
        return ShareLoss(value, float(rows), float(rows))

    def __call__(self, output: Tree, target: Tree) -> ShareLoss:
        """The loss of some samples whose output is there."""
        return self.of_share(lambda: output, target)

    def _common(self, weights: Sequence[Tensor | float]) -> float:
        sums = [float(weight) for weight in weights]
        self._check_calls(sums)
        if any(abs(each - sums[0]) > _SAME * abs(sums[0]) for each in sums):
            raise LossError(
                f"The loss {self.original} divided by sums of weights that differ, "
                f"{', '.join(f'{s:g}' for s in sums)}; when it was tried they were the same.",
                cause="targets of which some are ignored in one part of the loss and not in another",
                remedy="return (sum, count) from the loss, or give each part as nn.CrossEntropyLoss(reduction='sum') "
                "over a count of your own",
            )
        return sums[0]

    def _check_calls(self, weights: Sequence[Any]) -> None:
        if len(weights) != self.calls:
            raise LossError(
                f"The loss {self.original} averaged over classes {len(weights)} times in a step, and {self.calls} "
                "times when it was tried.",
                cause="a branch that depends on the samples or on the step",
                remedy="return (sum, count) from the loss: both are added up over the workers",
            )

    def on(self, device: torch.device) -> SummedLoss:
        """The same loss with its weights on a device; itself, where it has none of its own."""
        if isinstance(self.function, nn.Module) and device.type != "cpu":
            self.function.to(device)  # in place: it may share parameters with the model
        return self

    def knowing(self, *every: Tree) -> SummedLoss:
        """The same loss, which need not look for labels to ignore, if it will be given none of them.

        Parameters
        ----------
        every : trees of tensors
            All targets that it will ever be given.
        """
        loss: Any = self.function
        if self.form != "weighted" or loss.weight is not None:
            return self
        for target in every:
            if not isinstance(target, Tensor) or target.is_floating_point():
                return self
            if bool((target.long() == loss.ignore_index).any()):
                return self
        return replace(self, form="mean")

    @property
    def divides(self) -> bool:
        """Whether it is a mean; else it is a sum."""
        return self.form != "sum"

    @property
    def meets(self) -> bool:
        """Whether workers have to add something up in the middle of it."""
        return self.form == "several means"

    @property
    def original(self) -> str:
        """The loss's name, for people."""
        return getattr(self.function, "__name__", type(self.function).__name__)


def _by_their_own(_number: int, weights: Any) -> Any:
    """A mean, and nothing where there is nothing to average."""
    return weights if float(weights) else 1.0


def rows_of(target: Tree) -> int:
    """Rows of some targets."""
    return len(target) if isinstance(target, Tensor) else len(leaves(target)[0])


def _summing(loss: nn.Module) -> nn.Module:
    twin = copy.copy(loss)
    twin.reduction = "sum"  # type: ignore[assignment]  # an attribute of torch's losses
    return twin


def _weights(loss: Any, output: Tensor, target: Tensor) -> Tensor | float:
    if target.is_floating_point():  # class probabilities: torch divides by the number of rows, whatever the weights
        return float(output.numel() // output.shape[min(1, output.ndim - 1)])
    return weight_sum(target, loss.weight, loss.ignore_index)


# --- which form


def check_loss(loss: Any, own: Sequence[nn.Parameter]) -> Any:
    """The loss object that does what one of torch's loss functions does; anything else as it is.

    Parameters
    ----------
    loss : object
        What a user gave.
    own : sequence of Parameter
        Of the model, which a loss may know.

    Raises
    ------
    LossError
        If it cannot be called, or has parameters of its own to train.
    """
    if not callable(loss) or isinstance(loss, type):
        raise LossError(
            f"The loss is {loss!r}, which cannot be called with (output, target).",
            remedy="give an instance such as nn.CrossEntropyLoss(), or a function",
        )
    if isinstance(loss, nn.Module):
        known = set(map(id, own))
        foreign = [name for name, p in loss.named_parameters() if p.requires_grad and id(p) not in known]
        if foreign:
            raise LossError(
                f"The loss {type(loss).__name__} has trainable parameters of its own: {', '.join(foreign[:3])}.",
                remedy="make them part of the model, whose output may be a tuple that the loss reads",
            )
    return as_object(loss)


def as_object(loss: Any) -> Any:
    """The loss object that does what one of torch's loss functions does; anything else as it is."""
    return next((twin() for function, twin in _FUNCTIONS if loss is function), loss)


def form_of_known(loss: Any) -> Form | None:
    """The form of one of torch's own loss objects, which need not be tried; None for anything else."""
    if type(loss) not in WEIGHTED + ELEMENTWISE:
        return None
    if loss.reduction == "sum":
        return "sum"
    return "weighted" if type(loss) in WEIGHTED else "mean"


def is_same(one: float, other: float, tolerance: float = _SAME) -> bool:
    """Whether two losses are equal, up to what rounding does."""
    return abs(one - other) <= tolerance * max(_NOTHING, abs(one), abs(other)) or (one != one and other != other)


def check_scalar(value: Any) -> Any:
    """What a loss returned: one number, or a sum and a count."""
    if isinstance(value, tuple | list) and len(value) == 2:
        total, count = value
        single = isinstance(count, Real) or (isinstance(count, Tensor) and count.numel() == 1)
        if _is_scalar(total) and single and float(count) >= 0:
            return total, float(count)
        raise LossError(
            f"The loss returned a pair of {_described(total)} and {_described(count)}; it may return (sum, count): a "
            "scalar tensor, and a number of at least 0 to divide by.",
            remedy="sum over the samples first; the count is what a mean would divide by",
        )
    if not _is_scalar(value):
        raise LossError(
            f"The loss returned {_described(value)}; training needs one number, or (sum, count).",
            cause='reduction="none", or a function that does not reduce',
            remedy="reduce over the samples by their mean or their sum",
        )
    return value


def mean_of(value: Any) -> Any:
    """What a plain loop goes back from: what a loss returned, or its sum over its count."""
    if isinstance(value, tuple | list):
        total, count = value
        return total / float(count)
    return value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"


def together(shares: Sequence[ShareLoss]) -> float:
    """The loss of several shares of a batch together."""
    count = sum(share.count for share in shares)
    return sum(share.total for share in shares) / (count or 1.0)


def describe(tree: Tree) -> str:
    """Types and shapes of tensors, for messages."""
    said = [f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}" for leaf in leaves(tree)
            if isinstance(leaf, Tensor)]  # fmt: skip
    return " and ".join(said) or f"a {type(tree).__name__}"
