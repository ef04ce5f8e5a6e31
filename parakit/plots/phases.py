"""Where a step's time goes: a stacked bar a worker, and a Gantt chart of the last steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from parakit.events.curve import Floats
from parakit.events.records import PHASES, StepDone
from parakit.events.summary import RunSummary
from parakit.plots.style import INK, PHASE_COLOURS, legend_above, nice_above, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BreakdownPlot", "draw_timeline", "phase_legend"]

_BAR = 0.62
_NAMED = 16  # more names would overlap
# In a step, whoever is early waits before the sums can travel.
_ORDER = ("data", "forward", "backward", "idle", "exchange", "update")


class BreakdownPlot:
    """Milliseconds a step by phase and worker, on axes; `update` as often as there is news."""

    def __init__(self, ax: Axes) -> None:
        self.ax = ax
        self._bars: list[Rectangle] = []
        self._workers: tuple[str, ...] = ()
        self._right = 0.0
        ax.set_xlabel("milliseconds a step, mean of the last 3 s")
        ax.grid(alpha=0.25, axis="x")
        ax.set_axisbelow(True)
        phase_legend(ax)

    @property
    def artists(self) -> list[Any]:
        """What changes from frame to frame."""
        return list(self._bars)

    def update(self, summary: RunSummary, *, snug: bool = False) -> bool:
        """Show what a course has by now; says whether more than the artists changed.

        Where `snug`, the limits fit the data, although they were to stand still.
        """
        self._right *= not snug
        workers, seconds = summary.shares()
        changed = workers != self._workers
        if changed:
            self._seat(workers)
        if not workers:
            return changed
        milliseconds = 1000 * seconds
        ends = milliseconds.cumsum(axis=1)
        for bar, left, width in zip(self._bars, (ends - milliseconds).flat, milliseconds.flat, strict=True):
            bar.set_x(left)
            bar.set_width(width)
        return self._fit(float(ends.max())) or changed

    def _seat(self, workers: tuple[str, ...]) -> None:
        for bar in self._bars:
            bar.remove()
        self._workers = workers
        self._bars = [_bar(row, phase) for row in range(len(workers)) for phase in PHASES]
        for bar in self._bars:
            self.ax.add_patch(bar)
        every = max(1, -(-len(workers) // _NAMED))
        rows = range(0, len(workers), every)
        self.ax.set_yticks(list(rows), [workers[row] for row in rows], parse_math=False)
        self.ax.set_ylim(max(len(workers), 1) - 0.4, -0.6)

    def _fit(self, reach: float) -> bool:
        if 0.35 * self._right < reach <= self._right:
            return False
        self._right = nice_above(1.1 * reach)
        self.ax.set_xlim(0, self._right)
        return True


def _bar(row: int, phase: str) -> Rectangle:
    return Rectangle((0, row - _BAR / 2), 0, _BAR, facecolor=PHASE_COLOURS[phase], linewidth=0)


def phase_legend(ax: Axes) -> None:
    """What the colours mean, above the axes."""
    handles = [Patch(facecolor=colour, label=name) for name, colour in PHASE_COLOURS.items()]
    legend_above(ax, handles, columns=len(handles), gap=0.9, length=1.3, text_gap=0.4)


def draw_breakdown(summary: RunSummary, ax: Axes) -> Axes:
    """The breakdown of a course on axes."""
    BreakdownPlot(ax).update(summary)
    if summary.last is None:
        note(ax, "no step yet")
    return ax


def draw_timeline(summary: RunSummary, ax: Axes, steps: int) -> Axes:
    """Each worker's phases of the last steps, as a Gantt chart."""
    shown = summary.recent(steps)
    ax.set_xlabel("milliseconds")
    phase_legend(ax)
    if not shown:
        note(ax, "no step yet")
        return ax
    began = shown[0].at_seconds - shown[0].seconds
    for row in range(len(shown[0].workers)):
        for phase in PHASES:
            spans = [_span(step, row, phase, began) for step in shown]
            ax.broken_barh(spans, (row - _BAR / 2, _BAR), facecolor=PHASE_COLOURS[phase], lw=0)
    for step in shown:
        ax.axvline(1000 * (step.at_seconds - began), color=INK, lw=0.6, alpha=0.6)
    ax.set_yticks(range(len(shown[0].workers)), [part.worker for part in shown[-1].workers],
                  parse_math=False)  # fmt: skip
    ax.set_ylim(len(shown[0].workers) - 0.4, -0.6)
    ax.set_xlim(0, 1000 * (shown[-1].at_seconds - began))
    ax.set_xlabel(f"milliseconds since step {shown[0].step} began; a line ends each step")
    return ax


def _span(step: StepDone, row: int, phase: str, began: float) -> tuple[float, float]:
    """Start and length of a worker's phase, in milliseconds."""
    parts: Floats = np.array([getattr(step.workers[row], f"{name}_seconds") for name in _ORDER])
    place = _ORDER.index(phase)
    start = step.at_seconds - step.seconds - began + parts[:place].sum()
    return 1000 * start, 1000 * float(parts[place])
