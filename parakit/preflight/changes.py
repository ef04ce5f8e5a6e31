"""What forward changes: buffers, parameters and attributes; and which of that goes by the rows it sees.

What changes alike for any rows is a state that every worker keeps for itself. What goes by rows needs a rule, or is
refused; what nobody reads before it is written again needs nothing.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, optim

from parakit.data.samples import Samples
from parakit.errors import LossError, ModelError
from parakit.failures.source_lines import describe_error, listing, places_of
from parakit.gradients.forward import call_model
from parakit.losses.summed import check_scalar
from parakit.model_state.attributes import ABSENT, Attributes, Kept, same, too_large
from parakit.model_state.buffers import Rule, buffers_of, rules_for
from parakit.model_state.undisturbed import Still
from parakit.model_state.variables import variables_of
from parakit.preflight.trial import Trial
from parakit.system.devices import CPU, seed
from parakit.system.process_settings import Draws

__all__ = ["Changed", "Changes", "no_steps_of_own"]

_ALIKE = 1e-4  # relative
_SAME_LOSS = 1e-6  # relative
_PARTS = 1000  # of a value, that are looked at for an optimizer
_BY_ROWS = "goes from call to call, and is otherwise for other rows"


@dataclass(frozen=True)
class Changed:
    """Names of what one step has changed; buffers that are `unmoved` were written to, with what was there."""

    buffers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()

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
    seeds : bool
        Whether it sets the seed of torch's generator itself: then it draws the same in each call, and is not noisy.
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
        self.needs_grad, self.noisy, self.seeds = needs_grad, False, False
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
        if self._draws.torch:
            self.seeds = torch.equal(*(self._generator_after(rows, value) for value in (0, 1)))
            self.noisy = not self.seeds
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

    def _generator_after(self, rows: Samples, value: int) -> Tensor:
        """The state of torch's generator after a forward pass that began with a seed."""
        still = self.still()
        with still.kept(), still.once():
            seed(CPU, value)
            self._forward(rows)
            return torch.random.get_rng_state()

    def _forward(self, rows: Samples) -> Any:
        rows = rows.copy_rows()
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
            if (same(after, there[name].detach()) and name not in self._changed.unmoved)
            or not all(same(after, part.buffers[name]) for part in parts)
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
        carried = self._second(still, rows, whole.attributes)
        try:  # the same without what goes by rows; and once more, because what a clock says is never the same
            without, again = (self._seen(still, rows, alike) for _ in range(2))
        except Exception as error:  # code never has such a state, and cannot do without what the first call left
            raise _attribute_error(self.passing[0], _BY_ROWS) from error
        for path in self.passing:
            clock = not without.agrees(again, path)
            if not _near(carried.value, without.value) or not (clock or carried.agrees(without, path)):
                raise _attribute_error(path, _BY_ROWS)

    def _second(self, still: Still, rows: Samples, left: Mapping[str, Kept]) -> _Seen:
        """The next call, with all that the first one left."""
        try:
            return self._seen(still, rows, left)
        except Exception as error:
            raise ModelError(
                f"The model and its loss cannot be called twice: {describe_error(error)}",
                where=listing(places_of(error)),
                cause=f"what the first call leaves in {self.passing[0]}",
                remedy="call both twice with the same batch in this notebook until it works",
            ) from error

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


@contextmanager
def no_steps_of_own(trial: Trial, who: str) -> Iterator[None]:
    """Refuse a call that steps an optimizer which the model or the loss keeps, or makes and keeps.

    Parameters
    ----------
    trial : Trial
    who : {"model", "loss"}
        Which of them is called.

    Raises
    ------
    ModelError, LossError
    """
    before, stepped = list(_optimizers_in(trial)), list[str]()
    handles = [
        optimizer.register_step_post_hook(partial(lambda path, *_: stepped.append(path), path))
        for path, optimizer in before
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    known = [optimizer for _, optimizer in before]
    stepped += [path for path, optimizer in _optimizers_in(trial) if all(optimizer is not one for one in known)]
    if stepped:
        raise (LossError if who == "loss" else ModelError)(
            f"The {who} steps an optimizer of its own, in its attribute {stepped[0]}.",
            cause="an adversary or the like that is trained within a step: each worker would step it for its own rows",
            remedy="put its parameters into the model, so that one optimizer trains all of them, with a gradient "
            "reversal for an adversary; or train the two in turns, in a run each",
        )


def _optimizers_in(trial: Trial) -> Iterator[tuple[str, optim.Optimizer]]:
    """Optimizers that a model and its loss keep, and where."""
    for place in variables_of(trial.model, trial.parts.loss):
        for found in _optimizers_held(place.get()):
            yield place.path, found


def _optimizers_held(value: Any) -> Iterator[optim.Optimizer]:
    """Optimizers that a value is or holds, as far as a look at a few of its parts tells, the outer ones first."""
    waiting, seen = deque([value]), dict[int, Any]()  # which keeps what it knows by an id
    while waiting and len(seen) < _PARTS:
        one = waiting.popleft()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, optim.Optimizer):
            yield one
        elif isinstance(one, dict):
            waiting.extend(islice(one.values(), _PARTS))
        elif isinstance(one, list | tuple | set | frozenset | deque):
            waiting.extend(islice(one, _PARTS))
        elif not isinstance(one, Tensor | type | types.ModuleType | types.FunctionType):
            waiting.extend(getattr(one, "__dict__", {}).values())


def _attribute_error(path: str, what: str) -> ModelError:
    return ModelError(
        f"The attribute {path} changes in forward and {what}.",
        cause="a count of samples, a hidden state or a random generator that each worker would have one of its own of",
        remedy="for a count or a running value, register_buffer with a rule: train(..., buffers={...}); for random "
        "numbers, draw from torch, numpy.random or random, which belong to the seed of the run; count steps, not rows",
    )
