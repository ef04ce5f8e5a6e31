"""Losses as sums: what makes uneven shares exact.

A mean over one worker's share says nothing exact about the mean over the batch; a sum does. So a loss is split into
a *sum over samples* and a *count*, both of which add up across workers, and one division by the global count gives
the loss and the gradient that a single process would have computed. For losses that torch averages by weights
(class weights, `ignore_index`), the count is the sum of those weights. What is neither a sum nor a mean over samples
is refused, not approximated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.data import Tree, leaves, map_tree
from parakit.errors import DataError, LossError

__all__ = ["SummedLoss", "check_labels", "summed"]

_WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss)
# Their mean is the plain mean over what reduction="none" returns.
_ELEMENTWISE = (
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


@dataclass(frozen=True)
class SummedLoss:
    """A loss as a sum over samples and a count.

    Parameters
    ----------
    function : callable
        The user's loss, or its summing twin.
    kind : {"weighted", "labels", "elementwise", "batch", "sum", "mean of samples"}
        How the sum and the count are found. "labels" is "weighted" where every label counts as one.
    """

    function: Callable[[Any, Any], Any]
    kind: str

    def __call__(self, output: Tree, target: Tree) -> tuple[Tensor, Tensor | float]:
        """The sum over the samples given, with its gradient, and the count to divide by.

        Parameters
        ----------
        output, target : tree of tensors
            What the model returned for some samples, and their targets.

        Returns
        -------
        total : scalar tensor
            Adds up over shares.
        count : scalar tensor or float
            Adds up over shares; 0 for a loss that is a sum and is not divided.
        """
        value = self.function(output, target)
        if self.kind == "weighted":
            return value, _weight_sum(self.function, output, target)
        if self.kind == "labels":
            return value, float(target.numel())
        if self.kind == "elementwise":
            return value.sum(), float(value.numel())
        if self.kind == "batch":
            return value, float(_rows(target))
        if self.kind == "sum":
            return value, 0.0
        return value * _rows(target), float(_rows(target))

    def on(self, device: torch.device) -> SummedLoss:
        """The same loss with its weights on a device; itself, where it has none of its own."""
        if not isinstance(self.function, nn.Module) or device.type == "cpu":
            return self
        return replace(self, function=copy.deepcopy(self.function).to(device))

    def knowing(self, *every: Tree) -> SummedLoss:
        """The same loss, which need not look for labels to ignore, if it will be given none of them.

        Parameters
        ----------
        every : trees of tensors
            All targets that it will ever be given.
        """
        loss: Any = self.function
        if self.kind != "weighted" or loss.weight is not None:
            return self
        if any(not isinstance(t, Tensor) or t.is_floating_point() or bool(_ignored(loss, t).any()) for t in every):
            return self
        return replace(self, kind="labels")

    @property
    def divides(self) -> bool:
        """Whether it is a mean; else it is a sum."""
        return self.kind != "sum"

    @property
    def original(self) -> str:
        """The loss's name, for people."""
        return getattr(self.function, "__name__", type(self.function).__name__)


def _rows(target: Tree) -> int:
    return len(leaves(target)[0])


