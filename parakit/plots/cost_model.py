"""What a cost model says of more workers: speedups to be compared, and where the time of a step would go."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from parakit.costs.breakdown import TERMS
from parakit.costs.model import CostModel
from parakit.plots.style import GREY, INK, PALETTE, PHASE_COLOURS, legend_above, plain_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_costs", "draw_what_if", "what_if_picture"]

_WIDTH, _HEIGHT, _DPI = 10.0, 3.9, 100
#: The colours of phases, for those terms that are made of them; waiting is what idle is.
_TERM_COLOURS = {
    "compute": PHASE_COLOURS["backward"], "waiting": PHASE_COLOURS["idle"], "exchange": PHASE_COLOURS["exchange"],
    "update": PHASE_COLOURS["update"], "control": GREY,
}  # fmt: skip
_LINES = ("-", (0, (5, 1)), (0, (2, 0.8)), (0, (5, 1, 1, 1)))


def draw_costs(costs: CostModel, counts: Sequence[int], ax: Axes) -> Axes:
    """Shares of the terms of a step against the number of workers, as stacked bars; above them the time of the step."""
    parts = costs.breakdown(np.asarray(counts))
    places, floor = np.arange(len(counts)), np.zeros(len(counts))
    bars: list[Any] = []
    for term in TERMS:
        height = 100 * np.asarray(parts.share(term))
        bars.append(ax.bar(places, height, 0.72, floor, color=_TERM_COLOURS[term], label=term))
        floor = floor + height
    for place, seconds in zip(places, np.asarray(parts.step_seconds), strict=True):
        unit = "" if place else " ms"
        ax.text(float(place), 101, f"{1e3 * seconds:.3g}{unit}", ha="center", va="bottom", fontsize=8, color=INK)
    ax.set_xticks(places, [f"{count:,}" for count in counts])
    ax.set(
        xlabel="workers", ylabel="% of a step" + _said(costs.simulated), ylim=(0, 109), xlim=(-0.6, len(counts) - 0.4)
    )
    ax.set_yticks(range(0, 101, 20))
    legend_above(ax, bars, columns=len(TERMS), gap=0.8, length=0.9, text_gap=0.3)
    return ax


def draw_what_if(costs: Mapping[str, CostModel], counts: Sequence[int], ax: Axes, *, here: int | None = None) -> Axes:
    """Speedup relative to one worker by each of some cost models, on logarithmic axes, beside the ideal."""
    grid = np.unique(np.round(np.geomspace(1, max(counts), 200)).astype(int))
    lines = list(ax.plot(grid, grid, color=GREY, ls="--", lw=1.1, label="ideal"))
    lowest = 1.0
    for number, (name, model) in enumerate(costs.items()):
        speedups = np.asarray(model.speedup(grid))
        colour = PALETTE[number % len(PALETTE)]
        lines += ax.plot(grid, speedups, color=colour, ls=_LINES[number % len(_LINES)], lw=1.8, label=name)
        lowest = min(lowest, float(speedups.min()))
        if here is not None:
            ax.plot([here], [float(model.speedup(here))], "o", ms=6, color=colour, mec="white", zorder=5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(plain_number))
        axis.set_minor_formatter(NullFormatter())
    said = _said(any(model.simulated for model in costs.values()))
    ax.set(xlabel="workers", ylabel=f"speedup relative to 1 worker{said}", xlim=(1, max(counts)),
           ylim=(0.9 * lowest, 1.1 * max(counts)))  # fmt: skip
    ax.grid(alpha=0.25)
    legend_above(ax, lines, columns=min(4, len(lines)), gap=0.8, length=1.6)
    return ax


def _said(simulated: bool) -> str:
    """That a model was calibrated from simulated runs."""
    return " (simulated)" if simulated else ""


def what_if_picture(costs: Mapping[str, CostModel], counts: Sequence[int], here: int) -> bytes:
    """Speedups by some cost models, and where the time goes by the last of them, as a PNG."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.8, bottom=0.13, wspace=0.2)
    draw_what_if(costs, counts, left, here=here)
    draw_costs([*costs.values()][-1], counts, right)
    for ax, title in ((left, "Speedup (simulated)"), (right, "Where the time of a step would go (simulated)")):
        ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=22)
        ax.tick_params(labelsize=8.5)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()
