"""Speedup against the number of workers: every count that was visited, with its spread and its rivals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgba

from parakit.events.records import PLAIN
from parakit.events.summary import RunSummary
from parakit.plots.style import GREY, INK, SHADE, colour_of, legend_above, nice_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation

__all__ = ["SpeedupPlot"]

_LABELLED = 8  # more labels would overlap
_TICKS = 16
# Lines do not strike the labels that they pass.
_BEHIND = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}


class SpeedupPlot:
    """Speedup relative to one worker, on axes; `update` as often as there is news.

    Parameters
    ----------
    ax : Axes
    most : int, optional
        How far the axis of workers reaches; by default as far as was visited, and the number of cores.
    """

    def __init__(self, ax: Axes, *, most: int | None = None) -> None:
        self.ax = ax
        self._most = most
        self._furniture: tuple[Any, ...] = ()
        self._fixed: list[Any] = []
        self._labels: dict[int, Annotation] = {}
        self._spread = LineCollection([], colors=[], linewidths=2.2, zorder=3)
        self._points: PathCollection = ax.scatter([], [], s=42, zorder=4, linewidths=0)
        ax.add_collection(self._spread)
        (self._here,) = ax.plot([], [], "o", ms=11, mfc="none", mec=INK, mew=1.2, zorder=5)
        ax.set_xlabel("active workers")
        ax.set_ylabel("speedup relative to 1 worker")
        ax.grid(alpha=0.25)

    @property
    def artists(self) -> list[Any]:
        """What changes from frame to frame."""
        return [self._spread, self._points, self._here, *self._labels.values()]

    def update(self, summary: RunSummary, *, snug: bool = False) -> bool:  # noqa: ARG002 - its limits fit at any time
        """Show what a course has by now; says whether more than the artists changed."""
        rates, one = summary.rates, summary.one
        unit = one.median if one else float("nan")
        values = {n: (r.median / unit, r.low / unit, r.high / unit) for n, r in rates.items()} if one else {}
        self._draw_points(values, summary.last.world_size if summary.last else 0)
        plain = summary.plain.samples_per_second / unit if summary.plain and one else float("nan")
        return self._furnish(summary, values, plain)

    def _draw_points(self, values: dict[int, tuple[float, float, float]], here: int) -> None:
        colours = [to_rgba(colour_of(n)) for n in values]
        self._points.set_offsets(np.array([(n, v[0]) for n, v in values.items()]).reshape(-1, 2))
        self._points.set_facecolor(colours)
        self._spread.set_segments([[(n, v[1]), (n, v[2])] for n, v in values.items()])
        self._spread.set_colors(colours)
        self._here.set_data(*(([here], [values[here][0]]) if here in values else ([], [])))
        # Words take long to draw: in live frames only the present count has a label.
        live = self._points.get_animated()
        labelled = [n for n in values if n == here or (not live and len(values) <= _LABELLED)]
        for n in set(self._labels) - set(labelled):
            self._labels.pop(n).remove()
        for n in labelled:
            if n not in self._labels:
                self._labels[n] = self.ax.annotate(
                    "", (n, 0), (10, -4), textcoords="offset points", fontsize=9, color=INK, zorder=6, animated=live,
                    bbox=_BEHIND,
                )  # fmt: skip
            self._labels[n].xy = n, values[n][0]
            self._labels[n].set_text(f"{values[n][0]:.2f}×")

    # --- what stands still between news

    def _furnish(self, summary: RunSummary, values: dict[int, tuple[float, float, float]], plain: float) -> bool:
        """Limits, the ideal, the rival and the shade over crowded counts, drawn again only if they changed."""
        cores = summary.crowded_above
        right = max(2, self._most or cores or 1, *values)
        reached = max([1.0, *(high for _, _, high in values.values()), *([plain] if math.isfinite(plain) else [])])
        top = max(nice_above(1.15 * reached, (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)), min(right, cores or right) + 0.25)
        missing = _missing(summary)
        # A rival's line moves only by what the eye can see, since each move redraws everything.
        rival = round(plain, 2) if math.isfinite(plain) else None
        furniture = (right, round(top, 3), cores, rival, summary.rival, missing)
        if furniture == self._furniture:
            return False
        self._furniture = furniture
        for thing in self._fixed:
            thing.remove()
        self._fixed = self._draw_fixed(right, top, cores, rival, summary, missing)
        return True

    def _draw_fixed(
        self, right: int, top: float, cores: int | None, rival: float | None, summary: RunSummary, missing: str
    ) -> list[Any]:
        ax = self.ax
        ax.set(xlim=(0.5, right + 0.6), ylim=(0, top))
        ax.set_xticks(sorted({1, *range(1, right + 1, max(1, math.ceil(right / _TICKS)))}))
        lines: list[Line2D | Any] = ax.plot([0.5, right + 1], [0.5, right + 1], color=GREY, ls="--", lw=1.1,
                                            label="ideal")  # fmt: skip
        if rival is not None:
            lines.append(ax.axhline(rival, color=INK, ls=":", lw=1.4, label=summary.rival))
        if cores is not None and right > cores:
            lines.append(
                ax.axvspan(cores + 0.5, right + 1, facecolor=SHADE, edgecolor="none", zorder=0,
                           label=f"more than {summary.unit}s")
            )  # fmt: skip
        legend_above(ax, lines, columns=3, gap=1.0, length=1.8)
        if missing:
            lines.append(
                ax.text(0.98, 0.03, missing, transform=ax.transAxes, fontsize=8, ha="right", va="bottom", color=GREY)
            )
        return lines


def _missing(summary: RunSummary) -> str:
    """Which baselines were not measured, in words."""
    lacking = [] if summary.one else ["1 worker"]
    lacking += [] if summary.plain else [PLAIN]
    return f"not measured yet: {' and '.join(lacking)}" if lacking else ""


def draw(summary: RunSummary, ax: Axes, most: int | None) -> Axes:
    """The speedups of a course on axes."""
    SpeedupPlot(ax, most=most).update(summary)
    return ax
