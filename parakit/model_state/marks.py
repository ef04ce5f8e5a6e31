"""Marks: what a value can be told by, in a few characters, the same in each process that has an equal one."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parakit.model_state.containers import PLAIN

__all__ = ["mark_of", "nested_lists", "slots_of"]

_LOOKED_AT = 1 << 22  # elements
_MOST = 20_000  # parts of a value


def mark_of(tensor: Tensor) -> tuple[Any, ...]:
    """What nearly every change of a tensor changes."""
    values = tensor.detach()
    if values.numel() > _LOOKED_AT:  # what is this large may be a data set, and nobody adds that up again and again
        length = max(1, -(-values.shape[0] * _LOOKED_AT // values.numel()))
        values = values[:: max(1, values.shape[0] // length)]
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    total = values.to_dense().double().sum().item() if values.numel() and not values.is_quantized else 0.0
    return tuple(tensor.shape), str(tensor.dtype), total


def nested_lists(value: Any) -> Any:
    """A value as nested lists of what its parts can be told by; order counts where it does in the value."""
    return _Description().of(value)


class _Description:
    def __init__(self) -> None:
        self._under_way: set[int] = set()
        self._parts = 0

    def of(self, value: Any) -> Any:
        kind = type(value)
        self._parts += 1
        if kind in PLAIN:
            return repr(value)
        if self._parts > _MOST or id(value) in self._under_way:
            return "..."
        self._under_way.add(id(value))
        try:
            return [kind.__qualname__, self._content(value)]
        finally:
            self._under_way.discard(id(value))

    def _content(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return mark_of(value)
        if isinstance(value, np.ndarray):
            return value.shape, str(value.dtype), 0 if value.dtype.hasobject else zlib.crc32(value.tobytes())
        if isinstance(value, torch.Generator):
            return zlib.crc32(value.get_state().numpy().tobytes())
        if isinstance(value, np.random.Generator):
            return repr(value.bit_generator.state)
        if isinstance(value, Mapping):
            return sorted(([self.of(key), self.of(part)] for key, part in value.items()), key=repr)
        if isinstance(value, set | frozenset):
            return sorted(map(self.of, value), key=repr)
        if isinstance(value, list | tuple | deque):
            return [self.of(part) for part in value]
        if isinstance(value, type | nn.Module | FunctionType | MethodType | BuiltinFunctionType | ModuleType):
            return getattr(value, "__qualname__", "")
        slots = [name for one in type(value).__mro__ for name in slots_of(one)]
        held = getattr(value, "__dict__", {}) | {name: getattr(value, name) for name in slots if hasattr(value, name)}
        return [[name, self.of(part)] for name, part in sorted(held.items())]


def slots_of(kind: type) -> tuple[str, ...]:
    """Names of attributes that a class keeps without a dictionary."""
    named = vars(kind).get("__slots__", ())
    return (named,) if isinstance(named, str) else tuple(named)
