"""Buffers: what becomes of those that a model changes in forward, where each worker sees its own rows.

Every buffer that changes has a rule. One that changes alike on all workers, whatever their rows, as a count of calls
does, is *alike*, and looked at now and then. Running statistics of torch's own layers are *mean*. Whatever else differs
from worker to worker has the rule that its user chose: mean, sum, max, min, first or own. Nothing is guessed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parakit.errors import InputError, ModelError
from parakit.model_state.peers import Peers
from parakit.validation import in_short

__all__ = ["RULES", "Buffers", "Rule", "buffers_of", "check_rules", "merge", "rules_for"]

#: What a user may choose for a buffer.
RULES = ("mean", "sum", "max", "min", "first", "own")
#: Those, and what needs no choice: buffers that all workers change alike, and statistics that no step reads.
Rule = Literal["mean", "sum", "max", "min", "first", "own", "alike", "statistics"]

_NORMS = (nn.modules.batchnorm._NormBase,)
_STATISTICS = ("running_mean", "running_var")
_AT_ONCE = 1 << 20  # elements of which a copy is made for a mark


def buffers_of(model: nn.Module, loss: Any = None) -> dict[str, Tensor]:
    """The buffers of a model, and of a loss that is a module, by name; those of the loss begin with ``loss.``."""
    found = {name: buffer for name, buffer in model.named_buffers() if _is_strided(buffer)}
    if isinstance(loss, nn.Module):
        ours = set(map(id, found.values()))
        theirs = {f"loss.{name}": buffer for name, buffer in loss.named_buffers() if _is_strided(buffer)}
        found |= {name: buffer for name, buffer in theirs.items() if id(buffer) not in ours}
    return found


def _is_strided(buffer: Tensor) -> bool:
    return buffer.layout is torch.strided and not buffer.is_quantized


def check_rules(rules: Any) -> dict[str, str]:
    """What a user gave as rules, checked.

    Raises
    ------
    InputError
        If it is no dict from names to rules.
    """
    if rules is None:
        return {}
    if not isinstance(rules, Mapping) or not all(isinstance(name, str) for name in rules):
        raise InputError(
            f"buffers is {rules!r:.80}; it must be a dict from names of buffers to rules.",
            remedy='buffers={"queue": "first", "*.seen": "sum"}',
        )
    for name, rule in rules.items():
        if rule not in RULES:
            raise InputError(f"buffers[{name!r}] is {rule!r}; it must be one of {', '.join(map(repr, RULES))}.")
    return dict(rules)


def _rule_by_type(model: nn.Module, name: str) -> Rule | None:
    """The rule of a buffer of one of torch's own layers, which says what the buffer means; None where nothing does."""
    owner, _, own_name = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    if not isinstance(module, _NORMS):
        return None
    if isinstance(module, nn.SyncBatchNorm):
        return "alike"
    if own_name in _STATISTICS:
        return "statistics"
    return "alike" if own_name == "num_batches_tracked" else None


