"""The state of a run: what it is, how it is copied, and what keeps the newest ones."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Snapshots",
    "State",
    "copy_state",
    "nbytes_of",
]

#: Named tensors and plain values: everything a run needs to go on from a step.
State = dict[str, Any]


class Snapshots(Protocol):
    """Where a process keeps the states that it can go back to."""

    @property
    def step(self) -> int:
        """Steps of the newest state that is kept."""

    def keep(self, state: State) -> None:
        """Keep a copy of a state; older ones may be given up for it, and those of later steps are: they were undone."""

    def of_step(self, step: int) -> State | None:
        """The state of a step, if it is kept; its tensors are not to be changed."""


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
