"""Variables: where code can keep a value from one call to the next.

In attributes of modules, of a loss and of hooks; in attributes of classes and functions; in variables of an enclosing
function, in mutable defaults, and in global variables of the notebook and of modules beside it. Only code of the user's
own is looked into, and of that only what forward, the loss and the hooks can call, as far as names tell.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from parakit.model_state.marks import slots_of
from parakit.serialization.code_names import names_in
from parakit.serialization.local_code import MAIN, is_local, is_own_code

__all__ = ["ABSENT", "Place", "modules_within", "variable_to_be", "variables_of"]

# Modes are attributes too: forward may set them.
_OWN = frozenset(vars(nn.Module())) - {"training"} | {"_flat_weights", "_flat_weight_refs", "_is_full_backward_hook"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ENTRIES = ("forward", "backward", "setup_context")
# Methods that nobody calls by name, and that training does not call.
_UNCALLED = frozenset({
    "__init__", "__init_subclass__", "__del__", "__repr__", "__str__", "__format__", "__reduce__", "__reduce_ex__",
    "__getstate__", "__setstate__", "__copy__", "__deepcopy__", "__dir__", "__sizeof__", "__class_getitem__",
})  # fmt: skip
_CODE = (types.FunctionType, types.MethodType, functools.partial)


class _Absent:
    """Stands for a value that is not there."""

    def __repr__(self) -> str:
        return "nothing"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


@dataclass(frozen=True)
class Place:
    """Where a value is.

    Parameters
    ----------
    path : str
        For people, such as "encoder.calls" or "loss.calls"; unique.
    get, set : callable
        Read the value, or ABSENT, and write it.
    own : bool
        Whether it belongs to the model or the loss, and not to code that others run too.
    """

    path: str
    get: Callable[[], Any]
    set: Callable[[Any], None]
    own: bool = False


def variables_of(model: nn.Module, loss: Any, hooks: Iterable[Any] = ()) -> list[Place]:
    """All places that there are now: forward may add some.

    Parameters
    ----------
    model : nn.Module
    loss : callable
    hooks : iterable of callable
        That were taken off the model's parameters.
    """
    taken: dict[str, int] = {}
    places = []
    for place in _Search(model, loss, hooks).found:
        number = taken[place.path] = taken.get(place.path, 0) + 1
        places.append(place if number == 1 else replace(place, path=f"{place.path} ({number})"))
    return places


def variable_to_be(model: nn.Module, loss: Any, path: str) -> Place | None:
    """Where an attribute of a module or of a loss goes that is not there yet."""
    owner, _, key = path.rpartition(".")
    modules = dict(model.named_modules())
    if owner in modules:
        return _in_dict(path, vars(modules[owner]), key, own=True)
    if path.startswith("loss.") and isinstance(loss, nn.Module):
        inner = dict(loss.named_modules()).get(owner.removeprefix("loss").lstrip("."))
        return None if inner is None else _in_dict(path, vars(inner), key, own=True)
    if owner == "loss" and hasattr(loss, "__dict__"):
        return _in_dict(path, vars(loss), key, own=True)
    return None


class _Search:
    """A walk over all that forward, a loss and hooks can call.

    Attributes
    ----------
    found : list of Place
        In an order that is the same for each copy of the model and the loss.
    """

    def __init__(self, model: nn.Module, loss: Any, hooks: Iterable[Any]) -> None:
        self.found: list[Place] = []
        self._modules = {id(module) for module in model.modules()}
        self._seen: set[Any] = set()
        self._kept_alive: list[Any] = []  # what was seen by its id
        self._classes: list[type] = []
        self._names: dict[str, None] = dict.fromkeys(_ENTRIES)
        self._waiting: list[tuple[Any, str]] = []
        self._look_into_modules(model, "")
        if isinstance(loss, nn.Module):
            self._modules |= {id(module) for module in loss.modules()}
            self._look_into_modules(loss, "loss")
        self._waiting.append((loss, "loss"))
        self._waiting += [(hook, "hook") for hook in (*_hooks_of(model), *hooks)]
        while self._waiting:
            self._look_at(*self._waiting.pop(0))

    def _is_new(self, thing: Any, key: str = "") -> bool:
        if (id(thing), key) in self._seen:
            return False
        self._seen.add((id(thing), key))
        self._kept_alive.append(thing)
        return True

    def _add(self, holder: Any, key: str, place: Place) -> None:
        if self._is_new(holder, key):
            self.found.append(place)

    # --- what holds values

    def _look_into_modules(self, top: nn.Module, prefix: str, *, own: bool = True) -> None:
        for name, module in top.named_modules():
            self._add_class(type(module))
            for key in [key for key in vars(module) if key not in _OWN]:
                path = ".".join(part for part in (prefix, name, key) if part)
                self._add(vars(module), key, _in_dict(path, vars(module), key, own=own))
                value = vars(module).get(key)
                if isinstance(value, _CODE) or (value is not None and is_own_code(type(value))):
                    self._waiting.append((value, path))
                for number, hidden in enumerate(modules_within(value)):
                    self._look_into_another(hidden, f"{path}.{number}", own=own)

    def _look_at(self, value: Any, path: str) -> None:
        """Look at something that may be called, or know what may be."""
        if isinstance(value, types.FunctionType):
            self._look_into_function(value)
        elif isinstance(value, types.MethodType):
            self._waiting += [(value.__self__, path), (value.__func__, path)]
        elif isinstance(value, functools.partial):
            self._look_into_partial(value, path)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, nn.Module):
            self._look_into_another(value, path)
        elif is_own_code(type(value)) and self._is_new(value):
            self._add_class(type(value))
            if path in ("loss", "hook"):  # any other is the value of a variable, as a whole
                for key in list(getattr(value, "__dict__", ())):
                    self._add(vars(value), key, _in_dict(f"{path}.{key}", vars(value), key, own=True))
                for key in [name for one in type(value).__mro__ for name in slots_of(one)]:
                    self._add(value, key, _in_slot(f"{path}.{key}", value, key))

    def _look_into_another(self, top: nn.Module, path: str, *, own: bool = False) -> None:
        """Look at a module that is no part of the model or the loss, but known to them: such as a slow copy."""
        if id(top) in self._modules:
            return
        self._modules |= {id(module) for module in top.modules()}
        self._look_into_modules(top, path, own=own)
        for name, module in top.named_modules():
            for holder in (module._parameters, module._buffers):
                for key in [key for key, tensor in holder.items() if tensor is not None]:
                    place = _in_tensor(".".join(part for part in (path, name, key) if part), holder, key)
                    self._add(holder, key, replace(place, own=own))

    def _look_into_partial(self, partial: functools.partial[Any], path: str) -> None:
        self._waiting.append((partial.func, path))
        for key in partial.keywords:
            self._add(partial.keywords, key, _in_dict(f"{path}: {key}", partial.keywords, key))
        for number, argument in enumerate(partial.args):
            self._add(partial, str(number), _fixed(f"{path}: argument {number}", argument))

    def _look_into_function(self, function: types.FunctionType) -> None:
        if not is_own_code(function) or not self._is_new(function):
            return
        name, code = function.__qualname__, function.__code__
        names = names_in(code)
        for key in names.attributes:
            self._add_name(key)
        for key in names.variables:
            if key in function.__globals__:
                self._look_at_global(function.__module__, function.__globals__, key, names.attributes)
        for key, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            place = _in_cell(f"{name}: {key}", cell)
            self._waiting.append((place.get(), key))
            self._add(cell, "", place)
        for number, value in enumerate(function.__defaults__ or ()):
            self._add(function, str(number), _fixed(f"{name}: default {number}", value))
        for holder, mark in ((function.__kwdefaults__ or {}, ": "), (vars(function), ".")):
            for key in list(holder):
                self._add(holder, key, _in_dict(f"{name}{mark}{key}", holder, key))

    def _look_at_global(self, module: str | None, variables: dict[str, Any], key: str, names: Iterable[str]) -> None:
        value = variables[key]
        if not isinstance(value, types.ModuleType):
            path = f"global {key}" if (module or "") in MAIN else f"{module}.{key}"
            self._add(variables, key, _in_dict(path, variables, key))
            self._waiting.append((value, key))
        elif is_local(getattr(value, "__file__", None) or ""):
            inside = vars(value)
            for inner in [name for name in names if name in inside and not isinstance(inside[name], types.ModuleType)]:
                self._add(inside, inner, _in_dict(f"{value.__name__}.{inner}", inside, inner))
                self._waiting.append((inside[inner], inner))

    # --- attributes of classes, by the names that code uses

    def _add_class(self, kind: type) -> None:
        for one in kind.__mro__:
            if is_own_code(one) and one not in self._classes:
                self._classes.append(one)
                special = [name for name in vars(one) if name.startswith("__") and name not in _UNCALLED]
                for name in dict.fromkeys([*self._names, *special]):
                    self._look_up(one, name)

    def _add_name(self, name: str) -> None:
        if name not in self._names:
            self._names[name] = None
            for kind in self._classes:
                self._look_up(kind, name)

    def _look_up(self, kind: type, name: str) -> None:
        value = vars(kind).get(name, ABSENT)
        if isinstance(value, property):
            self._waiting += [(value.fget, name), (value.fset, name)]
        elif isinstance(value, staticmethod | classmethod):
            self._waiting.append((value.__func__, name))
        elif isinstance(value, types.FunctionType | type):
            self._waiting.append((value, name))
        elif value is not ABSENT and not hasattr(type(value), "__get__") and not name.startswith("__"):
            self._add(kind, name, _in_class(f"{kind.__qualname__}.{name}", kind, name))


def modules_within(value: Any) -> list[nn.Module]:
    """Modules in a list, a tuple or a dict, where no model knows of them."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [part for part in parts if isinstance(part, nn.Module)]


