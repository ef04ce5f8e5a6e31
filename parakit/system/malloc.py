"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import os
import platform

from parakit.system.threads import (
    _lock,
)

__all__ = ["give_back_freed_memory", "keep_freed_memory", "return_free_memory"]

# Of glibc's malloc.h: parameters of mallopt, and what they are where nobody says otherwise.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


_USUAL_THRESHOLD = 128 * 1024
_KEEP_BYTES = 1 << 30
_keepers = 0


def keep_freed_memory(*, for_good: bool = False) -> None:
    """Use freed memory again, instead of returning it to the system at once; as often as called, until given back.

    Each step of a training frees its activations and allocates them again. Dask tells the workers it starts to return
    every freed piece of 64 KiB and more, so that the kernel clears fresh pages in each step: a small convolutional
    network then takes twice as long. Only glibc can be told otherwise by then; elsewhere nothing is done.

    Parameters
    ----------
    for_good : bool
        It is never given back. Threads that start later then share one arena, as another one is returned whole when
        nothing is left in it.
    """
    global _keepers
    if for_good:
        _call_glibc("mallopt", _ARENA_MAX, 1)
    with _lock:
        _keepers += 1
        if _keepers == 1:
            _set_thresholds(_KEEP_BYTES, _KEEP_BYTES)


def give_back_freed_memory() -> None:
    """Return what is free now; and, after the last keeper's call, whatever is freed later, as it was before."""
    global _keepers
    with _lock:
        _keepers -= 1
        if _keepers == 0:
            _set_thresholds(*(_threshold(f"MALLOC_{which}_THRESHOLD_") for which in ("TRIM", "MMAP")))
    return_free_memory()


def return_free_memory() -> None:
    """Return what is free now to the system: what a set-up needed, say, and no step will."""
    _call_glibc("malloc_trim", 0)


def _set_thresholds(trim: int, mmap: int) -> None:
    _call_glibc("mallopt", _TRIM_THRESHOLD, trim)
    _call_glibc("mallopt", _MMAP_THRESHOLD, mmap)


def _call_glibc(name: str, *numbers: int) -> None:
    """Call a function of glibc's, where that is the C library."""
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), name)(*numbers)


def _threshold(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else _USUAL_THRESHOLD
