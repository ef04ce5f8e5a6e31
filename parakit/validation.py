"""Arguments that cannot be right: numbers, choices and names, refused in words."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from parakit.errors import InputError, ModelError

__all__ = ["brief", "check_choice", "check_flag", "check_positive", "check_rate", "check_whole", "in_short", "plain"]

_BRIEF = 80
_FEW = 6


def brief(value: Any) -> str:
    """A value as a message can show it: one line, and no long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def in_short(names: Sequence[str]) -> str:
    """Names as a message can list them: all of a few, and the first of many."""
    more = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")


def plain(value: Any) -> Any:
    """A number of numpy, or a tensor of a single one, as a number of Python; anything else as it is."""
    single = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0)
    return value.item() if single else value


def check_whole(name: str, value: Any, least: int, *, none: bool = False) -> None:
    """Refuse what is no whole number, or a smaller one; None may be allowed."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            f"{name} is {brief(value)}; it must be a whole number of at least {least}{', or None' if none else ''}."
        )


def check_positive(name: str, value: Any, *, none: bool = False) -> None:
    """Refuse what is no number above 0; None may be allowed."""
    if none and value is None:
        return
    known = isinstance(value, int | float) and not isinstance(value, bool)
    too_large = known and sys.float_info.max < value < math.inf  # an int that no float can hold
    if not known or not value > 0 or too_large:
        within = " and below 1e308" if too_large else ""
        raise InputError(f"{name} is {brief(value)}; it must be a number above 0{within}{', or None' if none else ''}.")


def check_rate(name: str, value: Any, present: float) -> None:
    """Refuse what is no finite number above 0, or any where an optimizer has no rate at present (NaN)."""
    check_positive(name, value)
    if value > sys.float_info.max:
        raise InputError(f"{name} is {value!r}; it must be a finite number above 0.")
    if math.isnan(present):
        raise ModelError(
            f"{name} cannot be {value:g}: the optimizer has none.",
            cause='its parameter groups hold no "lr"',
            remedy="leave its step size to the optimizer, or keep it under that name in the groups",
        )


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {brief(value)}; it must be True or False.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {brief(value)}; it must be one of {', '.join(map(repr, choices))}.")
