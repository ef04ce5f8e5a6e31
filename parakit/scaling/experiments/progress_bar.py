"""A line that says what is being measured and how long it will take, rewritten in place wherever that can be done."""

from __future__ import annotations

import sys
import time
from typing import Any

from parakit.formatting import clock, in_a_notebook

__all__ = ["Ticker"]


class Ticker:
    """One line about something that takes a known number of parts.

    In a notebook the line is one output that is updated, on a terminal one line that is rewritten; elsewhere, as in a
    log, only the last one is written.

    Parameters
    ----------
    parts : int
    part_seconds : float
        What a part may take, until the first ones are done.
    shown : bool
        Whether to show anything.
    """

    def __init__(self, parts: int, part_seconds: float, *, shown: bool = True) -> None:
        self._parts = parts
        self._guess_seconds = part_seconds
        self._shown = shown
        self._done = 0
        self._began = time.monotonic()
        self._handle: Any = None
        self._width = 0

    @property
    def left_seconds(self) -> float:
        """What the parts that are not done may take, by those that are."""
        spent = time.monotonic() - self._began
        pace = spent / self._done if self._done else self._guess_seconds
        return pace * (self._parts - self._done)

    def line(self, what: str) -> str:
        """What is shown while a part is being done."""
        return f"measuring {what}: {self._done + 1} of {self._parts}, about {clock(self.left_seconds)} left"

    def show(self, what: str) -> None:
        """A part begins."""
        self._write(self.line(what))

    def tick(self) -> None:
        """A part is done."""
        self._done += 1

    def end(self, text: str) -> None:
        """All is over; the last line."""
        spent = clock(time.monotonic() - self._began)
        self._write(f"{text} in {spent}", last=True)

    def _write(self, text: str, *, last: bool = False) -> None:
        if not self._shown:
            return
        if in_a_notebook():
            self._update(text)
        elif sys.stderr.isatty() or last:
            start, end = "\r" if self._width else "", "\n" if last else ""
            sys.stderr.write(start + text.ljust(self._width) + end)
            sys.stderr.flush()
            self._width = len(text)

    def _update(self, text: str) -> None:
        from IPython.display import display

        said = {"text/plain": text}
        if self._handle is None:
            self._handle = display(said, raw=True, display_id=True)
        else:
            self._handle.update(said, raw=True)
