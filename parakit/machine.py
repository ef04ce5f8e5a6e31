"""What this machine lets a process use: cores, memory that was freed, and the one interpreter lock of its threads."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
from dask.system import cpu_count

__all__ = [
    "free_memory",
    "give_back_freed_memory",
    "in_thread",
    "keep_freed_memory",
    "quick_thread_switches",
    "return_free_memory",
    "uninterrupted",
    "usable_cores",
    "yield_to_others",
]

# Of control groups, version 2 and 1: what they may use, and use.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_QUICK_SECONDS = 0.0005
_NICE = 10

# Of glibc's malloc.h: parameters of mallopt, and what they are where nobody says otherwise.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_USUAL_THRESHOLD = 128 * 1024
_KEEP_BYTES = 1 << 30

T = TypeVar("T")

_lock = threading.Lock()
_users = 0
_usual = 0.0
_keepers = 0


def usable_cores() -> int:
    """Cores that this process may use: the machine's, less what affinity and control groups withhold."""
    return int(cpu_count())


def free_memory() -> int:
    """Bytes that this machine, or the control group of this process, has left."""
    left = int(psutil.virtual_memory().available)
    for limit, used in _GROUPS:
        with suppress(OSError, ValueError):
            left = min(left, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, left)


def yield_to_others() -> None:
    """Let this thread have the processor only where nobody else wants it; on Linux, where a thread can say so.

    It may hold the interpreter's lock when it loses the processor. That does not stop a run: a run that waits for
    the lock leaves its workers without orders, and so leaves this thread a processor.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


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


@contextmanager
def quick_thread_switches() -> Iterator[None]:
    """Let threads that wait for messages have the interpreter soon, although another thread computes in Python.

    An order to the workers changes threads some twenty times. With Python's usual interval of 5 ms, a busy notebook
    cell would make each order wait for a tenth of a second.
    """
    global _users, _usual
    with _lock:
        if _users == 0:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, _QUICK_SECONDS))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                sys.setswitchinterval(_usual)


def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Call a function in a thread of its own, which no exit of the interpreter waits for."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=f"parakit-{function.__name__}", daemon=True).start()
    return future


def uninterrupted(make: Callable[[], T], undo: Callable[[T], object], limit_seconds: float) -> T:
    """Make something that an interrupt in the middle would leave half made.

    An interrupt reaches the main thread alone, so the work is done in another. After an interrupt, what comes of it is
    undone, and the interrupt raised when that is done, or after a limit.
    """
    making = in_thread(make)
    try:
        made: T = making.result()
        return made
    except BaseException:
        if making.done():  # it is the work's own error, or an interrupt that came with its end
            if making.exception() is None:
                undo(making.result())
            raise
        undone = in_thread(lambda: undo(making.result()))
        with suppress(Exception):
            undone.result(limit_seconds)
        raise
