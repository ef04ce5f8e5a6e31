"""Loss and throughput against time or steps, coloured by worker count."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import FuncFormatter

from parakit.events.curve import Curve, Floats, Point
from parakit.events.summary import RunSummary
from parakit.formatting import many
from parakit.plots.style import INK, colour_of, legend_above, line_style_of, log_axis, nice_above, note, plain_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["AXES", "CurvePlot"]

_TIME_STEPS = (1, 1.5, 2, 3, 4.5, 6, 9)
_LEGEND_ENTRIES = 8
_DRAWABLE = 1e100  # beyond it, ticks may be no numbers any more
_VALUE, _SIZE, _GAP = map(Point._fields.index, ("value", "world_size", "gap_seconds"))
#: What a curve can be drawn against: its column, and its name.
AXES = {"seconds": (0, "seconds since the start"), "step": (Point._fields.index("step"), "step")}


class CurvePlot:
    """One of a run's two curves, on axes; `update` as often as there is news.

    Parameters
    ----------
    ax : Axes
    what : {"loss", "rate"}
    growing : bool
        Whether limits grow in steps, so that they rarely change while a run goes on; otherwise they fit the data.
    against : {"seconds", "step"}
    """

    def __init__(
        self, ax: Axes, what: Literal["loss", "rate"], *, growing: bool = False, against: str = "seconds"
    ) -> None:
        self.ax = ax
        self._what = what
        self._column, name = AXES[against]
        self._growing = growing
        self._lines: dict[int, Line2D] = {}
        self._plain: Line2D | None = None
        self._limits: tuple[float, ...] = ()
        ax.set_xlabel(name)
        ax.set_ylabel("loss of the batch" if what == "loss" else "samples per second")
        ax.grid(alpha=0.25)
        ax.margins(x=0)
        ax.yaxis.set_major_formatter(FuncFormatter(plain_number))

    @property
    def artists(self) -> list[Any]:
        """What changes from frame to frame."""
        return [*self._lines.values(), *([self._plain] if self._plain else [])]

    def update(self, summary: RunSummary, *, snug: bool = False) -> bool:
        """Show what a course has by now; says whether more than the artists changed.

        Where `snug`, the limits fit the data, although they were to grow.
        """
        curve = summary.loss if self._what == "loss" else summary.rate
        points, plain = curve.points, summary.plain if self._what == "rate" else None
        changed = self._draw_lines(points, self._together(curve, points))
        if plain is not None:
            changed |= self._draw_plain(plain.samples_per_second, summary.rival)
        if changed:
            self._explain()
        growing = self._growing and not snug
        return self._fit(points, plain.samples_per_second if plain else 0.0, growing) or changed

    def _together(self, curve: Curve, points: Floats) -> npt.NDArray[np.bool_]:
        """Which points belong to the piece of the point before: steps have no gaps, but time has."""
        if self._column != 0:
            return np.ones(len(points), bool)
        return points[:, _GAP] <= curve.longest_gap_seconds

    def _draw_lines(self, points: Floats, together: npt.NDArray[np.bool_]) -> bool:
        new = False
        for size in np.unique(points[:, _SIZE]).astype(int).tolist():
            if size not in self._lines:
                new = True
                (self._lines[size],) = self.ax.plot(
                    [],
                    [],
                    color=colour_of(size),
                    ls=line_style_of(size),
                    lw=1.6,
                    ms=4,
                    label=many(size, "worker"),
                )
        for size, line in self._lines.items():
            mine = points[:, _SIZE] == size
            # A piece also reaches back to the last point of the piece before, unless nothing was trained meanwhile.
            shown = mine | np.append((mine & together)[1:], False)
            drawn = np.where(shown, points[:, _VALUE], np.nan)
            _set_broken(line, points[:, self._column], drawn, together)
        return new

    def _draw_plain(self, rate: float, label: str) -> bool:
        if self._plain is not None:
            renamed = self._plain.get_label() != label
            self._plain.set_label(label)
            self._plain.set_ydata([rate, rate])
            return renamed
        self._plain = self.ax.axhline(rate, color=INK, ls=":", lw=1.4, label=label)
        return True

    def _explain(self) -> None:
        lines = [self._lines[size] for size in sorted(self._lines)][:_LEGEND_ENTRIES]
        if self._growing and self._what == "rate":
            lines = []  # the colours are explained over the plot beside it
        # "1 worker, 2, 3": all on one line.
        names = [
            str(line.get_label() if place == 0 else size)
            for place, (size, line) in enumerate(zip(sorted(self._lines), lines, strict=False))
        ]
        handles = [*lines, *([self._plain] if self._plain else [])]
        names += [str(self._plain.get_label())] if self._plain else []
        legend_above(self.ax, handles, names, columns=max(1, len(handles)), gap=1.1, length=2.2)

    # --- limits

    def _fit(self, points: Floats, least_top: float, growing: bool) -> bool:
        limits = self._wanted_limits(points, least_top, growing)
        if limits == self._limits:
            return False
        self._limits = limits
        right, low, high = limits
        logarithmic = self._what == "loss" and low > 0
        if logarithmic:
            log_axis(self.ax, math.log10(high / low))
        else:
            self.ax.set_yscale("linear")
            self.ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
        self.ax.set(xlim=(0, right), ylim=(low, high))
        return True

    def _wanted_limits(self, points: Floats, least_top: float, growing: bool) -> tuple[float, float, float]:
        values = points[np.abs(points[:, _VALUE]) < _DRAWABLE, _VALUE]
        last = float(points[:, self._column].max()) if len(points) else 1.0
        right = max(5.0, nice_above(last, _TIME_STEPS)) if growing else last or 1.0
        if not len(values):
            return right, 0.0, 1.0
        low, high = float(values.min()), float(values.max())
        if self._what == "rate":
            return right, 0.0, nice_above(1.05 * max(high, least_top))
        if low <= 0:
            reach = nice_above(max(abs(low), abs(high), 1e-12))
            return right, -reach if low < 0 else 0.0, reach
        # Half decades: the limits stand still until the loss leaves them.
        bottom, top = math.floor(2 * math.log10(low) - 0.1) / 2, math.ceil(2 * math.log10(high) + 0.1) / 2
        return right, 10**bottom, 10**top


def _set_broken(line: Line2D, at: Floats, values: Floats, together: npt.NDArray[np.bool_]) -> None:
    """Give a line its points, broken before those that do not belong to the one before; lone points get a dot."""
    breaks = np.flatnonzero(~together[1:]) + 1
    at, values = np.insert(at, breaks, at[breaks]), np.insert(values, breaks, np.nan)
    there = np.concatenate([[False], np.isfinite(values), [False]])
    line.set_data(at, values)
    lone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]).tolist()
    line.set(marker="." if lone else "", markevery=lone)


def draw(summary: RunSummary, ax: Axes, what: Literal["loss", "rate"], against: str = "seconds") -> Axes:
    """One of the two curves of a course on axes."""
    CurvePlot(ax, what, against=against).update(summary)
    if summary.last is None:
        note(ax, "no step yet")
    return ax