def _weight_sum(loss: Any, output: Tensor, target: Tensor) -> Tensor | float:
    """What torch divides by in the mean of a cross entropy: the weights of the targets that are not ignored."""
    if target.is_floating_point():  # class probabilities: torch divides by the number of rows, whatever the weights
        return float(output.numel() // output.shape[min(1, output.ndim - 1)])
    counted = ~_ignored(loss, target)
    if loss.weight is None:
        return float(counted.sum())
    weights: Tensor = loss.weight[target.long() * counted]  # row 0 stands in for what is ignored
    return torch.where(counted, weights, 0.0).sum()


def _ignored(loss: Any, labels: Tensor) -> Tensor:
    """Which labels a cross entropy leaves out."""
    ignored: Tensor = labels.long() == loss.ignore_index  # in eight bits, -100 would be a class
    return ignored


def summed(loss: Any, output: Tree, target: Tree) -> SummedLoss:
    """The summing form of a user's loss, checked on a few samples.

    Parameters
    ----------
    loss : callable
        Takes (output, target) and returns a scalar.
    output, target : tree of tensors
        A model's output for some samples, at least two, and their targets.

    Returns
    -------
    SummedLoss

    Raises
    ------
    LossError
        If it is no callable, returns no scalar, has parameters of its own, or does not add up over samples.
    """
    if not callable(loss) or isinstance(loss, type):
        raise LossError(
            f"The loss is {loss!r}, which cannot be called with (output, target).",
            remedy="give an instance such as nn.CrossEntropyLoss(), or a function",
        )
    loss = _module(loss)
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise LossError(
            f"The loss {type(loss).__name__} has trainable parameters of its own.",
            remedy="make them part of the model, whose output may be a tuple that the loss reads",
        )
    _check_scalar(loss, output, target)
    if isinstance(loss, nn.Module):
        known = _known(loss)
        if known is not None:
            _check_shapes(known, output, target)
            return known
    return _probed(loss, output, target)


def _module(loss: Any) -> Any:
    """The loss object that does what one of torch's loss functions does; anything else as it is, but on the CPU."""
    if isinstance(loss, nn.Module) and any(b.device.type != "cpu" for b in loss.buffers()):
        loss = copy.deepcopy(loss).cpu()
    return next((twin() for function, twin in _FUNCTIONS if loss is function), loss)


def _known(loss: nn.Module) -> SummedLoss | None:
    reduction = getattr(loss, "reduction", None)
    if type(loss) not in _WEIGHTED + _ELEMENTWISE:
        return None
    if reduction == "sum":
        return SummedLoss(loss, "sum")
    twin: Any = copy.deepcopy(loss)
    if type(loss) in _WEIGHTED:
        twin.reduction, kind = "sum", "weighted"
    elif reduction == "batchmean":
        twin.reduction, kind = "sum", "batch"
    else:
        twin.reduction, kind = "none", "elementwise"
    return SummedLoss(twin, kind)


def _check_shapes(loss: SummedLoss, output: Tree, target: Tree) -> None:
    """Refuse what torch would broadcast: every sample would be compared with every other."""
    if not isinstance(loss.function, _ELEMENTWISE) or isinstance(loss.function, nn.MultiMarginLoss):
        return
    if isinstance(output, Tensor) and isinstance(target, Tensor) and output.shape != target.shape:
        raise LossError(
            f"The loss {loss.original} compares outputs of shape {tuple(output.shape)} with targets of shape "
            f"{tuple(target.shape)}.",
            cause="a last dimension of one that only one of them has",
            remedy="give both one shape: output.squeeze(1) in the model, or targets.unsqueeze(1)",
        )


def _check_scalar(loss: Any, output: Tree, target: Tree) -> None:
    value = _call(loss, output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise LossError(
            f"The loss returned {got}; training needs one number.",
            cause='reduction="none", or a function that does not reduce',
            remedy="reduce over the samples by their mean or their sum",
        )


def _call(loss: Any, output: Tree, target: Tree) -> Any:
    try:
        return loss(output, target)
    except Exception as error:
        raise LossError(
            f"The loss cannot be computed: {type(error).__name__}: {error}",
            cause=f"the model returns {_describe(output)}, the targets are {_describe(target)}",
            remedy="make the model's output, the targets and the loss fit together",
        ) from error


def _describe(tree: Tree) -> str:
    said = [f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}" for leaf in leaves(tree)
            if isinstance(leaf, Tensor)]  # fmt: skip
    return " and ".join(said) or type(tree).__name__


def _probed(loss: Any, output: Tree, target: Tree) -> SummedLoss:
    """Find out by trial whether an unknown loss is a mean or a sum over samples: on two uneven parts and the whole."""
    rows = _rows(target)
    if rows < 2:
        return SummedLoss(loss, "mean of samples")
    whole = float(_call(loss, output, target))
    kinds = {"mean of samples", "sum"}
    for split in sorted({1, max(1, rows // 3), rows - 1}):
        one, other = (_part(loss, output, target, piece) for piece in (slice(0, split), slice(split, rows)))
        mean = (one * split + other * (rows - split)) / rows
        total = one + other
        kinds &= {kind for kind, value in (("mean of samples", mean), ("sum", total)) if _same(value, whole)}
    if len(kinds) == 2:
        raise LossError(
            f"The loss is 0 on the first {rows} samples, which does not tell a mean from a sum.",
            remedy="use one of torch's own loss objects, or start from a model with a loss above 0",
        )
    if not kinds:
        raise LossError(
            f"The loss is neither a mean nor a sum over samples: on {rows} samples it is {whole:.6g}, but its parts "
            f"of {split} and {rows - split} samples average {mean:.6g} and sum up to {total:.6g}.",
            cause="class weights, an ignored label, or samples that are compared with each other",
            remedy="use torch's own loss object (nn.CrossEntropyLoss(weight=..., ignore_index=...) is exact), or "
            "return the sum over samples",
        )
    return SummedLoss(loss, kinds.pop())


def _part(loss: Any, output: Tree, target: Tree, piece: slice) -> float:
    """The loss of some of the rows."""

    def taken(leaf: Any) -> Any:
        return leaf[piece]

    return float(_call(loss, map_tree(taken, output), map_tree(taken, target)))


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(1e-6, abs(one), abs(other))


def check_labels(loss: Any, output: Tree, targets: Tree, what: str) -> None:
    """Refuse class labels that the model's output has no class for, before a worker meets them.

    Parameters
    ----------
    loss : callable
        The user's; one whose labels are unknown here is left alone.
    output : tree of tensors
        The model's output for a few samples.
    targets : tree of tensors
        All targets.
    what : str
        The argument's name, for messages.

    Raises
    ------
    DataError
        Naming the first label out of range, and its row.
    """
    loss = _module(loss)
    if type(loss) not in _WEIGHTED:
        return
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not isinstance(output, Tensor):
        return
    classes = output.shape[min(1, output.ndim - 1)]
    labels = targets.long()
    wrong = ((labels < 0) | (labels >= classes)) & (labels != loss.ignore_index)
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise DataError(
            f"{what} has the label {int(labels[place])} at row {place[0]}, but the model's output has {classes} "
            f"classes, 0 to {classes - 1}; {int(wrong.sum())} labels are out of range.",
            cause="labels that count from 1, or a last layer that is too small",
            remedy="map the labels to 0 to the number of classes less 1, or widen the model's last layer",
        )
