"""What a model and its loss do beyond computing rows one by one, found out by trying them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.engines.recipe import Traits
from parakit.errors import LossError, ModelError, ParakitError
from parakit.losses.summed import SummedLoss, check_scalar
from parakit.model_state.attributes import ABSENT, Attributes, same
from parakit.model_state.buffers import buffers_of
from parakit.model_state.hooks import ParameterHooks
from parakit.model_state.structure import Structure
from parakit.model_state.sync_batch_norm import has_synchronised
from parakit.preflight.changes import Changed, Changes, no_steps_of_own
from parakit.preflight.evaluating import evaluation_of
from parakit.preflight.labels import LabelRange, check_kind_of_labels, check_labels, check_shapes
from parakit.preflight.reach import backward_once, check_reach, computed_attributes
from parakit.preflight.shares import Shares
from parakit.preflight.trial import Trial
from parakit.system.devices import CPU
from parakit.system.process_settings import Draws, drawing, undisturbed
from parakit.trees import leaves

__all__ = ["Wanted", "traits_for_evaluation", "traits_of"]


@dataclass(frozen=True)
class Wanted:
    """What a user says of a model.

    Attributes
    ----------
    rules : mapping of str to str
        For buffers.
    gather : bool
    checks : bool
        Whether it matters that rows of a batch look at each other.
    """

    rules: Mapping[str, str] = field(default_factory=dict)
    gather: bool = False
    checks: bool = True


def traits_of(trial: Trial, wanted: Wanted, original: nn.Module, held_out: Samples | None) -> Traits:
    """Try training, and evaluation if there is something to evaluate.

    Parameters
    ----------
    trial : Trial
    wanted : Wanted
    original : nn.Module
        The user's own model, which nothing of the trial may reach.
    held_out : Samples or None

    Raises
    ------
    DataError, ModelError, LossError
        If something cannot be trained, or would be otherwise on several workers.
    """
    with undisturbed(CPU), _uncounted(trial):
        first = _FirstStep(trial)
        changed = first.take(original, held_out)
        if first.late:
            trial.adopt_buffers(first.late)
            first = _FirstStep(trial)
            changed = first.take(original, held_out)
        changes = Changes(trial, changed, first.draws)
        changes.look(first.rows, wanted.rules)
        shares = Shares(trial, changes, first.rows, first.output, first.seconds)
        loss = _loss_in_shares(trial, wanted, held_out, changes, shares)
        judged, needs_grad = evaluation_of(trial, loss, held_out, first.output)
    return Traits(
        form=loss.form, calls=loss.calls, grad_in_evaluation=needs_grad or changes.needs_grad, draws=first.draws,
        noisy=changes.noisy, rules=changes.rules, counted=changes.counted, passing=changes.passing,
        rewrites=changes.rewrites, synchronised=has_synchronised(trial.model), gather=wanted.gather, judged=judged,
        writes=first.writes,
    )  # fmt: skip


def _loss_in_shares(
    trial: Trial, wanted: Wanted, held_out: Samples | None, changes: Changes, shares: Shares
) -> SummedLoss:
    """The loss as it adds up over shares; refused where it does not."""

    def found() -> SummedLoss:
        if wanted.gather:
            shares.check_outputs(checks=wanted.checks)
            return SummedLoss(trial.parts.loss, "mean")
        loss = shares.form_of_loss(held_out, checks=wanted.checks)
        if wanted.checks:
            shares.compare(loss)
        return loss

    try:
        return found()
    except (ModelError, LossError) as error:
        if not changes.seeds:
            raise
        changes.noisy = True
        found()  # with what it draws silenced: what is refused even so has another cause
        raise ModelError(
            "The model or the loss sets the seed of torch's generator in each call, so the first rows of each worker's "
            "share would meet the same random numbers.",
            cause="torch.manual_seed in forward or in the loss, before numbers are drawn for each row",
            remedy="leave the seed to the run: what is drawn from torch follows from train(..., seed=0); or draw "
            "once, as many numbers as one row needs, and keep them in a buffer (register_buffer)",
        ) from error


def traits_for_evaluation(trial: Trial) -> Traits:
    """Try evaluation alone.

    Raises
    ------
    DataError, ModelError, LossError
        If model, data and loss do not fit together.
    """
    with undisturbed(CPU), _uncounted(trial):
        trial.model.eval()
        first = _FirstStep(trial)
        needs_grad = first.compute_in_evaluation()
        changes = Changes(trial, Changed(), first.draws, needs_grad=needs_grad)
        loss = Shares(trial, changes, first.rows, first.output, 0.0).form_of_loss(None, checks=False)
        judged, _ = evaluation_of(trial, loss, None, first.output)
    return Traits(form=loss.form, calls=loss.calls, grad_in_evaluation=needs_grad, judged=judged, writes=first.writes)


@contextmanager
def _uncounted(trial: Trial) -> Iterator[None]:
    """Let calls not count: variables of functions and global ones may be those of the notebook."""
    attributes = Attributes(trial.model, trial.parts.loss)
    before = attributes.read()
    try:
        yield
    finally:
        now = attributes.read()
        changed = [path for path, kept in now.items() if not same(kept, before.get(path, ABSENT))]
        attributes.write({path: before.get(path, ABSENT) for path in changed})


class _FirstStep:
    """One step, as it comes.

    Parameters
    ----------
    trial : Trial

    Attributes
    ----------
    rows : Samples
        The rows that it takes.
    output : tree
        What the model makes of them.
    draws : Draws
        From which generators it drew.
    seconds : float
        That it took.
    writes : bool
        Whether it wrote to the rows that it was given.
    late : list of str
        Buffers that were made in forward: then nothing else is known.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial, self._model = trial, trial.model
        self.rows = trial.rows(labels=True)
        self.output: Any = None
        self.draws = Draws()
        self.seconds = 0.0
        self.writes = False
        self.late: list[str] = []

    def take(self, original: nn.Module, held_out: Samples | None) -> Changed:
        """Forward and backward in the modes in which the model was given; notes what changes, and undoes it."""
        hooks = ParameterHooks(list(self._model.parameters()))
        attributes = Attributes(self._model, self._trial.parts.loss, hooks.functions)
        before = attributes.read()
        buffers = {name: b.detach().clone() for name, b in self._buffers().items()}
        parameters = dict(self._model.named_parameters())
        computed = computed_attributes(original, self._model)
        structure = Structure(self._model, self._trial.parts.loss)
        # Also with what was there: a constraint, or a slow copy, may have nothing to do at the beginning.
        written = {name: _writing(p) for name, p in parameters.items()}
        kept_up = {name: _writing(b) for name, b in self._buffers().items()}
        filled = attributes.writings()
        watch, began = drawing(), perf_counter()
        value = self._compute(held_out, training=True)
        self.draws, self.seconds = watch.draws, perf_counter() - began
        self.late = structure.new_buffers
        if self.late:
            return Changed()
        structure.check()
        check_reach(value, original, computed)
        backward_once(value, parameters.values(), hooks)
        there, now, again = self._buffers(), attributes.read(), attributes.writings()
        moved = [name for name in buffers if not same(there[name].detach(), buffers[name])]
        unmoved = [name for name in buffers if name not in moved and _writing(there[name])[0] > kept_up[name][0]]
        changed = Changed(
            (*moved, *unmoved),
            tuple(name for name, p in parameters.items() if _writing(p) != written[name]),
            tuple(
                path
                for path, kept in now.items()
                if not same(kept, before.get(path, ABSENT)) or filled.get(path) != again.get(path)
            ),
            tuple(unmoved),
        )
        attributes.write({path: before.get(path, ABSENT) for path in changed.attributes})
        with torch.no_grad():
            for name in changed.buffers:
                there[name].copy_(buffers[name])
            if changed.parameters:
                pristine = dict(self._trial.frozen.thaw().model.named_parameters())
                for name in changed.parameters:
                    parameters[name].copy_(pristine[name])
        return changed

    def compute_in_evaluation(self) -> bool:
        """The same where nothing is trained; returns whether the model cannot do without gradients."""
        try:
            with torch.no_grad():
                self._compute(None)
        except ParakitError as error:
            try:
                self._compute(None)
            except ParakitError:
                raise error from error.__cause__
            return True
        return False

    def _compute(self, held_out: Samples | None, *, training: bool = False) -> Tensor:
        """Forward and the loss, whose mistakes are told in words; returns what a backward pass begins with."""
        trial, rows = self._trial, self.rows.copy_rows()
        with self._refusing_steps("model", training):
            output = trial.forward(rows)
        loss = trial.parts.loss
        check_kind_of_labels(loss, output, trial.samples.targets)
        check_labels(loss, output, trial.samples.targets, "data", trial.numbers.get("data"))
        trial.labels = LabelRange.of(loss, output, "data")
        if held_out is not None:
            check_labels(loss, output, held_out.targets, "validation", trial.numbers.get("validation"))
        with self._refusing_steps("loss", training):
            value: Any = check_scalar(trial.loss(output, rows.targets))
        check_shapes(loss, output, rows.targets)
        given, now = (leaves((samples.inputs, samples.targets)) for samples in (self.rows, rows))
        self.writes = self.writes or not all(map(torch.equal, given, now))
        self.output = output
        begin: Tensor = value[0] if isinstance(value, tuple) else value
        return begin

    def _refusing_steps(self, who: str, training: bool) -> AbstractContextManager[None]:
        return no_steps_of_own(self._trial, who) if training else nullcontext()

    def _buffers(self) -> dict[str, Tensor]:
        return buffers_of(self._model, self._trial.parts.loss)


def _writing(tensor: Tensor) -> tuple[int, int]:
    """What tells that somebody wrote to a tensor: how often, and where it is."""
    return tensor._version, tensor.data_ptr()
