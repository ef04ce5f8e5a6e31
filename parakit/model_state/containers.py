"""Containers of plain values that code keeps: lists, dicts and the like, written as lists of plain values alone.

So they travel, are compared and lie in checkpoints without being pickled.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

__all__ = ["PLAIN", "UNKNOWN", "alike", "decode", "encode"]

#: Types whose values are themselves.
PLAIN = (bool, int, float, complex, str, bytes, type(None))
#: Stands for what cannot be written so.
UNKNOWN = object()

_SEQUENCES: dict[str, type[Any]] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
_MAPPINGS: dict[str, type[Any]] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_DEQUE = "deque"
_MOST = 100_000  # parts
_MOST_BYTES = 1 << 24


class _NotPlainError(Exception):
    """Something else is in it."""


def encode(value: Any, owned: Collection[int] = ()) -> Any:
    """A container as lists: its type's name, and what it holds; UNKNOWN where something else is in it.

    Parameters
    ----------
    value : list, tuple, set, frozenset, dict, OrderedDict, Counter or deque
        Of values of `PLAIN`, tensors, and more of the kind, each in one place alone.
    owned : collection of int
        Ids of tensors that belong to somebody else.
    """
    try:
        return _Encoder(owned).of(value)
    except _NotPlainError:
        return UNKNOWN


class _Encoder:
    def __init__(self, owned: Collection[int]) -> None:
        self._owned = owned
        self._seen: set[int] = set()
        self._parts = self._bytes = 0

    def of(self, value: Any) -> Any:
        kind = type(value)
        self._parts += 1
        if self._parts > _MOST:
            raise _NotPlainError
        if kind in PLAIN:
            return value
        if id(value) in self._seen and value != ():  # one object in two places is to be one again
            raise _NotPlainError
        self._seen.add(id(value))
        name = kind.__name__
        if kind is Tensor:
            return self._tensor(value)
        if kind in (set, frozenset):  # in an order that is the same in each process
            return [name, sorted((self.of(part) for part in value), key=repr)]
        if kind in (list, tuple):
            return [name, [self.of(part) for part in value]]
        if kind is deque:
            return [name, [self.of(part) for part in value], value.maxlen]
        if _MAPPINGS.get(name) is kind:
            return [name, [[self.of(key), self.of(part)] for key, part in value.items()]]
        raise _NotPlainError

    def _tensor(self, tensor: Tensor) -> Tensor:
        self._bytes += tensor.nbytes
        strange = tensor.layout is not torch.strided or tensor.requires_grad or vars(tensor)
        if id(tensor) in self._owned or strange or self._bytes > _MOST_BYTES:
            raise _NotPlainError
        return tensor.detach().clone()


def decode(code: Any) -> Any:
    """The container that was encoded, made anew."""
    if isinstance(code, Tensor):
        return code.detach().clone()
    if not isinstance(code, list):
        return code
    name, parts = code[:2]
    if name in _MAPPINGS:
        return _MAPPINGS[name]((decode(key), decode(part)) for key, part in parts)
    made = [decode(part) for part in parts]
    return deque(made, code[2]) if name == _DEQUE else _SEQUENCES[name](made)


def alike(one: Any, other: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether two codes are of equal containers, by what says so of two plain values or tensors."""
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return False
        return all(alike(a, b, same) for a, b in zip(one, other, strict=True))
    return same(one, other)
