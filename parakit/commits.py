"""Commits: the states that a process can go back to.

Owns copies of states; refuses to know what is trained.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Commits", "PrivateCommits", "State", "copy_state"]

#: Named tensors and plain values: everything a run needs to go on from a step.
State = dict[str, Any]


class Commits(Protocol):
    """Where a process keeps the states that it can go back to."""

    @property
    def step(self) -> int:
        """Steps of the newest state that is kept."""

    def keep(self, state: State) -> None:
        """Keep a copy of a state; an older one may be given up for it."""

    def of_step(self, step: int) -> State | None:
        """The state of a step, if it is kept; its tensors are not to be changed."""


class PrivateCommits:
    """The newest state, in this process's own memory."""

    def __init__(self) -> None:
        self._state: State = {"step": -1}

    @property
    def step(self) -> int:
        """Steps of the state that is kept."""
        return int(self._state["step"])

    def keep(self, state: State) -> None:
        """Keep a copy of a state, in the memory of the one before it."""
        self._state = copy_state(state, self._state)

    def of_step(self, step: int) -> State | None:
        """The state that is kept, if it is of this step."""
        return self._state if self.step == step else None


def copy_state(tree: Any, into: Any = None) -> Any:
    """A copy of a state, written into an older copy's memory where that has the same shape."""
    if isinstance(tree, Tensor):
        if isinstance(into, Tensor) and into.shape == tree.shape and into.dtype == tree.dtype:
            return into.copy_(tree)
        return tree.detach().clone()
    if isinstance(tree, dict):
        old = into if isinstance(into, dict) else {}
        return {key: copy_state(value, old.get(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        olds = into if isinstance(into, list | tuple) and len(into) == len(tree) else [None] * len(tree)
        return type(tree)(copy_state(value, old) for value, old in zip(tree, olds, strict=True))
    return copy.deepcopy(tree)
