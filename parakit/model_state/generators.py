"""Generators of random numbers that code keeps for itself: as attributes, in closures, or as global variables."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from parakit.model_state.variables import variables_of
from parakit.serialization.local_code import is_own_code

__all__ = ["OwnGenerators"]

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_METHODS = ("__getitem__", "__getitems__", "__call__", "forward", "collate")
_MOST = 20_000  # things that are looked at: a list of files may be long, and holds no generator


class OwnGenerators:
    """The generators behind an object whose methods are called, and what was drawn from them since.

    Parameters
    ----------
    thing : object
        Such as a dataset, with its transforms.
    """

    def __init__(self, thing: Any) -> None:
        self._found = list(_generators_behind(thing))
        self._before = [_state(generator) for generator in self._found]

    def drew(self) -> bool:
        """Whether one of them has moved on."""
        return [_state(generator) for generator in self._found] != self._before


def _state(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return b"" if isinstance(generator, random.SystemRandom) else pickle.dumps(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    return pickle.dumps(generator.get_state())


def _generators_behind(thing: Any) -> Iterator[Any]:
    seen: dict[int, Any] = {}  # with the things themselves: an id may be used again
    waiting = [thing]
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, torch.Tensor | np.ndarray | str | bytes | int | float):
            continue
        seen[id(value)] = value
        if isinstance(value, _KINDS):
            yield value
            continue
        waiting += _parts_of(value)


def _parts_of(value: Any) -> list[Any]:
    """What a value holds, and what its methods know."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)[:_MOST]
    parts = list(getattr(value, "__dict__", {}).values()) if not isinstance(value, type) else []
    code = [value] if isinstance(value, FunctionType | MethodType) else []
    if not code and is_own_code(type(value)):
        code = [getattr(value, name) for name in _METHODS if name in dir(type(value))]
    for one in code:
        parts += [place.get() for place in variables_of(nn.Module(), one)]
    return parts
