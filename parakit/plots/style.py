"""What all plots share: colours, markers, limits that grow in steps, and axes to draw on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter, LogLocator

from parakit.events.records import PHASES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

__all__ = [
    "AREA_TONES",
    "GREY",
    "INK",
    "PALETTE",
    "PHASE_COLOURS",
    "SHADE",
    "axes_or_new",
    "colour_of",
    "legend_above",
    "line_style_of",
    "log_axis",
    "nice_above",
    "note",
    "plain_number",
]

INK = "#222222"
GREY = "#8A8A8A"
# Okabe and Ito's palette, which most people with colour blindness can tell apart; yellow is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: Every colour that a live picture needs, and the shades between it and white.
PALETTE = (*_COLOURS, INK, GREY)
SHADE, PALE = "#EEEEEE", "#DDDDDD"
#: Tones of areas, which need no shades between them and white.
AREA_TONES = ("#FFFFFF", SHADE, PALE)
_LINES = ("-", (0, (5, 1)), (0, (2, 0.8)), (0, (5, 1, 1, 1)))

#: Colour of each phase of a step. No hatching: it would take longer to draw than all the rest.
PHASE_COLOURS = dict(zip(PHASES, ("#56B4E9", "#009E73", "#0072B2", "#D55E00", "#E69F00", PALE), strict=True))


def colour_of(world_size: int) -> str:
    """The colour that stands for a worker count."""
    return _COLOURS[(world_size - 1) % len(_COLOURS)]


def line_style_of(world_size: int) -> str | tuple[int, tuple[float, ...]]:
    """The line style that stands for a worker count."""
    return _LINES[(world_size - 1) % len(_LINES)]


def nice_above(value: float, steps: tuple[float, ...] = (1, 1.5, 2, 3, 4, 6, 8)) -> float:
    """The smallest round number that is not below a value; 1 for what is no positive number."""
    if not (math.isfinite(value) and value > 0):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in steps if step * power >= value * (1 - 1e-12)), 10 * power)


def plain_number(value: float, _: object = None) -> str:
    """A number for a tick, without mathematical typesetting."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}"


def log_axis(ax: Axes, decades: float) -> None:
    """A logarithmic y axis over so many decades, with plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3.1 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def legend_above(
    ax: Axes, handles: Sequence[Artist], names: Sequence[str] | None = None, *, columns: int, gap: float, length: float,
    text_gap: float | None = None,
) -> None:  # fmt: skip
    """A legend over the axes, of so many columns; gaps and the length of a sample in font sizes."""
    labels = [str(handle.get_label()) for handle in handles] if names is None else names
    ax.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, fontsize=8, frameon=False,
        borderaxespad=0.1, columnspacing=gap, handlelength=length, handletextpad=text_gap,
    )  # fmt: skip


def note(ax: Axes, text: str) -> None:
    """A remark in the middle of empty axes."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=9, wrap=True)


def axes_or_new(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> Axes:
    """The axes given, or those of a new pyplot figure, which a notebook shows below its cell."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]
