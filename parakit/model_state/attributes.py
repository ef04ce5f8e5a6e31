"""Attributes that count: what code keeps in plain Python from one call to the next.

A model, a loss, a hook may count its calls, warm up, remember: in attributes, in variables of an enclosing function, or
in global ones. That is a part of the state of a run, although no optimizer and no buffer knows of it. Owns how such
values are read, compared and set. Values that only modules, parameters and buffers know are left to others.
"""

from __future__ import annotations

import types
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parakit.model_state.containers import PLAIN, UNKNOWN, alike, decode, encode
from parakit.model_state.marks import mark_of, nested_lists
from parakit.model_state.variables import ABSENT, Place, modules_within, variable_to_be, variables_of
from parakit.serialization import Frozen, TooLarge, freeze

__all__ = ["ABSENT", "Attributes", "Kept", "same", "too_large"]

_MOST_BYTES = 1 << 24  # of one attribute that is kept with every commit

_CODE = (
    types.ModuleType, type, types.BuiltinFunctionType, types.MethodWrapperType, types.FunctionType, RemovableHandle,
)  # fmt: skip


#: What can be kept of a value: itself where it is plain, a tensor's copy, or a frozen copy; or ABSENT.
Kept = Any


class Attributes:
    """What a model and its loss keep in plain Python.

    Parameters
    ----------
    model : nn.Module
    loss : callable
    hooks : iterable of callable
        That were taken off the model's parameters.
    ignored : iterable of str
        Paths of what only holds what the last rows left: `surprises` does not tell of them.
    """

    def __init__(self, model: nn.Module, loss: Any, hooks: Iterable[Any] = (), *, ignored: Iterable[str] = ()) -> None:
        self._model, self._loss, self._hooks = model, loss, tuple(hooks)
        tensors = [*model.parameters(), *model.buffers()]
        self._known = [*model.modules(), *tensors]
        self._owned = {id(tensor) for tensor in tensors}
        passing = set(ignored)
        there = [(place, place.get()) for place in variables_of(model, loss, self._hooks)]
        self._baseline = [
            (place, value) for place, value in there if type(value) in PLAIN and place.path not in passing
        ]
        self._passing = [place for place, _ in there if place.path in passing]

    def places(self) -> dict[str, Place]:
        """All places there are now, by their paths: forward may add some."""
        return {place.path: place for place in variables_of(self._model, self._loss, self._hooks)}

    def read(self, paths: Iterable[str] | None = None) -> dict[str, Kept]:
        """What is at some places, or at all, in a form that later changes leave alone; nothing of what cannot be kept.

        Parameters
        ----------
        paths : iterable of str, optional
            If they are given, those that are not there are ABSENT in the result.
        """
        there = self.places()
        wanted = there if paths is None else list(paths)
        chosen = {path: there[path] for path in wanted if path in there}
        seen: dict[int, Kept] = {}
        found: dict[str, Kept] = {}
        alive = {path: place.get() for path, place in chosen.items()}  # so that no id is used again
        for path, value in alive.items():
            if value is ABSENT and paths is not None:
                found[path] = ABSENT
            if id(value) in self._owned or not _may_count(value) or self._is_looked_into(value):
                continue
            if id(value) not in seen:
                seen[id(value)] = self._keep(value)
            found[path] = seen[id(value)]
        missing = dict.fromkeys((path for path in wanted if path not in there), ABSENT)
        return {path: kept for path, kept in found.items() if kept is not UNKNOWN} | missing

    def writings(self) -> dict[str, tuple[int, int]]:
        """What tells that somebody wrote to a tensor at a place: how often, and where it is in memory."""
        found = {path: place.get() for path, place in self.places().items()}
        return {path: (t._version, t.data_ptr()) for path, t in found.items() if type(t) is Tensor and not t.is_sparse}

    def write(self, values: Mapping[str, Kept], *, own: bool = False) -> None:
        """Set values that were read, here or of another copy of the same model and loss.

        Containers and objects are changed in place: others may hold on to the same one.

        Parameters
        ----------
        values : mapping of str to Kept
        own : bool
            Whether to set only what belongs to this model and this loss, and nothing of code that others run too.
        """
        there = self.places()
        made: dict[int, Any] = {}  # what was one value in several places becomes one again
        for path, kept in values.items():
            place = there.get(path) or variable_to_be(self._model, self._loss, path)
            if place is None or isinstance(kept, _TooLarge) or (own and not place.own):
                continue
            if id(kept) not in made:
                made[id(kept)] = _put_into(place.get(), self._revived(kept))
            place.set(made[id(kept)])

    def surprises(self) -> dict[str, Kept]:
        """Plain values that have changed since this object was made, as they were; asked at every commit, so quick."""
        return {
            place.path: value
            for place, value in self._baseline
            if (now := place.get()) is not value and not same(now, value)
        }

    def shared(self, paths: Iterable[str]) -> dict[str, Kept]:
        """Those of some values that are kept by code that others run too, such as global variables; for `restore`."""
        there = self.places()
        return self.read(path for path in paths if path in there and not there[path].own)

    def restore(self, values: Mapping[str, Kept]) -> None:
        """Give back what code that others run too had, also where it began to change later."""
        self.write(values)
        for place, value in self._baseline:
            if not place.own and place.get() is not value:
                place.set(value)

    def plain(self) -> tuple[list[Any], list[Any]]:
        """Plain values as they are now, and those that only hold what the last rows left."""
        return [place.get() for place, _ in self._baseline], [place.get() for place in self._passing]

    def give_back(self, values: tuple[Sequence[Any], Sequence[Any]]) -> bool:
        """Set values to what `plain` gave; says whether any plain ones were different."""
        changed = False
        for (place, _), value in zip(self._baseline, values[0], strict=True):
            if place.get() is not value:
                place.set(value)
                changed = True
        for place, value in zip(self._passing, values[1], strict=True):
            place.set(value)
        return changed

    def marks(self, places: Sequence[str | Sequence[str]]) -> list[float]:
        """Numbers that are the same for equal values at a place, or at several; whole, and exact as doubles."""
        groups = [(place,) if isinstance(place, str) else tuple(place) for place in places]
        there = self.places() if any(groups) else {}
        return [
            float(
                zlib.crc32(repr([(path, nested_lists(there[path].get())) for path in group if path in there]).encode())
            )
            for group in groups
        ]

    def _is_looked_into(self, value: Any) -> bool:
        """Whether it holds modules that are no part of the model: what those keep has places of its own."""
        known = {id(thing) for thing in self._known}
        return any(id(module) not in known for module in modules_within(value))

    def _keep(self, value: Any) -> Kept:
        if _is_plain(value):
            return value
        code = encode(value, self._owned)
        if isinstance(code, list):
            return {"plain": code}
        if type(value) is Tensor and value.layout is torch.strided:
            return (
                value.detach().clone() if value.nbytes <= _MOST_BYTES else _TooLarge((value._version, *mark_of(value)))
            )
        if type(value) is np.ndarray and value.nbytes > _MOST_BYTES and value.dtype.kind in "biufc":
            return _TooLarge(mark_of(torch.from_numpy(value)))
        try:
            frozen = freeze(value, self._known, most=_MOST_BYTES)
        except TooLarge:
            return _TooLarge((type(value).__name__, id(value)))
        except Exception:  # then it cannot travel either
            return UNKNOWN
        assert frozen.memory is not None
        data = torch.from_numpy(frozen.memory.array())
        parts = [list(part) for part in frozen.parts]
        return {"frozen": frozen.code, "parts": parts, "data": data, "kind": type(value).__qualname__}

    def _revived(self, kept: Kept) -> Any:
        if isinstance(kept, Tensor):
            return kept.detach().clone()
        if isinstance(kept, dict):
            return decode(kept["plain"]) if "plain" in kept else _frozen(kept).thaw(self._known)
        return kept


