"""Forms of losses: in which way a loss adds up over samples, tried out on some of them.

A loss is computed on all samples of a draw at once and on parts of them, and has the first form in which the parts come
to the whole; what has none is refused. Torch's own loss objects are known, and a pair of sum and count says it itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parakit.errors import LossError
from parakit.losses.calls import CallsOfLosses, Divide
from parakit.losses.summed import (
    Form,
    ShareLoss,
    SummedLoss,
    check_loss,
    check_scalar,
    describe,
    form_of_known,
    is_same,
    rows_of,
    together,
)  # fmt: skip
from parakit.trees import Tree, leaves, map_tree

__all__ = ["Draw", "cuts_of", "draws_of", "find_form", "holds_label", "summing_form"]

#: The loss of rows first to end of some samples, in some form; see `SummedLoss.of_share`.
Evaluate = Callable[[SummedLoss, int, int, Divide | None], ShareLoss]


@dataclass(frozen=True)
class Draw:
    """Some samples to try a loss on.

    Parameters
    ----------
    rows : int
    cuts : tuple of int
        Where to divide them in two.
    evaluate : callable
    """

    rows: int
    cuts: tuple[int, ...]
    evaluate: Evaluate

    def parts(self, loss: SummedLoss, cut: int, weights: Sequence[float]) -> float:
        """The loss as two workers would have it who share these samples."""
        shares = []
        for first, end in ((0, cut), (cut, self.rows)):
            divide = partial(_of_rows, weights, (end - first) / self.rows)
            shares.append(self.evaluate(loss, first, end, divide))
        return together(shares)


def _of_rows(weights: Sequence[float], part: float, number: int, _: Any) -> float:
    return weights[number] * part


def find_form(loss: Callable[[Any, Any], Any], draws: Sequence[Draw], holds: Callable[[int], bool]) -> SummedLoss:
    """The form of a loss: the first one in which parts of each draw come to the whole.

    Parameters
    ----------
    loss : callable
    draws : sequence of Draw
    holds : callable
        Whether a label is anywhere in the data: one that a loss leaves out may be rare, and in none of the draws.

    Raises
    ------
    LossError
        If it returns no scalar, is 0 on all draws, or has no form.
    """
    seen = [_look(loss, draw) for draw in draws]
    known = form_of_known(loss)
    if known is not None:
        return SummedLoss(loss, known)
    if seen[0].count is not None:
        candidates = [SummedLoss(loss, "counted")]
    else:
        calls = len(seen[0].weights)
        usual: list[Form] = ["mean", "sum"]
        by_weights: list[Form] = ["weighted calls", "several means"] if calls else []
        rare = any(whole.weighted or any(map(holds, whole.ignored)) for whole in seen)
        candidates = [SummedLoss(loss, form, calls) for form in (by_weights + usual if rare else usual + by_weights)]
    told: dict[str, str] = {}
    for candidate in candidates:
        told[candidate.form] = _first_wrong(candidate, draws, seen)
        if not told[candidate.form]:
            _check_not_zero(candidate, draws, seen)
            return candidate
    if candidates[0].form == "counted":
        raise LossError(
            f"The sums and counts that the loss returns do not add up over samples: {told['counted']}.",
            cause="a count that is no sum over samples, such as one with a least value (clamp), or a sum that compares "
            "samples",
            remedy="let both be sums over the samples that the loss is given; or train(..., gather=True), which gives "
            "the loss the outputs of the whole batch",
        )
    raise LossError(
        f"The loss is neither a mean nor a sum over samples: {told.get('mean') or told[candidates[0].form]}.",
        cause="a mean over what is not masked or padded, samples that are compared with each other, or a mean that is "
        "bent (a root, an absolute value), in the loss or in the model",
        remedy="return (sum, count) from the loss: both are added up over the workers; or train(..., gather=True), "
        "which gives the loss the outputs of the whole batch",
    )


@dataclass(frozen=True)
class _Whole:
    value: float
    count: float | None
    weights: tuple[float, ...]
    ignored: frozenset[int]
    weighted: bool


def _look(loss: Callable[[Any, Any], Any], draw: Draw) -> _Whole:
    """The loss of all samples of a draw, as a plain loop has it."""
    returned: list[Any] = []

    def spy(output: Any, target: Any) -> Any:
        returned.append(check_scalar(loss(output, target)))
        return returned[-1][0] if isinstance(returned[-1], tuple) else returned[-1]

    with CallsOfLosses() as calls:
        share = draw.evaluate(SummedLoss(spy, "sum"), 0, draw.rows, None)
    counted = isinstance(returned[-1], tuple)
    count = float(returned[-1][1]) if counted else None
    value = float(share.value.detach()) / (count or 1.0)
    weights = tuple(float(weight) for weight in calls.weights)
    return _Whole(value, count, weights, frozenset(calls.ignored), calls.weighted)


def _first_wrong(candidate: SummedLoss, draws: Sequence[Draw], seen: Sequence[_Whole]) -> str:
    """What shows that a loss has not this form, in words; nothing if all draws agree with it."""
    for draw, whole in zip(draws, seen, strict=True):
        for cut in draw.cuts:
            try:
                found = draw.parts(candidate, cut, whole.weights)
            except LossError:  # the parts call for other means than the whole
                found = float("nan")
            if not is_same(found, whole.value):
                what = {"sum": "sum up to", "mean": "average"}.get(candidate.form, "come to")
                return (
                    f"on {draw.rows} samples it is {whole.value:.6g}, but its parts of {cut} and {draw.rows - cut} "
                    f"samples {what} {found:.6g}"
                )
    return ""


def _check_not_zero(candidate: SummedLoss, draws: Sequence[Draw], seen: Sequence[_Whole]) -> None:
    if candidate.form == "mean" and any(draw.cuts for draw in draws) and not any(whole.value for whole in seen):
        raise LossError(
            f"The loss is 0 on the {sum(draw.rows for draw in draws)} samples tried, which does not tell a mean from "
            "a sum.",
            remedy="return (sum, count) from it, use one of torch's own loss objects, or start from a model with a "
            "loss above 0",
        )


def summing_form(loss: Any, output: Tree, target: Tree) -> SummedLoss:
    """The summing form of a user's loss, tried on the outputs of some samples.

    Parameters
    ----------
    loss : callable
        Takes (output, target) and returns a scalar, or (sum, count).
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
    loss = check_loss(loss, ())
    return find_form(loss, draws_of(output, target), lambda label: holds_label(target, label))


