"""A panel's place in the notebook: widgets while it lives, a plain picture and text afterwards.

Display handles reach their place from any thread, and after their cell has ended. The picture and the text have a
place each, because a front end shows only the richest form of one output.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import DisplayHandle, display

__all__ = ["Outputs", "Place", "hands_free"]

_HANDS_FREE = "PARAKIT_HANDS_FREE"


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


class Outputs:
    """All places of a panel: its cell shows it, and other cells that were asked to.

    Attributes
    ----------
    cell : str or None
        The cell in which the panel was made, as the front end calls it.
    places : list of Place
    """

    def __init__(self) -> None:
        self.cell = cell_id()
        self._born_in = cell_number()
        self.places: list[Place] = []

    @property
    def shown(self) -> bool:
        """Whether the present cell shows the panel already."""
        return bool(self.places) and cell_number() == self._born_in

    def add(self) -> Place:
        """Another place, where nothing is shown yet."""
        self.places.append(Place())
        return self.places[-1]

    def settle(self, picture: bytes | None, text: str) -> None:
        """Show a picture and a text in all places."""
        for place in self.places:
            place.settle(picture, text)


def hands_free() -> bool:
    """Whether nobody can press a button here, as in nbconvert: the environment says so."""
    return os.environ.get(_HANDS_FREE, "") not in ("", "0")


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
