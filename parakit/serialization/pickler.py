"""The pickles of frozen copies: which things go by reference, by their memory, or by their class and state.

Owns what cloudpickle and torch would lose or refuse; refuses to know where the bytes of tensors lie.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import sys
import types
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from parakit.errors import ModelError
from parakit.serialization.arrays import make_array, place_of
from parakit.serialization.memory import (
    Open,
    Part,
    Storage,
    Storages,
)
from parakit.serialization.wrappers import is_own_cache, reduced_wrapper

__all__ = [
    "Limited",
    "LocalPickler",
    "Pickler",
    "TooLarge",
    "Unpickler",
]

_SCRIPTS: Any = (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch._C.ScriptModule)


class TooLarge(Exception):
    """A pickle grew beyond what was allowed."""


class Limited(io.BytesIO):
    """Bytes up to a limit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any) -> int:
        """Raise once it is too much."""
        if self.tell() + memoryview(data).nbytes > self._most:
            raise TooLarge
        return super().write(data)


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it carries no annotations
    """cloudpickle's, with the bytes of tensors left beside the pickle."""

    def __init__(self, file: io.BytesIO, known: Sequence[Any], storages: Storages | None = None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.storages = storages or Storages()
        self.functions: list[types.FunctionType] = []
        self.classes: list[type] = []  # that go by value
        self._known = {id(thing): place for place, thing in enumerate(known)}

    def persistent_id(self, thing: Any) -> tuple[str, int] | None:
        """What goes by reference: a storage, something known, or what stays alive here."""
        if type(thing) is Storage:
            return "storage", thing.number
        place = self._known.get(id(thing))
        return None if place is None else ("known", place)

    def reducer_override(self, thing: Any) -> Any:
        """How cloudpickle or torch would lose or refuse it, and how it travels instead."""
        if isinstance(thing, Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                reduced = self._reduced(thing)
            if reduced is not NotImplemented:
                return reduced
        elif isinstance(thing, _SCRIPTS):
            raise _no_copy_of_a_script(thing)
        elif isinstance(thing, nn.Module) and _has_parametrized_class(thing):
            plain = parametrize.type_before_parametrizations(thing)
            return plain.__new__, (plain,), thing.__dict__, None, None, _revive
        elif isinstance(thing, types.FunctionType):
            self.functions.append(thing)
        elif _is_special_module(thing):
            return importlib.import_module, (thing.__name__,)
        elif type(thing) is np.ndarray:
            return self._reduced_array(thing)
        elif (reduced := reduced_wrapper(thing)) is not NotImplemented:
            return reduced
        reduced = super().reducer_override(thing)
        if isinstance(thing, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            self.classes.append(thing)
            made_of = _with_slots(thing, reduced[1])
            return (reduced[0], made_of, *reduced[2:5], functools.partial(_set_class, _origin(), reduced[5]))
        return reduced

    def _reduced(self, tensor: Tensor) -> Any:
        kind = type(tensor)
        if kind in (UninitializedParameter, UninitializedBuffer):
            return kind, (tensor.requires_grad, None, tensor.dtype), tensor.__dict__, None, None, _set_attributes
        if not _travels_as_its_memory(tensor):
            return NotImplemented
        plain = tensor.detach().resolve_conj().resolve_neg()
        form = isinstance(tensor, nn.Parameter), tensor.is_leaf and tensor.requires_grad
        where = plain.dtype, plain.storage_offset(), tuple(plain.shape), plain.stride()
        storage = self.storages.of(plain)
        self.storages.let(storage, tensor)
        derived = () if kind in (Tensor, nn.Parameter) else (kind,)
        made = _make_tensor, (storage, *form, *where, *derived)
        dress = _Dress(*_attributes_of(tensor), *_hooks_of(tensor))
        return (*made, dress, None, None, _put_on) if any(dress) else made

    def _reduced_array(self, array: npt.NDArray[Any]) -> Any:
        place = place_of(array)
        if place is None:
            return NotImplemented
        storage = self.storages.of_array(place)
        self.storages.let(storage, array)
        return make_array, (storage, array.dtype, place.offset, array.shape, array.strides, array.flags.writeable)


class LocalPickler(Pickler):
    """For copies in this very process.

    Parameters
    ----------
    file, known, storages
        As above.
    bound : bool
        Whether a function knows a part of what is copied: then functions are copied too.
    knowing : set of type
        Classes of which this is true: they are copied too.
    """

    def __init__(
        self, file: io.BytesIO, known: Sequence[Any], storages: Storages, *, bound: bool, knowing: set[type]
    ) -> None:
        super().__init__(file, known, storages)
        self._bound, self._knowing = bound, knowing
        self.live: list[Any] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> tuple[str, int] | None:
        """What goes by reference: a storage, something known, or what stays alive here."""
        found = super().persistent_id(thing)
        if found is not None:
            return found
        same = (isinstance(thing, types.FunctionType) or is_own_cache(thing)) and not self._bound
        same = same or (isinstance(thing, type) and thing not in self._knowing)
        if not same or _has_parametrized_name(thing):
            return None
        if id(thing) not in self._places:
            self._places[id(thing)] = len(self.live)
            self.live.append(thing)
        return "live", self._places[id(thing)]

    def reducer_override(self, thing: Any) -> Any:
        """How cloudpickle or torch would lose or refuse it, and how it travels instead."""
        if isinstance(thing, type) and thing in self._knowing:
            function, made_of, *rest = cloudpickle.Pickler.reducer_override(self, thing)
            # Without the name by which it is known here, a class is made anew.
            return (function, (*_with_slots(thing, made_of)[:-2], None, made_of[-1]), *rest)
        return super().reducer_override(thing)


def _with_slots(kind: type, made_of: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a class is made of anew, with its slots: without them, as cloudpickle has it, objects have dictionaries."""
    slots = vars(kind).get("__slots__")
    if not isinstance(slots, str | tuple | list):
        return made_of
    return tuple(part | {"__slots__": slots} if isinstance(part, dict) else part for part in made_of)


def _is_special_module(thing: Any) -> bool:
    """Whether it is a module of a class of its own, as in torch.backends, which cloudpickle does not take for one."""
    if not isinstance(thing, types.ModuleType) or type(thing) is types.ModuleType:
        return False
    return sys.modules.get(thing.__name__) is thing


def _has_parametrized_name(thing: Any) -> bool:
    ours = isinstance(thing, type) and thing.__module__ == parametrize.__name__
    return ours and thing.__name__ not in vars(parametrize)


_own_origin: tuple[int, str] = 0, ""


def _origin() -> str:
    """A name of this process."""
    global _own_origin
    if _own_origin[0] != os.getpid():
        _own_origin = os.getpid(), uuid.uuid4().hex
    return _own_origin[1]


def _set_class(origin: str, setter: Callable[[Any, Any], Any], kind: type, state: Any) -> None:
    """Give a class what it had where it was pickled; in that very process it is there, and as it is now."""
    attributes = state[0]
    if origin != _origin() or any(name not in vars(kind) for name in attributes if not name.startswith("_abc")):
        setter(kind, state)


def _travels_as_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor is its bytes and what was put on it, and its class does not say otherwise."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        return False
    kind: Any = type(tensor)
    plain = nn.Parameter if issubclass(kind, nn.Parameter) else Tensor
    return all(getattr(kind, name) is getattr(plain, name) for name in _SAYS_OTHERWISE)


_SAYS_OTHERWISE = (
    "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__torch_dispatch__",
)  # fmt: skip


class _Dress(NamedTuple):
    """What was put on a tensor."""

    attributes: dict[str, Any]
    slots: dict[str, Any]
    hooks: dict[int, Callable[..., Any]]
    hooks_after: dict[int, Callable[..., Any]]


def _attributes_of(tensor: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of its dictionary, and those of the slots of its class."""
    state = object.__getstate__(tensor)
    slots = state[1] if isinstance(state, tuple) else {}
    return dict(tensor.__dict__), slots


def _hooks_of(tensor: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """What is called with a leaf's gradient, and with the leaf once it has one: the very tables that handles know."""
    if not tensor.is_leaf:
        return {}, {}
    return tensor._backward_hooks or {}, getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def _no_copy_of_a_script(thing: Any) -> ModelError:
    name = getattr(thing, "original_name", None) or getattr(thing, "name", type(thing).__name__)
    return ModelError(
        f"{name} was compiled by torch.jit, which has no way to copy what it made together with what belongs to it.",
        cause="torch.jit.script or torch.jit.trace",
        remedy="train the module or the function that it was made of, and compile that once it is trained",
    )


def _has_parametrized_class(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and type(module) is not parametrize.type_before_parametrizations(module)


class Unpickler(pickle.Unpickler):
    """Reads what `Pickler` wrote, with the bytes of tensors from where they lie."""

    def __init__(
        self, code: bytes, parts: Sequence[Part], storage: Open, known: Sequence[Any], live: Sequence[Any]
    ) -> None:
        super().__init__(io.BytesIO(code))
        self._parts, self._open, self._known, self._live = parts, storage, known, live
        self._storages: dict[int, tuple[Tensor, int]] = {}

    def persistent_load(self, pid: Any) -> Any:
        """What a reference stands for."""
        kind, number = pid
        if kind == "known":
            return self._known[number]
        if kind == "live":
            return self._live[number]
        if number not in self._storages:
            self._storages[number] = self._open(number), self._parts[number].first
        return self._storages[number]


def _make_tensor(
    storage: tuple[Tensor, int],
    parameter: bool,
    learns: bool,
    dtype: torch.dtype,
    offset: int,
    shape: Any,
    stride: Any,
    derived: type[Tensor] | None = None,
) -> Tensor:
    held, first = storage
    place = offset - first // dtype.itemsize if held.numel() else 0
    made = torch.empty(0, dtype=dtype).set_(held.untyped_storage(), place, shape, stride)
    if derived is not None:
        return derived._make_subclass(derived, made, learns)
    return nn.Parameter(made, requires_grad=learns) if parameter else made.requires_grad_(learns)


def _put_on(tensor: Tensor, dress: _Dress) -> None:
    _set_attributes(tensor, dress.attributes)
    for name, value in dress.slots.items():
        setattr(tensor, name, value)
    if dress.hooks:
        tensor._backward_hooks = dress.hooks
    if dress.hooks_after:
        tensor._post_accumulate_grad_hooks = dress.hooks_after
    # A hook that is registered later must not take the place of one of these.
    RemovableHandle.next_id = max(RemovableHandle.next_id, 1 + max((*dress.hooks, *dress.hooks_after), default=-1))


def _set_attributes(thing: Any, attributes: dict[str, Any]) -> None:
    thing.__dict__.update(attributes)


def _revive(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Give a module its attributes, and the class that parametrizations make of its own."""
    module.__dict__.update(attributes)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict by now
        parametrize._inject_property(module, name)
