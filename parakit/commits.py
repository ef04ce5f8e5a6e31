"""Commits: the states that a process can go back to.

Owns copies of states; refuses to know what is trained.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Commits", "PrivateCommits", "State", "copy_state", "nbytes_of"]

#: Named tensors and plain values: everything a run needs to go on from a step.
State = dict[str, Any]


class Commits(Protocol):
    """Where a process keeps the states that it can go back to."""

    @property
    def step(self) -> int:
        """Steps of the newest state that is kept."""

    def keep(self, state: State) -> None:
        """Keep a copy of a state; older ones may be given up for it, and those of later steps are: they were undone."""

    def of_step(self, step: int) -> State | None:
        """The state of a step, if it is kept; its tensors are not to be changed."""


class PrivateCommits:
    """The newest states, in this process's own memory.

    Parameters
    ----------
    most : int
        How many to keep. A state is written into the memory of the oldest one.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._states: list[State] = []  # the newest first
        self._spare: list[State] = []  # memory of states that do not count any more

    @property
    def step(self) -> int:
        """Steps of the newest state."""
        return int(self._states[0]["step"]) if self._states else -1

    def keep(self, state: State) -> None:
        """Keep a copy of a state; those of the same step and of later ones count no more."""
        earlier = [kept for kept in self._states if kept["step"] < state["step"]]
        self._spare += [kept for kept in self._states if kept["step"] >= state["step"]]
        self._spare += earlier[self._most - 1 :]
        into = self._spare.pop() if self._spare else None
        self._states = [copy_state(state, into), *earlier[: self._most - 1]]

    def give_up(self) -> bool:
        """Keep nothing, and no memory for it; says whether there was any."""
        some = bool(self._states or self._spare)
        self._states, self._spare = [], []
        return some

    def of_step(self, step: int) -> State | None:
        """The state of a step, if it is kept."""
        return next((kept for kept in self._states if kept["step"] == step), None)


def nbytes_of(tree: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(nbytes_of, parts))


def copy_state(tree: Any, into: Any = None, *, device: torch.device | None = None) -> Any:
    """A copy of a state, written into an older copy's memory where that has the same shape, or else on a device."""
    if isinstance(tree, Tensor):
        if isinstance(into, Tensor) and into.shape == tree.shape and into.dtype == tree.dtype:
            return into.copy_(tree)
        return tree.detach().to(device or tree.device, copy=True)
    if isinstance(tree, dict):
        old = into if isinstance(into, dict) else {}
        return {key: copy_state(value, old.get(key), device=device) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        olds = into if isinstance(into, list | tuple) and len(into) == len(tree) else [None] * len(tree)
        return type(tree)(copy_state(value, old, device=device) for value, old in zip(tree, olds, strict=True))
    return copy.deepcopy(tree)
