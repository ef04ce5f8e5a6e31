"""Trees of tensors: what a Dataset item, a batch or an output may be, and how one travels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Tree",
    "leaves",
    "map_tree",
    "pack",
    "unpack",
]

Tree = Any  # Tensor | tuple[Tree, ...] | dict[str, Tree]; spelled out it only gets in the way
# numpy has no such type, so these travel as integers of the same width.
_DISGUISES = {torch.bfloat16: torch.int16}


def map_tree(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply a function to every leaf, keeping tuples and dicts."""
    if isinstance(tree, Tensor):  # asked first, for there is one in each step
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(map_tree(function, value) for value in tree)
    return function(tree)


def leaves(tree: Tree) -> list[Any]:
    """All leaves of a tree, in order."""
    found: list[Any] = []
    map_tree(found.append, tree)
    return found


@dataclass(frozen=True, slots=True)
class _Disguised:
    """A tensor of a type that numpy lacks, as integers."""

    array: np.ndarray[Any, Any]
    dtype: torch.dtype


def pack(value: Any) -> Any:
    """Tensors to numpy arrays, through dicts, lists and tuples: arrays travel between processes without a copy."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        disguise = _DISGUISES.get(plain.dtype)
        return _Disguised(plain.view(disguise).numpy(), plain.dtype) if disguise else plain.numpy()
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pack(item) for item in value)
    return value


def unpack(value: Any) -> Any:
    """What `pack` packed, in memory that may be written to."""
    if isinstance(value, _Disguised):
        return _owned(value.array).view(value.dtype)
    if isinstance(value, np.ndarray):
        return _owned(value)
    if isinstance(value, dict):
        return {key: unpack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unpack(item) for item in value)
    return value


def _owned(array: np.ndarray[Any, Any]) -> Tensor:
    # What arrives through a connection, or from a user, may be read-only, which torch cannot express.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