def _put_into(old: Any, new: Any) -> Any:
    """A value, in the place of an older one of its kind where that can be changed."""
    if type(old) is not type(new) or old is new:
        return new
    if isinstance(old, dict):
        old.clear()
        old.update(new)
    elif isinstance(old, list):
        old[:] = new
    elif isinstance(old, np.ndarray) and old.shape == new.shape and old.dtype == new.dtype and old.flags.writeable:
        old[...] = new
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif hasattr(old, "__dict__") and not isinstance(old, Tensor) and not hasattr(type(old), "__setstate__"):
        vars(old).clear()
        vars(old).update(vars(new))
    else:
        return new
    return old


def _frozen(kept: Mapping[str, Any]) -> Frozen:
    empty = Frozen.of_parts(kept["frozen"], kept["parts"])
    return empty.within(kept["data"].cpu().numpy())


@dataclass(frozen=True)
class _TooLarge:
    """Stands for a value that is compared, but not kept."""

    mark: tuple[Any, ...]


def too_large(kept: Kept) -> bool:
    """Whether a value was too large to be kept."""
    return isinstance(kept, _TooLarge)


def same(one: Kept, other: Kept) -> bool:
    """Whether two values that were kept are equal; NaN is equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict) and isinstance(other, dict):
        if "plain" in one or "plain" in other:
            return "plain" in one and "plain" in other and alike(one["plain"], other["plain"], same)
        return one["frozen"] == other["frozen"] and torch.equal(one["data"], other["data"])
    return type(one) is type(other) and bool(one == other or (one != one and other != other))


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _may_count(value: Any) -> bool:
    """Whether a value can be one that counts: code does not, and modules are looked into by themselves."""
    if isinstance(value, (*_CODE, torch.dtype, torch.device, torch.Size)):
        return False
    return value is not ABSENT and not isinstance(value, nn.Module | nn.Parameter)
