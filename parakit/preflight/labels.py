"""Labels and targets that a loss does not take, or takes for something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.data.samples import Samples
from parakit.errors import DataError, LossError
from parakit.losses.summed import ELEMENTWISE, WEIGHTED, as_object
from parakit.trees import Tree

__all__ = ["LabelRange", "check_kind_of_labels", "check_labels", "check_shapes"]


def check_kind_of_labels(loss: Any, output: Any, targets: Any) -> None:
    """Refuse one number a sample that is meant as a class, in a type that torch does not take for one.

    Raises
    ------
    DataError
    """
    if not isinstance(targets, Tensor) or not isinstance(output, Tensor) or output.ndim != targets.ndim + 1:
        return
    classes, dtype = output.shape[1], str(targets.dtype).removeprefix("torch.")
    if targets.dtype in (torch.int64, torch.uint8) or classes < 2:
        return
    by_class = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or loss in (F.cross_entropy, F.nll_loss)
    if by_class or isinstance(loss, nn.MSELoss):
        name = getattr(loss, "__name__", type(loss).__name__)
        takes = "them as int64" if by_class else "as many numbers as the model gives"
        raise DataError(
            f"The targets are {dtype} of shape {tuple(targets.shape)}, but the model gives {classes} numbers for each.",
            cause=f"class labels as {dtype}; {name} takes {takes}",
            remedy='targets.long(), or targets.astype("int64") in numpy; for targets that are no classes, '
            "a model with one output",
        )


def check_shapes(loss: Any, output: Tree, target: Tree) -> None:
    """Refuse what torch would broadcast: every sample would be compared with every other."""
    if type(loss) not in ELEMENTWISE or isinstance(loss, nn.MultiMarginLoss):
        return
    if isinstance(output, Tensor) and isinstance(target, Tensor) and output.shape != target.shape:
        raise LossError(
            f"The loss {type(loss).__name__} compares outputs of shape {tuple(output.shape)} with targets of shape "
            f"{tuple(target.shape)}.",
            cause="a last dimension of one that only one of them has",
            remedy="give both one shape: output.squeeze(1) in the model, or targets.unsqueeze(1)",
        )


def check_labels(loss: Any, output: Any, targets: Tree, what: str, rows: Any = None) -> None:
    """Refuse class labels that the model's output has no class for, before a worker meets them.

    Parameters
    ----------
    loss : callable
        The user's; one whose labels are unknown here is left alone.
    output : tree of tensors
        The model's output for a few samples.
    targets : tree of tensors
        All targets, or those of some rows.
    what : str
        The argument's name, for messages.
    rows : sequence of int, optional
        The numbers of these rows, where they are not all.

    Raises
    ------
    DataError
        Naming the first label out of range, and its row.
    """
    known = LabelRange.of(loss, output, what)
    if known is not None:
        known.check(targets, rows)


@dataclass(frozen=True)
class LabelRange:
    """The class labels that a model's output has classes for.

    Parameters
    ----------
    classes : int
        Labels are 0 to one less.
    ignored : int
        A label that the loss leaves out.
    what : str
        The argument's name, for messages.
    """

    classes: int
    ignored: int
    what: str

    @classmethod
    def of(cls, loss: Any, output: Any, what: str) -> LabelRange | None:
        """Those that a loss takes beside an output for a few samples; None where that is not known."""
        loss = as_object(loss)
        if type(loss) not in WEIGHTED or not isinstance(output, Tensor):
            return None
        return cls(output.shape[min(1, output.ndim - 1)], int(loss.ignore_index), what)

    def __call__(self, samples: Samples, rows: Any) -> None:
        """Refuse samples with a label out of range; errors as for `check`."""
        self.check(samples.targets, rows)

    def check(self, targets: Tree, rows: Any = None) -> None:
        """Refuse targets with a label out of range.

        Parameters
        ----------
        targets : tree of tensors
        rows : sequence of int, optional
            The numbers of their rows; counted from 0 unless they are given.

        Raises
        ------
        DataError
            Naming the first one, and its row.
        """
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return
        labels = targets.long()
        wrong = ((labels < 0) | (labels >= self.classes)) & (labels != self.ignored)
        if bool(wrong.any()):
            place = tuple(int(i) for i in wrong.nonzero()[0])
            row = place[0] if rows is None else int(rows[place[0]])
            raise DataError(
                f"{self.what} has the label {int(labels[place])} at row {row}, but the model's output has "
                f"{self.classes} classes, 0 to {self.classes - 1}; {int(wrong.sum())} labels are out of range.",
                cause="labels that count from 1, or a last layer that is too small",
                remedy="map the labels to 0 to the number of classes less 1, or widen the model's last layer",
            )
