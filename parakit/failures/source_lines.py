"""Places in code: where an error was raised, as far as that is code of the user's own.

A worker cannot show lines of a notebook's cells, which only the notebook has; so places travel as file, line and
function, and the lines are read where they are shown.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from parakit.serialization.local_code import is_local

__all__ = ["Place", "describe_error", "listing", "places_of", "raised_by_parakit", "short"]

_HERE = Path(__file__).resolve().parents[1]
_MOST = 4


class Place(NamedTuple):
    """A line of code.

    Attributes
    ----------
    file : str
    line : int
    function : str
    """

    file: str
    line: int
    function: str


def places_of(error: BaseException) -> tuple[Place, ...]:
    """The user's own frames of an error, the outermost first; where there are none, the one that raised it.

    Parakit's frames, torch's and Python's tell a user nothing that the message does not.
    """
    frames = [Place(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)]
    own = [place for place in frames if _is_own(place)]
    return tuple(own[-_MOST:] or [place for place in frames[-1:] if not _is_parakits(place)])


def raised_by_parakit(error: BaseException) -> bool:
    """Whether an error comes from parakit's own code, with no code of the user's on the way."""
    frames = [Place(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)]
    return bool(frames) and _is_parakits(frames[-1]) and not any(map(_is_own, frames))


def describe_error(error: BaseException) -> str:
    """An error of somebody else's in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if len(text) <= 300 else f"{type(error).__name__}: {text[:300]}..."


def listing(places: Sequence[Place]) -> str:
    """Places with their lines, below each other; nothing if there are none."""
    told = []
    for place in places:
        told.append(f'  File "{short(place.file)}", line {place.line}, in {place.function}')
        source = linecache.getline(place.file, place.line).strip()
        told += [f"    {source}"] if source else []
    return "\n".join(told)


def short(file: str) -> str:
    """A file as people call it: by its name, or as a cell of a notebook."""
    path = Path(file)
    if path.parent.name.startswith("ipykernel_"):
        return "a cell of this notebook"
    parts = path.parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return "/".join(parts[parts.index(folder) + 1 :])
    return path.name


def _is_own(place: Place) -> bool:
    typed = place.file.startswith(("<stdin>", "<string>", "<ipython"))
    return typed or (is_local(place.file) and not _is_parakits(place))


def _is_parakits(place: Place) -> bool:
    return not place.file.startswith("<") and Path(place.file).resolve().is_relative_to(_HERE)
