"""A panel's place in the notebook: widgets while it lives, a plain picture and text afterwards.

Display handles reach their place from any thread, and after their cell has ended. The picture and the text have a
place each, because a front end shows only the richest form of one output.
"""

from __future__ import annotations

import base64
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import DisplayHandle, display

__all__ = ["Place", "cell_id", "cell_number"]


class Place:
    """Two outputs of one cell: above what is seen, below what is read."""

    def __init__(self) -> None:
        self._above: DisplayHandle | None = None
        self._below: DisplayHandle | None = None

    def show(self, widget: Any) -> None:
        """Show a widget above, and nothing below; outside of a notebook, nothing at all."""
        if cell_number() is None:
            return
        self._above = display(widget, display_id=True)
        self._below = display({"text/plain": ""}, raw=True, display_id=True)

    def settle(self, picture: bytes | None, text: str) -> None:
        """Show a picture above and a text below, without widgets; again and again if need be."""
        if cell_number() is None:
            return
        said = {"text/plain": text}
        # Bytes are given as text: older front ends do not encode them.
        seen = {"image/png": base64.b64encode(picture).decode(), "text/plain": "picture of a run"} if picture else said
        below = said if picture else {"text/plain": ""}
        if self._above is None or self._below is None:
            self._above = display(seen, raw=True, display_id=True)
            self._below = display(below, raw=True, display_id=True)
        else:
            self._above.update(seen, raw=True)
            self._below.update(below, raw=True)


def cell_number() -> int | None:
    """Which cell of a notebook is being executed; None outside of IPython."""
    shell = get_ipython()
    return None if shell is None else int(shell.execution_count)


def cell_id() -> str | None:
    """The cell that is being executed, as the front end calls it; None where it does not say."""
    shell = get_ipython()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return None
    metadata = (kernel.get_parent() or {}).get("metadata", {})
    return str(metadata["cellId"]) if "cellId" in metadata else None