def rules_for(
    model: nn.Module, loss: Any, changed: Iterable[str], by_rows: Iterable[str], chosen: Mapping[str, str]
) -> dict[str, Rule]:
    """The rule of each buffer that forward changes.

    Parameters
    ----------
    model : nn.Module
    loss : callable
    changed : iterable of str
        Names of buffers that forward changed when it was tried.
    by_rows : iterable of str
        Those of them that came out otherwise for other rows.
    chosen : mapping of str to str
        A user's rules, by names or patterns such as ``"*.queue"``.

    Raises
    ------
    ModelError
        If there is no rule for one.
    InputError
        If a name that was chosen is of no buffer, or of one that its rule does not go with.
    """
    there = buffers_of(model, loss)
    names = list(there)
    for pattern in chosen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"buffers has a rule for {pattern!r}, but the model has no such buffer; it has "
                f"{in_short(names) or 'none'}.",
                remedy="name a buffer as model.named_buffers() does, or leave the rule out",
            )
    changed, by_rows, unknown = set(changed), set(by_rows), []
    rules: dict[str, Rule] = {}
    for name in names:
        wanted = next((rule for pattern, rule in chosen.items() if fnmatchcase(name, pattern)), None)
        known = _rule_by_type(model, name) if name in changed else None
        if wanted in ("max", "min") and there[name].is_complex():
            raise InputError(
                f"buffers has the rule {wanted!r} for {name}, whose numbers are complex: none of them is the largest.",
                remedy="choose mean, sum, first or own; or keep real and imaginary parts in buffers of their own",
            )
        if wanted is not None:
            rules[name] = wanted  # type: ignore[assignment]  # one of RULES
        elif known is not None:
            rules[name] = known
        elif name in by_rows:
            unknown.append(name)
        elif name in changed:
            rules[name] = "alike"
    if unknown:
        many = f"{len(unknown)} buffers" if len(unknown) > 1 else "a buffer"
        raise ModelError(
            f"The model changes {many} in forward by the rows it sees, and each worker sees its own: "
            f"{in_short(unknown)}.",
            cause="a queue, a count of samples, a largest value or a codebook; nothing says what several of it come to",
            remedy=f"say it: train(..., buffers={{{unknown[0]!r}: rule}}), with the rule one of "
            f"{', '.join(map(repr, RULES))}",
        )
    return rules


class Buffers:
    """The buffers of one worker's model, brought together by their rules.

    Parameters
    ----------
    model : nn.Module
    loss : callable
    rules : mapping of str to Rule
    """

    def __init__(self, model: nn.Module, loss: Any, rules: Mapping[str, Rule]) -> None:
        self._model, self._loss = model, loss
        self._rules = dict(rules)
        self._each_step = [name for name, rule in rules.items() if rule not in ("own", "alike", "statistics")]
        self._before: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] = {}
        self._marks = self._mark()

    @property
    def there(self) -> dict[str, Tensor]:
        """The buffers, by name."""
        return buffers_of(self._model, self._loss)

    @property
    def each_step(self) -> bool:
        """Whether some are to be brought together after every step."""
        return bool(self._each_step)

    def statistics(self) -> list[Tensor]:
        """Running statistics, which workers average when they commit."""
        there = self.there
        return [there[name] for name, rule in self._rules.items() if rule == "statistics"]

    def begin(self, *, standing_in: bool = False) -> None:
        """Note how buffers are before forward.

        Parameters
        ----------
        standing_in : bool
            Whether what forward does to them is to be undone by `stood_in`.
        """
        if self._each_step or standing_in:
            there = self.there
            self._before = {name: there[name].detach().clone() for name in self._each_step}
            undone = [name for name, rule in self._rules.items() if rule != "alike"] if standing_in else []
            self._saved = {name: there[name].detach().clone() for name in undone}

    def settle(self, peers: Peers) -> None:
        """After forward, let every worker have what all of them come to; all workers call this together."""
        if peers.size == 1 or not self._each_step:
            return
        there = self.there
        mine = {name: _wide(there[name].detach()).cpu() for name in self._each_step}
        every: dict[str, list[Tensor]] = {}
        for dtype in (torch.float64, torch.complex128, torch.int64):  # in the same order on every worker
            every |= _of_all(peers, {name: values for name, values in mine.items() if values.dtype == dtype})
        for name, values in every.items():
            there[name].copy_(merge(self._rules[name], _wide(self._before[name]).cpu(), values))

    def stood_in(self) -> None:
        """After a forward pass over rows that are no part of the batch: undo what it did, but for what is alike."""
        there = self.there
        for name, before in self._saved.items():
            there[name].copy_(before)

    def alike(self) -> list[float]:
        """Marks of the buffers that should be the same on all workers."""
        there = self.there
        return [float(_mark_of(there[name])) for name, rule in self._rules.items() if rule == "alike"]

    def take(self, every: Sequence[Mapping[str, Tensor]]) -> None:
        """Set those that have rules from those of all workers, by these; each worker gave its own, by rank."""
        there = self.there
        for name, rule in self._rules.items():
            buffer, values = there[name], [buffers[name] for buffers in every]
            if rule in ("alike", "own", "first"):
                buffer.copy_(values[0])
            else:
                buffer.copy_(merge(rule, _wide(buffer), [_wide(value) for value in values]))

    def surprises(self) -> list[str]:
        """Buffers that have changed since this was last asked, and have no rule: nobody saw them change before."""
        before, self._marks = self._marks, {}
        changed = []
        for name, buffer in self._unruled():
            known = before.get(name)
            # In place or by another tensor, torch counts what changes one; it may have come to the same values.
            touched = known is None or known[:2] != (id(buffer), buffer._version)
            value = _mark_of(buffer) if known is None or touched else known[2]
            if known is not None and touched and value != known[2]:
                changed.append(name)
            self._marks[name] = id(buffer), buffer._version, value
        return changed

    def forget(self) -> None:
        """Take buffers as they are now for known: somebody else has set them."""
        self._marks = self._mark()

    def _mark(self) -> dict[str, tuple[int, int, int]]:
        return {name: (id(buffer), buffer._version, _mark_of(buffer)) for name, buffer in self._unruled()}

    def _unruled(self) -> list[tuple[str, Tensor]]:
        return [(name, buffer) for name, buffer in self.there.items() if name not in self._rules]


