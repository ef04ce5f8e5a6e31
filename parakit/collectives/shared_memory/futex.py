"""Waiting for a number in shared memory to change, without burning a core.

On Linux a thread sleeps in the kernel until somebody rings (futex(2), on memory of several processes). Elsewhere it
looks again and again, less and less often. Either way the interpreter's lock is free while it sleeps, so that other
threads of the process, such as Dask's event loop, go on.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Futex", "fence", "make_bell", "pause"]

_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1
_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}
_NAP_SECONDS = 0.00005
_LONGEST_NAP_SECONDS = 0.002

_order = threading.Lock()


def fence() -> None:
    """Let everything that this thread stored or read so far come before all that follows, as others see it.

    Python has no such call, but a lock is taken and given by atomic instructions: on x86 each is a full barrier; on
    ARM a release that an acquire of the same place follows is one (Arm Architecture Reference Manual, B2.3).
    """
    with _order:
        pass
    with _order:
        pass


class Futex(Protocol):
    """A number in shared memory that changes when there is something to look at."""

    @property
    def value(self) -> int:
        """The number."""

    def ring(self, value: int) -> None:
        """Change the number, and wake everybody who waits."""

    def wait(self, heard: int, limit_seconds: float) -> None:
        """Return when the number is not the one that was heard last; or at the limit, or for no reason."""


class _FutexBell:
    """A futex that the kernel watches. It compares 4 bytes: the lower half of the number."""

    def __init__(self, words: memoryview, place: int, address: int) -> None:
        self._words, self._place = words, place
        self._address = ctypes.c_void_p(address + (0 if sys.byteorder == "little" else 4))
        # Ringing takes a microsecond: not worth giving the interpreter's lock away for it.
        self._sleep, self._wake = _system_call(ctypes.CDLL(None)), _system_call(ctypes.PyDLL(None))
        self._futex = _FUTEX_NUMBERS[platform.machine()]

    @property
    def value(self) -> int:
        number: int = self._words[self._place]
        return number

    def ring(self, value: int) -> None:
        self._words[self._place] = value
        self._wake(self._futex, self._address, _WAKE, _EVERYBODY, None, None, 0)

    def wait(self, heard: int, limit_seconds: float) -> None:
        whole = int(limit_seconds)
        limit = (ctypes.c_int64 * 2)(whole, int((limit_seconds - whole) * 1e9))  # struct timespec
        self._sleep(self._futex, self._address, _WAIT, heard & 0xFFFFFFFF, limit, None, 0)


class _PolledBell:
    """A futex that is looked at."""

    def __init__(self, words: memoryview, place: int) -> None:
        self._words, self._place = words, place

    @property
    def value(self) -> int:
        number: int = self._words[self._place]
        return number

    def ring(self, value: int) -> None:
        self._words[self._place] = value

    def wait(self, heard: int, limit_seconds: float) -> None:
        nap = _NAP_SECONDS
        end = time.monotonic() + limit_seconds
        while self.value == heard and time.monotonic() < end:
            time.sleep(nap)
            nap = min(1.5 * nap, _LONGEST_NAP_SECONDS)


def make_bell(words: memoryview, place: int, address: int, *, futex: bool | None = None) -> Futex:
    """The futex of a place.

    Parameters
    ----------
    words : memoryview
        Of a segment, as numbers of 8 bytes.
    place : int
        Which of them is the futex.
    address : int
        Of that number.
    futex : bool, optional
        Whether the kernel is to watch it; wherever it can, unless this is given.
    """
    can = sys.platform == "linux" and sys.maxsize > 2**32 and platform.machine() in _FUTEX_NUMBERS
    use = can if futex is None else futex
    return _FutexBell(words, place, address) if use else _PolledBell(words, place)


def _system_call(library: ctypes.CDLL) -> Callable[..., Any]:
    call = library.syscall
    number, pointer = ctypes.c_long, ctypes.c_void_p
    call.argtypes = [number, pointer, number, number, pointer, pointer, number]
    call.restype = number
    return call


def _pause() -> Callable[[], Any]:
    if sys.platform == "win32":
        return lambda: time.sleep(0)
    yielding: Callable[[], Any] = ctypes.CDLL(
        None
    ).sched_yield  # frees the interpreter's lock, as os.sched_yield may not
    return yielding


#: Let another thread or process run, if one wants to.
pause = _pause()
