"""What forward changes: buffers, parameters and attributes; and which of that goes by the rows it sees.

What changes alike for any rows is a state that every worker keeps for itself. What goes by rows needs a rule, or is
refused; what nobody reads before it is written again needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parakit.data import Samples
from parakit.errors import ModelError
from parakit.exactness.attributes import ABSENT, Attributes, Kept, same, too_large
from parakit.exactness.buffers import Rule, buffers_of, rules_for
from parakit.exactness.still import Still
from parakit.gradients import call_model
from parakit.losses import check_scalar
from parakit.preflight.trial import Trial
from parakit.settings import Draws, drawing

__all__ = ["Changed", "Changes"]

_ALIKE = 1e-4  # relative
_SAME_LOSS = 1e-6  # relative


@dataclass(frozen=True)
class Changed:
    """Names of what one step has changed."""

    buffers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.buffers or self.parameters or self.attributes)


@dataclass(frozen=True)
class _Seen:
    """What there is after a forward pass."""

    value: float
    buffers: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    attributes: Mapping[str, Kept]

    def agrees(self, other: _Seen, path: str) -> bool:
        return same(self.attributes.get(path, ABSENT), other.attributes.get(path, ABSENT))


class Changes:
    """What forward changes, looked at again over other rows.

    Parameters
    ----------
    trial : Trial
    changed : Changed
        By a first step, which was undone.
    draws : Draws
        Which generators that step drew from.
    needs_grad : bool
        As far as it is known.

    Attributes
    ----------
    needs_grad : bool
        Whether forward cannot do without gradients.
    noisy : bool
        Whether it draws random numbers outside of torch's own layers.
    rules : dict of str to Rule
        For buffers.
    counted, passing : tuple of str
        Attributes that are a part of the state, and those that only hold what the last rows left.
    rewrites : tuple of str
        Parameters that forward changes.
    """

    def __init__(self, trial: Trial, changed: Changed, draws: Draws, *, needs_grad: bool = False) -> None:
        self._trial, self._changed, self._draws = trial, changed, draws
        self._model = trial.model
        self.needs_grad, self.noisy = needs_grad, False
        self.rules: dict[str, Rule] = {}
        self.counted: tuple[str, ...] = ()
        self.passing: tuple[str, ...] = ()
        self.rewrites: tuple[str, ...] = ()

    def still(self) -> Still:
        """What lets forward be computed again and again, as if for the first time."""
        changed = self._changed
        return Still(
            self._model, self._trial.parts.loss, buffers=changed.buffers, parameters=changed.parameters,
            attributes=changed.attributes, noisy=self.noisy, others=self._draws.others,
        )  # fmt: skip

    def look(self, rows: Samples, chosen: Mapping[str, str]) -> None:
        """Find out what of the changes goes by the rows that were seen.

        Parameters
        ----------
        rows : Samples
        chosen : mapping of str to str
            A user's rules for buffers.

        Raises
        ------
        ModelError
            If something does, and there is no rule for it.
        """
        self.needs_grad = self._cannot_do_without_grad(rows)
        with self.still().kept():
            watch = drawing()
            with self.still().once():
                self._forward(rows)
            self.noisy = self._draws.torch and watch.draws.torch
        if not self._changed:
            self.rules = dict(rules_for(self._model, self._trial.parts.loss, (), (), chosen))
            return
        still, half = self.still(), max(1, len(rows) // 2)
        first, second = rows.slice(0, half), rows.slice(min(half, len(rows) - 1), len(rows))
        with still.kept():
            whole, *parts = (self._seen(still, part) for part in (rows, first, second))
            self.counted = tuple(self._counted(still, rows, whole, parts))
        self.rules = dict(
            rules_for(self._model, self._trial.parts.loss, self._changed.buffers, self._by_rows(whole, parts), chosen)
        )
        self.rewrites = self._changed.parameters
        self._check_rewrites(whole, *parts)

    def _cannot_do_without_grad(self, rows: Samples) -> bool:
        still = self.still()
        try:
            with still.kept(), still.once(), torch.no_grad():
                self._forward(rows)
        except Exception:
            return True
        return False

    def _forward(self, rows: Samples) -> Any:
        rows = rows.copied()
        return self._trial.parts.loss(call_model(self._model, rows.inputs), rows.targets)

    def _seen(self, still: Still, rows: Samples, begin: Mapping[str, Kept] | None = None) -> _Seen:
        """What is there after a forward pass over some rows, and the loss; from other attributes, if they are given."""
        loss = self._trial.parts.loss
        with still.once(), torch.set_grad_enabled(self.needs_grad):
            if begin:
                Attributes(self._model, loss).write(begin)
            value = check_scalar(self._forward(rows))
        there, weights = buffers_of(self._model, loss), dict(self._model.named_parameters())
        return _Seen(
            float(value[0] if isinstance(value, tuple) else value),
            {name: there[name].detach().clone() for name in self._changed.buffers},
            {name: weights[name].detach().clone() for name in self._changed.parameters},
            Attributes(self._model, loss).read(self._changed.attributes),
        )

    def _by_rows(self, whole: _Seen, parts: list[_Seen]) -> set[str]:
        """Buffers that came out otherwise for other rows; and those that stood still because noise was silenced."""
        there = buffers_of(self._model, self._trial.parts.loss)
        return {
            name
            for name, after in whole.buffers.items()
            if same(after, there[name].detach()) or not all(same(after, part.buffers[name]) for part in parts)
        }

    def _counted(self, still: Still, rows: Samples, whole: _Seen, parts: list[_Seen]) -> Iterator[str]:
        """Attributes that are a part of the state; those that only hold what the last rows left are none."""
        paths = self._changed.attributes
        alike = {
            path: whole.attributes.get(path, ABSENT)
            for path in paths
            if all(whole.agrees(part, path) for part in parts)
        }
        for path, kept in alike.items():
            if too_large(kept):
                raise _attribute_error(path, "is too large to be kept with every commit")
            yield path
        self.passing = tuple(path for path in paths if path not in alike)
        if not self.passing:
            return
        # The next call, with all that the first one left, and without what goes by rows; and that once more, because
        # what a clock says is never the same, and tells nothing.
        carried, without, again = (self._seen(still, rows, begin) for begin in (whole.attributes, alike, alike))
        for path in self.passing:
            clock = not without.agrees(again, path)
            if not _near(carried.value, without.value) or not (clock or carried.agrees(without, path)):
                raise _attribute_error(path, "goes from call to call, and is otherwise for other rows")

    def _check_rewrites(self, whole: _Seen, some: _Seen, rest: _Seen) -> None:
        """Parameters that forward changes must come to what several workers' changes come to together."""
        weights = dict(self._model.named_parameters())
        for name, all_at_once in whole.parameters.items():
            before = weights[name].detach()
            first, second = some.parameters[name], rest.parameters[name]
            merged = torch.where(first != before, first, second)
            limit = _ALIKE * max(1.0, float(all_at_once.abs().max()))
            if bool(((merged - all_at_once).abs() > limit).any()):
                raise ModelError(
                    f"forward changes parameter {name} by the rows it sees, in a way that several workers cannot put "
                    "together.",
                    cause="an average, a codebook or a count that is kept in a parameter",
                    remedy="make it a buffer (register_buffer), with a rule: train(..., buffers={...})",
                )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME_LOSS * max(abs(one), abs(other), _SAME_LOSS) or (one != one and other != other)


def _attribute_error(path: str, what: str) -> ModelError:
    return ModelError(
        f"The attribute {path} changes in forward and {what}.",
        cause="a count of samples, a hidden state or a random generator that each worker would have one of its own of",
        remedy="for a count or a running value, register_buffer with a rule: train(..., buffers={...}); for random "
        "numbers, draw from torch, numpy.random or random, which belong to the seed of the run; count steps, not rows",
    )
