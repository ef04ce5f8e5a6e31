"""Pictures of a scaling study: speedup and efficiency, with what was fitted to them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from parakit.errors import InputError
from parakit.plots.labels import label_points
from parakit.plots.style import (
    GREY,
    INK,
    SHADE,
    axes_or_new,
    colour_of,
    legend_above,
    nice_above,
    note,
    plain_number,
)
from parakit.scaling.study.study import Scaling
from parakit.validation import brief, check_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["picture", "scaling_efficiency", "scaling_speedup"]

Floats = npt.NDArray[np.float64]

_LOG_RANGE = 16  # between the largest and the smallest count, beyond which small counts would have no room
_LABELLED = 6  # more labels would overlap
_TICKS = 12
_CURVE_POINTS = 64
_FITTED_POINTS = 24  # a prediction may take its time
_NARROW_INCHES = 4.6  # axes that have no room for three columns of a legend
_FIT_COLOURS = ("#009E73", "#E69F00", "#56B4E9", "#CC79A7")
_RIVAL_STYLES = ((0, (1, 1)), (0, (1, 2.2)), (0, (3, 1, 1, 1)))


def scaling_speedup(
    study: Scaling, ax: Axes | None = None, *, fits: Mapping[str, Any] | None = None, most: int | None = None
) -> Axes:
    """Speedup relative to one worker against workers: what was measured, its rivals, and what was fitted.

    Parameters
    ----------
    study : Scaling
    ax : Axes, optional
    fits : dict of str to Fit, optional
        Anything with `predict(n)`. Default: those that the study has.
    most : int, optional
        How far the axis of workers reaches. Default: as far as was measured.

    Returns
    -------
    Axes
        Points are medians over blocks, bars reach from the lower to the upper quartile. Both axes are logarithmic
        where counts span more than a factor of 16.
    """
    return _Growth(study, fits, most, power=0).draw(ax)


def scaling_efficiency(
    study: Scaling, ax: Axes | None = None, *, fits: Mapping[str, Any] | None = None, most: int | None = None
) -> Axes:
    """Speedup over the number of workers; parameters as for `scaling_speedup`.

    A rival is a curve here: workers above it are faster than the rival, those below it slower.
    """
    return _Growth(study, fits, most, power=1).draw(ax)


class _Growth:
    """Speedup over workers to some power, on axes: speedup itself, or efficiency."""

    def __init__(self, study: Scaling, fits: Mapping[str, Any] | None, most: int | None, *, power: int) -> None:
        check_whole("most", most, 1, none=True)
        if not isinstance(study, Scaling):
            raise InputError(f"{brief(study)} is no scaling study.", remedy="study = parakit.sweep(...)")
        self._study = study
        self._power = power
        self._rows = [row for row in study.table() if math.isfinite(row.speedup.median)]
        self._right: int = max([2, most or 2, *(row.workers for row in self._rows)])
        self._logarithmic = self._right > _LOG_RANGE
        counts = np.unique(self._curve(_FITTED_POINTS).round().astype(int))
        # Before there are axes: what cannot be drawn leaves no empty figure in a notebook.
        self._fits = {
            name: (counts, *_predicted(fit, counts)) for name, fit in (study.fits if fits is None else fits).items()
        }
        self._handles: list[Any] = []
        self._reached = 1.0

    def draw(self, ax: Axes | None) -> Axes:
        """All of it, on these axes or new ones."""
        self._ax = axes_or_new(ax)
        if not self._rows:
            note(self._ax, "no speedup: one worker was not measured")
        else:
            self._ideal()
            self._rivals()
            for place, name in enumerate(self._fits):
                self._fit(name, _FIT_COLOURS[place % len(_FIT_COLOURS)])
            self._points()
        self._crowd()
        self._furnish()
        return self._ax

    def _scaled(self, counts: Any, speedups: Any) -> Floats:
        scaled: Floats = np.asarray(speedups, np.float64) / np.asarray(counts, np.float64) ** self._power
        return scaled

    def _curve(self, points: int = _CURVE_POINTS) -> Floats:
        return (np.geomspace if self._logarithmic else np.linspace)(1.0, self._right, points)

    def _ideal(self) -> None:
        at = self._curve()
        self._handles += self._ax.plot(at, self._scaled(at, at), color=GREY, ls="--", lw=1.1, label="ideal", zorder=1)

    def _rivals(self) -> None:
        """Plain PyTorch, relative to one worker."""
        one = self._rows[0]
        at = np.geomspace(0.5, 2.0 * self._right, 2 * _CURVE_POINTS)
        for place, (name, over) in enumerate(one.over_plain.items()):
            if one.workers != 1 or not math.isfinite(over.median):
                continue
            level = 1 / over.median
            self._handles += self._ax.plot(
                at, self._scaled(at, np.full_like(at, level)), color=INK, lw=1.4, zorder=2, label=name,
                ls=_RIVAL_STYLES[min(place, len(_RIVAL_STYLES) - 1)],
            )  # fmt: skip
            if self._power == 0:
                self._reached = max(self._reached, level)

    def _fit(self, name: str, colour: str) -> None:
        counts, rates, low, high = self._fits[name]
        unit = self._study.row(1).rate.median
        (line,) = self._ax.plot(
            counts, self._scaled(counts, rates / unit), color=colour, lw=1.6, label=name, zorder=3
        )  # fmt: skip
        self._handles.append(line)
        if low is not None and high is not None:
            self._ax.fill_between(
                counts, self._scaled(counts, low / unit), self._scaled(counts, high / unit), color=colour, alpha=0.18,
                lw=0, zorder=1,
            )  # fmt: skip
        self._reached = max(self._reached, float(np.max(self._scaled(counts, rates / unit))))

    def _points(self) -> None:
        for row in self._rows:
            median, low, high = (
                float(self._scaled(row.workers, value))
                for value in (row.speedup.median, row.speedup.low, row.speedup.high)
            )
            colour = colour_of(row.workers)
            self._ax.plot([row.workers] * 2, [low, high], color=colour, lw=2.2, zorder=4, solid_capstyle="butt")
            # Hollow where workers had to share cores.
            face = "white" if row.crowded else colour
            self._ax.plot([row.workers], [median], "o", ms=6.5, mfc=face, mec=colour, mew=1.6, zorder=5)
            self._reached = max(self._reached, high)
        if len(self._rows) <= _LABELLED:
            label_points(self._ax, self._labels())

    def _labels(self) -> list[tuple[float, float, str]]:
        """Of the points; the last one first, which is what most people look for."""
        found: list[tuple[float, float, str]] = []
        for row in reversed(self._rows):
            value = float(self._scaled(row.workers, row.speedup.median))
            found.append((row.workers, value, f"{value:.2f}×" if self._power == 0 else f"{100 * value:.0f} %"))
        return found

    def _crowd(self) -> None:
        """A shade over counts with more workers than cores."""
        about = self._study.about
        free = max(1, about.cores // about.threads)
        if self._right <= free or not self._study.crowded:
            return
        edge = free * math.sqrt(1 + 1 / free) if self._logarithmic else free + 0.5
        self._handles.append(
            self._ax.axvspan(edge, 2 * self._right, facecolor=SHADE, edgecolor="none", zorder=0,
                             label="more than cores")
        )  # fmt: skip

    def _furnish(self) -> None:
        ax, simulated = self._ax, " (simulated)" if self._study.simulated else ""
        _count_axis(ax, [row.workers for row in self._rows] or [1], self._right, logarithmic=self._logarithmic)
        ax.set_xlabel("workers")
        ax.grid(alpha=0.25)
        if self._power == 1:
            ax.set_ylim(0, 1.08 * max(1.0, self._reached))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
            ax.set_ylabel(f"efficiency{simulated}")
        else:
            self._speedup_axis()
            ax.set_ylabel(f"speedup relative to 1 worker{simulated}")
        if self._handles:
            legend_above(ax, self._handles, columns=_columns(ax), gap=1.0, length=1.8)
        if not self._study.complete:
            ax.text(0.98, 0.03, "incomplete", transform=ax.transAxes, fontsize=8, ha="right", va="bottom", color=GREY)

    def _speedup_axis(self) -> None:
        if self._logarithmic:
            lowest = min([1.0, *(row.speedup.low for row in self._rows)])
            self._ax.set_yscale("log", base=2)
            self._ax.set_ylim(0.8 * lowest, 1.3 * max(self._reached, float(self._right)))
            self._ax.yaxis.set_major_locator(LogLocator(base=2, numticks=_TICKS))
            self._ax.yaxis.set_minor_locator(NullLocator())
            self._ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
        else:
            # As far as something reaches: the ideal may leave the picture.
            free = self._study.about.cores // self._study.about.threads
            top = max(nice_above(1.15 * self._reached, (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)), min(self._right, free) + 0.25)
            self._ax.set_ylim(0, top)


def _columns(ax: Axes) -> int:
    """How many columns of a legend have room over the axes."""
    figure = ax.get_figure(root=True)
    width = 0.0 if figure is None else ax.get_window_extent().width / figure.dpi
    return 2 if width < _NARROW_INCHES else 3


def _predicted(fit: Any, counts: npt.NDArray[np.int64]) -> tuple[Floats, Floats | None, Floats | None]:
    """Rates, and a band where there is one: of a law, a fit or a comparison of fits."""
    if not callable(getattr(fit, "predict", None)):
        raise InputError(f"{brief(fit)} cannot be drawn: it has no predict(n).", remedy='study.fit("usl")')
    found = [fit.predict(int(count)) for count in counts]
    if hasattr(found[0], "rate"):
        rates, low, high = (np.array([getattr(each, part) for each in found], np.float64)
                            for part in ("rate", "low", "high"))  # fmt: skip
        return rates, low, high
    rates = np.array(found, np.float64)
    if not callable(getattr(fit, "band", None)):
        return rates, None, None
    low, high = fit.band(counts)
    return rates, np.asarray(low, np.float64), np.asarray(high, np.float64)


def _count_axis(ax: Axes, counts: Sequence[int], right: int, *, logarithmic: bool) -> None:
    """The axis of workers: every count where there is room, powers of two where they span far."""
    if logarithmic:
        ax.set_xscale("log", base=2)
        ax.set_xlim(0.85, 1.18 * right)
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=_TICKS))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
    else:
        ax.set_xlim(0.5, right + 0.5)
        each = max(1, math.ceil(right / _TICKS))
        ax.set_xticks(sorted({*counts} if len(counts) <= _TICKS and each > 1 else {1, *range(each, right + 1, each)}))


def picture(study: Scaling) -> bytes:
    """Speedup and efficiency of a study side by side, as a PNG."""
    figure = Figure(figsize=(9.6, 4.0), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    scaling_speedup(study, left)
    scaling_efficiency(study, right)
    bytes_ = io.BytesIO()
    canvas.print_png(bytes_)
    return bytes_.getvalue()
