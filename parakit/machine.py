"""What this machine lets a process use, and what a process needs to share its one interpreter lock fairly."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dask.system import cpu_count

__all__ = ["quick_thread_switches", "usable_cores"]

_QUICK_SECONDS = 0.0005

_lock = threading.Lock()
_users = 0
_usual = 0.0


def usable_cores() -> int:
    """Cores that this process may use: the machine's, less what affinity and control groups withhold."""
    return int(cpu_count())


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
