"""Evaluation: loss and accuracy of a model on held-out samples, as sums that add up over workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parakit.data import Samples, Tree
from parakit.gradients import call_model
from parakit.losses import SummedLoss

__all__ = ["ROWS_AT_ONCE", "Evaluation", "Tally", "tally"]

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over some samples; adds with ``+``.

    Attributes
    ----------
    loss_sum, count : float
        Sum of the loss, and what to divide it by (0 for a loss that is a sum).
    correct : int or None
        Samples whose class was predicted; None where the targets are no classes.
    judged, samples : int
        Predictions that were judged, and rows.
    """

    loss_sum: float = 0.0
    count: float = 0.0
    correct: int | None = None
    judged: int = 0
    samples: int = 0

    def __add__(self, other: Tally) -> Tally:
        known = [t.correct for t in (self, other) if t.correct is not None]
        return Tally(
            self.loss_sum + other.loss_sum,
            self.count + other.count,
            sum(known) if known else None,
            self.judged + other.judged,
            self.samples + other.samples,
        )

    def result(self) -> Evaluation:
        """The means."""
        accuracy = None if self.correct is None else self.correct / max(1, self.judged)
        return Evaluation(self.loss_sum / (self.count or 1.0), accuracy, self.samples)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss and accuracy of a model on some samples.

    Attributes
    ----------
    loss : float
        As the loss itself would have said on all samples at once.
    accuracy : float or None
        Share of right classes, 0 to 1; None where the targets are no classes.
    samples : int
        Rows evaluated.
    """

    loss: float
    accuracy: float | None
    samples: int

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        return f"<Evaluation: loss {self.loss:.4f}{accuracy}, {self.samples} samples>"


def tally(model: nn.Module, loss: SummedLoss, samples: Samples, rows_at_once: int = ROWS_AT_ONCE) -> Tally:
    """Evaluate a model on samples, in evaluation mode and without gradients.

    Parameters
    ----------
    model : nn.Module
        Left in the mode in which it was found.
    loss : SummedLoss
    samples : Samples
    rows_at_once : int
        Rows in one forward pass.

    Returns
    -------
    Tally
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = Tally()
    try:
        with torch.no_grad():
            for first in range(0, len(samples), rows_at_once):
                part = samples.slice(first, min(first + rows_at_once, len(samples)))
                output = call_model(model, part.inputs)
                value, count = loss(output, part.targets)
                correct, judged = _judge(output, part.targets, loss)
                total += Tally(float(value), float(count), correct, judged, len(part))
    finally:
        for module, mode in modes:
            module.training = mode
    return total


def _judge(output: Tree, target: Tree, loss: SummedLoss) -> tuple[int | None, int]:
    """How many classes were predicted rightly, and out of how many; None where there are no classes."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or not output.is_floating_point():
        return None, 0
    if isinstance(loss.function, nn.BCEWithLogitsLoss | nn.BCELoss) and output.shape == target.shape:
        middle = 0.0 if isinstance(loss.function, nn.BCEWithLogitsLoss) else 0.5
        return int(((output > middle) == (target > 0.5)).sum()), target.numel()
    if target.is_floating_point() or output.ndim != target.ndim + 1:
        return None, 0
    labels = target.long()
    ignored = labels == getattr(loss.function, "ignore_index", -100)
    return int(((output.argmax(1) == labels) & ~ignored).sum()), int((~ignored).sum())
