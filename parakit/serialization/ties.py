"""Ties: which functions and classes know a part of what is copied, by a variable."""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import cloudpickle
from torch import Tensor, nn

from parakit.serialization.code_names import names_in
from parakit.serialization.local_code import is_own_code

__all__ = ["Ties"]

_TELLS_NOTHING = types.ModuleType | str | int | float | None


class Ties:
    """What knows some modules and tensors.

    Parameters
    ----------
    own : sequence
        The modules and tensors.
    """

    def __init__(self, own: Sequence[Any]) -> None:
        self._ids = set(map(id, own))
        self._known: dict[int, bool] = {}
        self._kept_alive: list[Any] = []

    def known_to(self, thing: Any) -> bool:
        """Whether a value, a function or a class knows one of them: holds it, or names it in its code."""
        if isinstance(thing, _TELLS_NOTHING):
            return False
        if id(thing) not in self._known:
            self._known[id(thing)] = False  # as far as it is known, for whoever comes here in a circle
            self._kept_alive.append(thing)
            self._known[id(thing)] = self._look_at(thing)
        return self._known[id(thing)]

    def _look_at(self, thing: Any) -> bool:
        if isinstance(thing, Tensor):
            return id(thing) in self._ids
        if isinstance(thing, nn.Module):
            return not self._ids.isdisjoint(map(id, [*thing.modules(), *thing.parameters(), *thing.buffers()]))
        if isinstance(thing, types.FunctionType):
            return any(map(self.known_to, _variables_of(thing)))
        if isinstance(thing, type):
            return is_own_code(thing) and any(map(self.known_to, [*_functions_of(thing), *thing.__bases__]))
        return self._is_held_by(thing)

    def _is_held_by(self, value: Any) -> bool:
        finder = _Finder(self._ids)
        with suppress(Exception):
            finder.dump(value)
        return finder.found


def _variables_of(function: types.FunctionType) -> Iterator[Any]:
    variables = function.__globals__
    yield from (variables[name] for name in names_in(function.__code__).variables if name in variables)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing was put in yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()


def _functions_of(kind: type) -> Iterator[types.FunctionType]:
    for value in vars(kind).values():
        if isinstance(value, property):
            yield from (f for f in (value.fget, value.fset) if isinstance(f, types.FunctionType))
        elif isinstance(value, staticmethod | classmethod | functools.cached_property):
            function = value.func if isinstance(value, functools.cached_property) else value.__func__
            yield from (function,) if isinstance(function, types.FunctionType) else ()
        elif isinstance(value, types.FunctionType):
            yield value


class _Finder(cloudpickle.Pickler):  # type: ignore[misc]  # it carries no annotations
    """Looks for objects in a value, and writes nothing that anybody reads."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__(io.BytesIO(), protocol=pickle.HIGHEST_PROTOCOL)
        self._ids = ids
        self.found = False

    def persistent_id(self, thing: Any) -> int | None:
        self.found = self.found or id(thing) in self._ids
        return 0 if isinstance(thing, Tensor | type | types.FunctionType) or self.found else None
