"""Waiting for what a test expects to happen, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 15) -> None:
    """Return once something is true; fail the test if that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s"
        time.sleep(0.01)
