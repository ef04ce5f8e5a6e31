"""How results show themselves in a notebook where a picture says more than a table.

Pictures are made by matplotlib, which takes a second to load and may not be installed: both are found out when a
picture is first asked for.
"""

from __future__ import annotations

import importlib

from parakit.scaling.study.study import Scaling

__all__ = ["show_pictures"]


def show_pictures() -> None:
    """Let studies show themselves as pictures too."""
    Scaling.draw_with(_drawn)


def _drawn(study: Scaling) -> bytes | None:
    try:
        plots = importlib.import_module("parakit.plots.study")
    except ModuleNotFoundError:
        return None
    picture: bytes = plots.picture(study)
    return picture
