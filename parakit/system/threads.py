"""Threads of this process: work beside the caller's, and who gets the interpreter first."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

__all__ = [
    "in_thread",
    "quick_thread_switches",
    "uninterrupted",
    "yield_to_others",
]

_QUICK_SECONDS = 0.0005
_NICE = 10
T = TypeVar("T")
_lock = threading.Lock()
_users = 0
_usual = 0.0


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
