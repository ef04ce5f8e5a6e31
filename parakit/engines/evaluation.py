"""Evaluation: loss and accuracy of a model on held-out samples, as sums that add up over workers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.gradients.forward import call_model
from parakit.losses.calls import CallsOfLosses
from parakit.losses.summed import SummedLoss

__all__ = ["ROWS_AT_ONCE", "Evaluation", "Tally", "WeightedMean", "tally"]

ROWS_AT_ONCE = 1024


class WeightedMean(NamedTuple):
    """A mean over classes that is a part of a loss.

    Attributes
    ----------
    factor : float
        With which it goes into the loss.
    total, weight : float
        Sum over the samples, and what to divide it by.
    """

    factor: float
    total: float
    weight: float


_NOTHING = WeightedMean(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over some samples; adds with ``+``.

    Attributes
    ----------
    loss_sum, count : float
        Sum of the loss, and what to divide it by (0 for a loss that is a sum).
    correct : int or None
        Samples whose class was predicted; None where the loss compares no classes.
    judged, samples : int
        Predictions that were judged, and rows.
    means : tuple of WeightedMean
        Parts of the loss that have weights of their own; they are no part of `loss_sum`.
    """

    loss_sum: float = 0.0
    count: float = 0.0
    correct: int | None = None
    judged: int = 0
    samples: int = 0
    means: tuple[WeightedMean, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        known = [t.correct for t in (self, other) if t.correct is not None]
        return Tally(
            self.loss_sum + other.loss_sum,
            self.count + other.count,
            sum(known) if known else None,
            self.judged + other.judged,
            self.samples + other.samples,
            tuple(
                WeightedMean(a.factor or b.factor, a.total + b.total, a.weight + b.weight)
                for a, b in zip_longest(self.means, other.means, fillvalue=_NOTHING)
            ),
        )

    def result(self) -> Evaluation:
        """The means."""
        accuracy = None if self.correct is None else self.correct / max(1, self.judged)
        means = sum(mean.factor * mean.total / (mean.weight or 1.0) for mean in self.means)
        return Evaluation(self.loss_sum / (self.count or 1.0) + means, accuracy, self.samples)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Loss and accuracy of a model on some samples.

    Attributes
    ----------
    loss : float
        As the loss itself would have said on all samples at once.
    accuracy : float or None
        Share of right classes, 0 to 1; None where the loss compares no classes with labels.
    samples : int
        Rows evaluated.
    """

    loss: float
    accuracy: float | None
    samples: int

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        return f"<Evaluation: loss {self.loss:.4f}{accuracy}, {self.samples} samples>"


def tally(
    model: nn.Module,
    loss: SummedLoss,
    samples: Samples,
    rows_at_once: int = ROWS_AT_ONCE,
    *,
    judging: bool = True,
    needs_grad: bool = False,
    copies: bool = False,
) -> Tally:
    """Evaluate a model on samples, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Left in the mode in which it was found.
    loss : SummedLoss
    samples : Samples
    rows_at_once : int
        Rows in one forward pass.
    judging : bool
        Whether there is an accuracy, if the loss compares classes.
    needs_grad : bool
        Whether forward or the loss differentiates.
    copies : bool
        Whether to give forward and the loss copies of the samples, because they write to them.

    Returns
    -------
    Tally
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = Tally()
    try:
        for first in range(0, len(samples), rows_at_once):
            part = samples.slice(first, min(first + rows_at_once, len(samples)))
            part = part.copy_rows() if copies else part
            with torch.set_grad_enabled(needs_grad or loss.meets):
                total += _tally_of(model, loss, part, judging)
    finally:
        for module, mode in modes:
            module.training = mode
    return total


def _tally_of(model: nn.Module, loss: SummedLoss, part: Samples, judging: bool) -> Tally:
    with CallsOfLosses(judging=judging, apart=loss.meets) as seen:
        share = loss.of_share(lambda: call_model(model, part.inputs), part.targets)
    means = _means(share.value, seen) if loss.meets else ()
    rest = share.total - share.weight * sum(factor * total / (weight or 1.0) for factor, total, weight in means)
    judged = seen.count_right() if judging else None
    right, of = (None, 0) if judged is None else (judged.right, judged.of)
    return Tally(rest, share.count, right, of, len(part), means)


def _means(value: Tensor, seen: CallsOfLosses) -> tuple[WeightedMean, ...]:
    """What each mean over classes came to, and with which factor it is in the loss."""
    factors = torch.autograd.grad(value, seen.means, allow_unused=True)
    return tuple(
        WeightedMean(0.0 if factor is None else float(factor), float(mean) * float(weight), float(weight))
        for factor, mean, weight in zip(factors, seen.means, seen.weights, strict=True)
    )
