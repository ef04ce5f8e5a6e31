"""Pictures of a run: each function draws some data on axes and returns them.

`data` is a run, also one that is going on, or a history. Without axes, a function makes a figure of its own with
pyplot, which a notebook shows below the cell. This package is the only importer of matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parakit.checking import check_choice, check_whole
from parakit.course import Course
from parakit.plots import curves, phases, speedups
from parakit.plots.style import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["breakdown", "loss", "speedup", "throughput", "timeline"]


def loss(data: Any, ax: Axes | None = None, *, against: str = "seconds") -> Axes:
    """Loss of the batch against time or steps, coloured by worker count.

    Parameters
    ----------
    data : Run or History
    ax : matplotlib Axes, optional
    against : {"seconds", "step"}
        What the axis shows. What a step computes does not depend on the number of workers, so against steps the curve
        is the same at any number; against seconds it is stretched where steps take longer.

    Returns
    -------
    Axes
        The loss is on a logarithmic scale while it is positive. Long runs are drawn in at most 600 points, each the
        mean of neighbouring steps. Against seconds, the curve is broken where nothing was trained.
    """
    check_choice("against", against, tuple(curves.AXES))
    return curves.draw(Course.of(data), axes_or_new(ax), "loss", against)


def throughput(data: Any, ax: Axes | None = None) -> Axes:
    """Samples per second against time, coloured by worker count.

    Parameters
    ----------
    data : Run or History
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        A point is a segment of about a quarter of a second, the time to order and commit it included. Pauses,
        resizes and evaluations do not count. Plain PyTorch on all cores is a line, if it was measured.
    """
    return curves.draw(Course.of(data), axes_or_new(ax), "rate")


def speedup(data: Any, ax: Axes | None = None, *, most: int | None = None) -> Axes:
    """Speedup relative to one worker against the number of workers, for every number that the run had.

    Parameters
    ----------
    data : Run or History
    ax : matplotlib Axes, optional
    most : int, optional
        How far the axis of workers reaches.

    Returns
    -------
    Axes
        Points are medians over segments, bars reach from the lower to the upper quartile; both are relative to the
        median with one worker of the same run, without which there is no point. Plain PyTorch on all cores is a
        line, if it was measured (`Run.measure_baseline`).
    """
    check_whole("most", most, 1, none=True)
    return speedups.draw(Course.of(data), axes_or_new(ax), most)


def breakdown(data: Any, ax: Axes | None = None) -> Axes:
    """Where each worker's time goes in a step: stacked bars of the phases.

    Parameters
    ----------
    data : Run or History
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
        Means over the last three seconds of steps with the present workers, in milliseconds a step.
    """
    return phases.draw_breakdown(Course.of(data), axes_or_new(ax))


def timeline(data: Any, ax: Axes | None = None, *, steps: int = 6) -> Axes:
    """Each worker's phases of the last steps, as a Gantt chart.

    Parameters
    ----------
    data : Run or History
    ax : matplotlib Axes, optional
    steps : int
        How many of the last steps; at most 96, and only those of the present group.

    Returns
    -------
    Axes
        Within a step, the phases are laid one after the other from the start of the step: a worker measures how long
        a phase takes, not when. What is left blank before the end of the step was spent outside of the phases.
    """
    check_whole("steps", steps, 1)
    return phases.draw_timeline(Course.of(data), axes_or_new(ax, height=3.0), steps)
