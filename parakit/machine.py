"""What this machine lets a process use, and how a process's threads share its one interpreter lock."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from dask.system import cpu_count

__all__ = ["in_thread", "quick_thread_switches", "usable_cores", "yield_to_others"]

_QUICK_SECONDS = 0.0005
_NICE = 10

_lock = threading.Lock()
_users = 0
_usual = 0.0


def usable_cores() -> int:
    """Cores that this process may use: the machine's, less what affinity and control groups withhold."""
    return int(cpu_count())


def yield_to_others() -> None:
    """Let this thread have the processor only where nobody else wants it; on Linux, where a thread can say so.

    It may hold the interpreter's lock when it loses the processor. That does not stop a run: a run that waits for
    the lock leaves its workers without orders, and so leaves this thread a processor.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


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
