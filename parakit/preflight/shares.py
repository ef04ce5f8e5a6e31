"""Shares of a batch, tried: in which form the loss adds up over them, and whether anything looks across them.

Rows are drawn from everywhere in the data, several times, with parameters as they are and moved. A probe is not a
proof: what was found is looked at again while the run goes on (`parakit.exactness.check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parakit.data.samples import Samples
from parakit.errors import LossError, ModelError, ParakitError
from parakit.exactness.outputs import check_rows, tensors_in
from parakit.exactness.separation import (
    Difference,
    Separation,
    cut_of,
    difference,
    outputs_alone,
    part_fails,
)  # fmt: skip
from parakit.gradients.forward import call_model
from parakit.losses.calls import Divide
from parakit.losses.forms import Draw, cuts_of, find_form, holds_label, summing_form
from parakit.losses.summed import ShareLoss, SummedLoss
from parakit.model_state.undisturbed import Still
from parakit.preflight.changes import Changes
from parakit.preflight.trial import Trial

__all__ = ["Shares"]

_QUICK_SECONDS = 0.05  # of a first step; what takes longer is tried on fewer rows
_SLOW_SECONDS = 0.4
_ROWS = 12
_MOVED = 0.05  # times the spread of a parameter
_ALIKE = 1e-4  # relative


class Shares:
    """Several shares of some rows, compared with all of the rows at once.

    Parameters
    ----------
    trial : Trial
    changes : Changes
    rows : Samples
        That were tried first.
    output : tree
        What the model made of them.
    seconds : float
        That this took: slow models are tried less.
    """

    def __init__(self, trial: Trial, changes: Changes, rows: Samples, output: Any, seconds: float) -> None:
        self._trial, self._changes = trial, changes
        self._model = trial.model
        self._rows, self._output, self._seconds = rows, output, seconds

    # --- the loss

    def form_of_loss(self, held_out: Samples | None, *, checks: bool) -> SummedLoss:
        """In which form the loss adds up.

        Parameters
        ----------
        held_out : Samples or None
        checks : bool
            Whether a loss that does not add up over samples is refused; else each share has one of its own.

        Raises
        ------
        ModelError, LossError
        """
        loss, samples = self._trial.parts.loss, self._trial.samples
        targets = [samples.targets, *([held_out.targets] if held_out is not None else [])]
        draws = [self._draw(self._rows)]
        if self._seconds < _QUICK_SECONDS:
            draws.append(self._draw(self._trial.rows(_ROWS)))
        given = [samples.inputs, *targets]
        try:
            found = find_form(loss, draws, lambda label: any(holds_label(tree, label) for tree in given))
        except LossError as error:
            if not checks:
                return self._as_each_share_has_it()
            raise self._explained(error) from error
        return found.knowing(*targets) if not self._trial.numbers else found

    def _as_each_share_has_it(self) -> SummedLoss:
        """The form by outputs alone, for whoever wants each share to be a batch of its own."""
        try:
            return summing_form(self._trial.parts.loss, self._output, self._rows.targets)
        except LossError:
            return SummedLoss(self._trial.parts.loss, "mean")

    def _draw(self, rows: Samples) -> Draw:
        still = self._changes.still()

        def evaluate(form: SummedLoss, first: int, end: int, divide: Divide | None) -> ShareLoss:
            part = rows.slice(first, end).copy_rows()
            try:
                with still.kept(), still.once(), torch.set_grad_enabled(self._changes.needs_grad):
                    return form.of_share(lambda: call_model(self._model, part.inputs), part.targets, divide)
            except ParakitError:
                raise
            except Exception as error:
                if end - first == len(rows):
                    raise
                raise part_fails(error, len(rows), end if first == 0 else first) from error

        cuts = cuts_of(len(rows))
        return Draw(len(rows), cuts if self._seconds < _SLOW_SECONDS else cuts[:1], evaluate)

    def _explained(self, error: LossError) -> ModelError | LossError:
        fact = str(error).splitlines()[0].partition(": ")[2].rstrip(".")
        return _meeting_error(fact) if fact and self._first_meeting(self._rows) else error

    # --- rows that look at each other

    def compare(self, loss: SummedLoss) -> None:
        """Refuse what is otherwise for several shares than for one; with parameters moved, and gradients.

        Raises
        ------
        ModelError, LossError
        """
        found = self._first_difference(loss)
        if found is not None:
            raise self._refusal(*found)

    def _first_difference(self, loss: SummedLoss) -> tuple[Difference, Samples] | None:
        """What does not add up, on which rows; with parameters as they are, and moved."""
        separation = Separation(self._model, loss, self._changes.still(), needs_grad=self._changes.needs_grad)
        for number in range(3 if self._seconds < _QUICK_SECONDS else 1):
            rows = self._rows if number == 0 else self._trial.rows(_ROWS)
            if number:
                self._move()
            if len(rows) > 1:
                found = separation.look(rows, cut_of(len(rows), number), gradient=True)
                if found is not None:
                    return found, rows
        return None

    def check_outputs(self, *, checks: bool) -> None:
        """Refuse outputs that cannot be gathered.

        Parameters
        ----------
        checks : bool
            Whether to refuse a model that looks at rows together before its outputs are gathered.

        Raises
        ------
        ModelError
        """
        for leaf in tensors_in(self._output):
            check_rows(leaf, len(self._rows))
        if not checks:
            return
        cut = self._first_meeting(self._rows)
        if cut:
            raise _meeting_error(f"on {len(self._rows)} samples, rows of its output are otherwise than on {cut}")
        found = self._first_difference(SummedLoss(outputs_alone, "sum"))
        if found is not None:
            raise _meeting_error(difference(found[0], "in a sum over its outputs, "))

    def _move(self) -> None:
        """Move all parameters somewhat, as training does: some losses and gradients are 0 where a model begins."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    spread = float(parameter.double().std()) if parameter.numel() > 1 else 0.0
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.add_(noise.to(parameter.dtype), alpha=_MOVED * (spread or 1.0))

    def _first_meeting(self, rows: Samples) -> int:
        """Of how many rows the output is otherwise by themselves than among all; 0 if of none."""
        count, cut = len(rows), max(1, len(rows) // 2)
        if count < 2:
            return 0
        still = self._changes.still()
        with still.kept():
            every = self._outputs(still, rows)
            for first, end in ((0, cut), (cut, count)):
                try:
                    alone = self._outputs(still, rows.slice(first, end))
                except Exception as error:
                    raise part_fails(error, count, cut) from error
                if _differ(every, alone, count, first, end):
                    return end - first
        return 0

    def _outputs(self, still: Still, rows: Samples) -> list[Tensor]:
        rows = rows.copy_rows()
        with still.once(), torch.set_grad_enabled(self._changes.needs_grad):
            return [leaf.detach() for leaf in tensors_in(call_model(self._model, rows.inputs))]

    def _refusal(self, found: Difference, rows: Samples) -> ModelError | LossError:
        fact = difference(found, "")
        if self._first_meeting(rows):
            return _meeting_error(fact)
        return LossError(
            f"The loss does not add up over samples: {fact}.",
            cause="a mean over what is not masked or padded, samples that are compared with each other, a mean that is "
            "bent (a root, an absolute value), or a hook that looks at a whole gradient",
            remedy="return (sum, count) from the loss: both are added up over the workers; or train(..., gather=True), "
            "which gives the loss the outputs of the whole batch",
        )


def _differ(every: Sequence[Tensor], alone: Sequence[Tensor], rows: int, first: int, end: int) -> bool:
    """Whether some rows of outputs are not those that came out by themselves."""
    for whole, part in zip(every, alone, strict=False):
        if whole.dim() and len(whole) == rows and len(part) == end - first and whole.is_floating_point():
            scale = float(whole.double().abs().max()) or 1.0
            alike = max(_ALIKE, 8 * torch.finfo(whole.dtype).eps)
            if float((whole[first:end].double() - part.double()).abs().max()) > alike * scale:
                return True
    return False


def _meeting_error(fact: str) -> ModelError:
    return ModelError(
        f"The model looks at the rows of a batch together, and each worker has its own share of them: {fact}.",
        cause="a mean, a normalisation or a comparison over the first dimension in forward",
        remedy="for batch statistics nn.BatchNorm, or nn.SyncBatchNorm for those of the whole batch; to compare "
        "samples, return what is compared and compare it in the loss, with train(..., gather=True); with check=False, "
        "each worker's share is taken for a batch of its own",
    )