def draws_of(output: Tree, target: Tree) -> list[Draw]:
    """Outputs of some samples, to try a loss on."""

    def evaluate(form: SummedLoss, first: int, end: int, divide: Divide | None) -> ShareLoss:
        def taken(leaf: Any) -> Any:
            return leaf[first:end]

        part = map_tree(taken, output), map_tree(taken, target)
        try:
            return form.of_share(lambda: part[0], part[1], divide)
        except LossError:
            raise
        except Exception as error:
            raise LossError(
                f"The loss cannot be computed: {type(error).__name__}: {error}",
                cause=f"the model returns {describe(part[0])}, the targets are {describe(part[1])}",
                remedy="make the model's output, the targets and the loss fit together",
            ) from error

    rows = rows_of(target)
    return [Draw(rows, cuts_of(rows), evaluate)]


def holds_label(tree: Tree, label: int) -> bool:
    """Whether a label is among the whole numbers of some tensors."""
    return any(
        isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_complex() and leaf.dtype != torch.bool
        and bool((leaf.long() == label).any())
        for leaf in leaves(tree)
    )  # fmt: skip


def cuts_of(rows: int) -> tuple[int, ...]:
    """Where to cut some samples in two, unevenly; nowhere if there is one alone."""
    return tuple(sorted({max(1, rows // 3), rows - max(1, rows // 4)})) if rows > 1 else ()