def _hooks_of(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for table in _HOOKS:
            yield from getattr(module, table, {}).values()
    for parameter in model.parameters():
        for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)):
            yield from (hooks or {}).values()


def _in_dict(path: str, holder: Any, key: str, *, own: bool = False) -> Place:
    def write(value: Any) -> None:
        if value is ABSENT:
            holder.pop(key, None)
        else:
            holder[key] = value

    return Place(path, lambda: holder.get(key, ABSENT), write, own)


def _in_class(path: str, kind: type, key: str) -> Place:
    def write(value: Any) -> None:
        if value is not ABSENT:
            setattr(kind, key, value)
        elif key in vars(kind):
            delattr(kind, key)

    return Place(path, lambda: vars(kind).get(key, ABSENT), write)


def _in_slot(path: str, holder: Any, key: str) -> Place:
    def write(value: Any) -> None:
        if value is not ABSENT:
            setattr(holder, key, value)
        elif hasattr(holder, key):
            delattr(holder, key)

    return Place(path, lambda: getattr(holder, key, ABSENT), write, own=True)


def _in_tensor(path: str, holder: dict[str, Any], key: str) -> Place:
    """The values of a parameter or a buffer, which stays the same object."""

    def write(value: Any) -> None:
        if value is not ABSENT:
            with torch.no_grad():
                holder[key].copy_(value)

    return Place(path, lambda: holder[key].detach(), write)


def _in_cell(path: str, cell: Any) -> Place:
    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # nothing was put in yet
            return ABSENT

    return Place(path, read, lambda value: setattr(cell, "cell_contents", value))


def _fixed(path: str, value: Any) -> Place:
    """A place that always has the same object, which may itself be changed."""
    return Place(path, lambda: value, lambda _: None)
