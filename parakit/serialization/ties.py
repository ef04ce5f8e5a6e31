"""Ties: which functions and classes know a part of what is copied, by a variable."""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

from parakit.serialization.arrays import place_of
from parakit.serialization.code_names import names_in
from parakit.serialization.local_code import is_own_code
from parakit.serialization.wrappers import reduced_wrapper

__all__ = ["Ties"]

_TELLS_NOTHING = types.ModuleType | str | int | float | None
_ENDS = Tensor | type | types.FunctionType | types.ModuleType


class Ties:
    """What knows some modules and tensors.

    Parameters
    ----------
    own : sequence
        The modules and tensors.
    """

    def __init__(self, own: Sequence[Any]) -> None:
        self._ids = set(map(id, own))
        self._memory = {address for thing in own if (address := _address_of(thing))}
        self._known: dict[int, bool] = {}
        self._kept_alive: list[Any] = []

    def known_to(self, thing: Any) -> bool:
        """Whether a value, a function or a class knows one of them: holds it, or names it in its code."""
        met: dict[int, Any] = {}
        ahead = [thing]
        while ahead:
            here = ahead.pop()
            if isinstance(here, _TELLS_NOTHING) or id(here) in met or self._known.get(id(here)) is False:
                continue
            if self._known.get(id(here)) or self._is_own(here):
                self._note({id(thing): thing}, True)
                return True
            met[id(here)] = here
            ahead.extend(self._held_by(here))
        self._note(met, False)
        return False

    def _note(self, things: dict[int, Any], known: bool) -> None:
        self._known.update(dict.fromkeys(things, known))
        self._kept_alive.extend(things.values())

    def _is_own(self, thing: Any) -> bool:
        if isinstance(thing, nn.Module):
            return not self._ids.isdisjoint(map(id, [*thing.modules(), *thing.parameters(), *thing.buffers()]))
        return id(thing) in self._ids or _address_of(thing) in self._memory

    def _held_by(self, thing: Any) -> Iterable[Any]:
        """What is to be looked at next; of what Python's pickling takes apart, functions, classes and tensors."""
        if isinstance(thing, Tensor):
            return ()
        if isinstance(thing, types.FunctionType):
            return _variables_of(thing)
        if isinstance(thing, type):
            return (type(thing), *thing.__bases__, *vars(thing).values()) if is_own_code(thing) else ()
        finder = _Finder(self._ids)
        with suppress(Exception):
            finder.dump(thing)
        return finder.found


def _address_of(thing: Any) -> tuple[torch.device, int] | None:
    """Where the memory of a tensor or of an array begins; None where it has none."""
    place = place_of(thing) if type(thing) is np.ndarray else None
    tensor = thing if place is None else place.memory
    if isinstance(tensor, Tensor):
        with suppress(RuntimeError, ValueError):  # sparse and lazy ones have none
            storage = tensor.untyped_storage()
            return (tensor.device, storage.data_ptr()) if storage.nbytes() and storage.data_ptr() else None
    return None


def _variables_of(function: types.FunctionType) -> Iterator[Any]:
    variables = function.__globals__
    yield from (variables[name] for name in names_in(function.__code__).variables if name in variables)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing was put in yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()


class _Finder(cloudpickle.Pickler):  # type: ignore[misc]  # it carries no annotations
    """Looks for what a value holds, and writes nothing that anybody reads."""

    def __init__(self, ids: set[int]) -> None:
        super().__init__(io.BytesIO(), protocol=pickle.HIGHEST_PROTOCOL)
        self._ids = ids
        self.found: list[Any] = []

    def persistent_id(self, thing: Any) -> int | None:
        array = type(thing) is np.ndarray and not thing.dtype.hasobject
        if array or isinstance(thing, _ENDS) or id(thing) in self._ids:
            self.found.append(thing)
            return 0
        return None

    def reducer_override(self, thing: Any) -> Any:
        reduced = reduced_wrapper(thing)
        return super().reducer_override(thing) if reduced is NotImplemented else reduced
