"""Wrappers of functions that Python's own pickling refuses, or takes by their names: caches travel empty.

A cached property holds a lock in Python 3.11, and what `functools.lru_cache` returns goes by its name alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from parakit.serialization.local_code import is_own_code

__all__ = ["is_own_cache", "reduced_wrapper"]

_Cache = type(functools.lru_cache(int))


def is_own_cache(thing: Any) -> bool:
    """Whether it is what `functools.lru_cache` made of a function of the user's own."""
    function = getattr(thing, "__wrapped__", None) if isinstance(thing, _Cache) else None
    return isinstance(function, types.FunctionType) and is_own_code(function)


def reduced_wrapper(thing: Any) -> Any:
    """How a wrapper is pickled, as for `pickle.Pickler.reducer_override`."""
    if type(thing) is functools.cached_property:
        return functools.cached_property, (thing.func,), {k: v for k, v in vars(thing).items() if k != "lock"}
    if is_own_cache(thing):
        state = {k: v for k, v in vars(thing).items() if k != "cache_parameters"}
        return _cache, (thing.__wrapped__, thing.cache_parameters()), state
    return NotImplemented


def _cache(function: Callable[..., Any], settings: dict[str, Any]) -> Any:
    return functools.lru_cache(**settings)(function)