def _mark_of(buffer: Tensor) -> int:
    """A number below 2**32 that is the same for the same values, as `same` has it, and that any change changes.

    Those that have changed by a little are as unlike as any others, so it is no sum; and infinite values have one too.
    """
    values = buffer.detach().reshape(-1).resolve_conj()
    mark = zlib.crc32(repr((tuple(buffer.shape), buffer.dtype)).encode())
    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    for piece in values.split(_AT_ONCE):
        mark = zlib.crc32(_canonical(piece.cpu()).view(torch.uint8).numpy().tobytes(), mark)
    return mark


def _canonical(values: Tensor) -> Tensor:
    """Values such that equal ones have equal bytes: there is one zero, and one NaN."""
    if not values.is_floating_point():
        return values.contiguous()
    values = values.double() + 0.0
    return values.masked_fill_(values.isnan(), torch.nan)


def _wide(values: Tensor) -> Tensor:
    """Values in the type of their kind with the widest range: a sum of what one can hold may lie outside of it."""
    if values.is_complex():
        return values.to(torch.complex128)
    return values.double() if values.is_floating_point() or values.dtype is torch.bool else values.to(torch.int64)


def _of_all(peers: Peers, mine: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """What all workers have of some buffers, by name and rank; each gives its own, of one of the types of `_wide`."""
    if not mine:
        return {}
    flat = torch.cat([values.reshape(-1) for values in mine.values()])
    parts = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    every = parts.new_zeros(peers.size, len(parts))
    every[peers.rank] = parts
    peers.sum(every.view(-1))
    rows = torch.view_as_complex(every.view(peers.size, -1, 2)) if flat.is_complex() else every
    columns = rows.split([values.numel() for values in mine.values()], dim=1)
    return {
        name: [row.view(values.shape) for row in column]
        for (name, values), column in zip(mine.items(), columns, strict=True)
    }


def merge(rule: str, before: Tensor, values: Sequence[Tensor]) -> Tensor:
    """What the values of all workers come to.

    Parameters
    ----------
    rule : str
    before : tensor
        What all began with.
    values : sequence of tensors
        What each has now, by rank.
    """
    if rule == "sum":  # what is infinite, and stays so, has changed by nothing
        changes = ((value - before).masked_fill(value == before, 0) for value in values)
        return before + sum(changes, torch.zeros_like(before))
    if rule in ("mean", "statistics"):
        every = torch.stack(list(values))
        whole = every.dtype is torch.int64
        return every.sum(0).div(len(values), rounding_mode="trunc") if whole else every.mean(0)
    if rule == "max":
        return torch.stack(list(values)).amax(0)
    if rule == "min":
        return torch.stack(list(values)).amin(0)
    return values[0]
