"""One engine for several workers of one process, which take turns with it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from parakit.engines.passes import Passes
from parakit.model_state.agreement import Agreement
from parakit.model_state.buffers import Rule

__all__ = ["Turns"]


class Turns:
    """Lets each worker find buffers and attributes as its own process would, and puts them together afterwards.

    Running statistics move by a linear rule, so averaging after each step gives the same as averaging when workers
    commit.

    Parameters
    ----------
    passes : Passes
    agreement : Agreement
    rules : mapping of str to Rule
        Of the buffers that forward changes.
    own : dict of int to dict
        By rank, the buffers of the rule "own"; changed here.
    """

    def __init__(
        self, passes: Passes, agreement: Agreement, rules: Mapping[str, Rule], own: dict[int, dict[str, Tensor]]
    ) -> None:
        self._passes, self._agreement, self._rules, self._own = passes, agreement, rules, own
        there = passes.buffers.there
        self._before = {name: buffer.detach().clone() for name, buffer in there.items() if name in rules}
        self._counted = agreement.counted()
        self._seen: list[dict[str, Tensor]] = []
        self._marks: list[list[float]] = []

    def begin(self, rank: int) -> None:
        """It is the turn of a worker."""
        there = self._passes.buffers.there
        for name, rule in self._rules.items():
            mine = self._own.get(rank, {}).get(name) if rule == "own" else None
            there[name].detach().copy_(self._before[name] if mine is None else mine)
        if rank and (before := {**self._counted, **self._agreement.late()}):
            self._passes.attributes.write(before)

    def end(self, rank: int) -> None:
        """It is over."""
        self._seen.append({name: buffer.detach().clone() for name, buffer in self._passes.buffers.there.items()})
        kept = {name: self._seen[-1][name] for name, rule in self._rules.items() if rule == "own"}
        if kept:
            self._own[rank] = kept
        self._marks.append(self._agreement.marks())

    def settle(self) -> None:
        """All had their turns."""
        there = self._passes.buffers.there
        for name, before in self._before.items():
            there[name].detach().copy_(before)
        self._passes.buffers.take(self._seen)
        for marks in self._marks[1:]:
            self._agreement.check(self._marks[0], marks)
        self._agreement.count_late()
