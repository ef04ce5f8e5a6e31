"""Local code: modules beside the notebook, which workers may not have, or may have in an older version.

What is defined in such a module travels by value, as what is defined in a notebook does: then workers run what the
notebook has in its memory at that moment, edited and reloaded or not. Modules that are installed travel by their names.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cloudpickle

__all__ = ["MAIN", "by_value", "dumps", "is_local", "is_own_code", "local_modules"]

#: Modules of a notebook, a script, and what has no module.
MAIN = ("__main__", "__mp_main__", "")

_PARAKIT = __name__.partition(".")[0]
_PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = (
    Path(__file__).resolve().parents[1],
    *(Path(path).resolve() for name in _PLACES if (path := sysconfig.get_paths().get(name))),
)
_FOLDERS = frozenset({"site-packages", "dist-packages"})
_lock = threading.RLock()  # cloudpickle's list of such modules is one for the whole process


def local_modules() -> list[types.ModuleType]:
    """Modules of this process that are files of the user's own."""
    # `list` of its items would allocate, and what is collected then may import or drop modules.
    return [module for name, module in sys.modules.copy().items() if _is_local(name, module)]


@functools.cache
def is_local(filename: str) -> bool:
    """Whether a file is neither installed nor a part of Python or of this library."""
    if not filename or filename.startswith("<"):
        return False
    path = Path(filename)
    if _FOLDERS.intersection(path.parts):
        return False
    resolved = path.resolve()
    return not any(resolved.is_relative_to(folder) for folder in _INSTALLED)


def is_own_code(thing: types.FunctionType | type) -> bool:
    """Whether a function or a class is the user's own: of a notebook, or of a module beside it."""
    module = getattr(thing, "__module__", None) or ""
    if module in MAIN:
        return True
    if isinstance(thing, types.FunctionType):
        return is_local(thing.__code__.co_filename)
    home = sys.modules.get(module)
    # A class that came by value has no module here: nothing that is installed comes so.
    return home is None or is_local(getattr(home, "__file__", None) or "")


def _is_local(name: str, module: object) -> bool:
    if not isinstance(module, types.ModuleType):
        return False
    filename = getattr(module, "__file__", None)
    if not isinstance(filename, str) or not is_local(filename) or not filename.endswith(".py"):
        return False
    # By its own name only: one that is known under two would be registered under the other.
    return module.__name__ == name and name.partition(".")[0] not in (_PARAKIT, *MAIN)


@contextmanager
def by_value() -> Iterator[None]:
    """Let what is defined in local modules be pickled by value meanwhile."""
    with _lock:
        before = set(cloudpickle.list_registry_pickle_by_value())
        added = [module for module in local_modules() if module.__name__ not in before]
        for module in added:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in added:
                cloudpickle.unregister_pickle_by_value(module)


def dumps(value: object) -> bytes:
    """A value as bytes; what is defined in a notebook or beside it goes by value."""
    with by_value():
        return bytes(cloudpickle.dumps(value))
