"""Pictures of a run: each function draws some data on axes and returns them.

`data` is a run, also one that is going on, or a history. Without axes, a function makes a figure of its own with
pyplot, which a notebook shows below the cell. This package is the only importer of matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parakit.costs.model import CostModel
from parakit.errors import InputError
from parakit.events.summary import RunSummary
from parakit.plots import cost_model as _costs
from parakit.plots import curves, phases, speedups
from parakit.plots import study as _studies
from parakit.plots.style import axes_or_new
from parakit.scaling.study.study import Scaling
from parakit.validation import check_choice, check_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["breakdown", "costs", "efficiency", "loss", "speedup", "throughput", "timeline", "what_if"]

_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


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
    return curves.draw(RunSummary.of(data), axes_or_new(ax), "loss", against)


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
    return curves.draw(RunSummary.of(data), axes_or_new(ax), "rate")


def speedup(data: Any, ax: Axes | None = None, *, most: int | None = None) -> Axes:
    """Speedup relative to one worker against the number of workers, for every number that the run or study had.

    Parameters
    ----------
    data : Run, History or Scaling
    ax : matplotlib Axes, optional
    most : int, optional
        How far the axis of workers reaches.

    Returns
    -------
    Axes
        Points are medians over segments, bars reach from the lower to the upper quartile; both are relative to the
        median with one worker of the same run, without which there is no point. Plain PyTorch on all cores is a
        line, if it was measured (`Run.measure_baseline`). Of a study, spreads are those of ratios within a block, and
        what was fitted is drawn with its band.
    """
    check_whole("most", most, 1, none=True)
    if isinstance(data, Scaling):
        return _studies.scaling_speedup(data, ax, most=most)
    return speedups.draw(RunSummary.of(data), axes_or_new(ax), most)


def efficiency(study: Scaling, ax: Axes | None = None, *, most: int | None = None) -> Axes:
    """Speedup per worker against the number of workers, of a study.

    Parameters
    ----------
    study : Scaling
        From `parakit.sweep`.
    ax : matplotlib Axes, optional
    most : int, optional
        How far the axis of workers reaches.

    Returns
    -------
    Axes
    """
    return _studies.scaling_efficiency(study, ax, most=most)


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
    return phases.draw_breakdown(RunSummary.of(data), axes_or_new(ax))


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
    return phases.draw_timeline(RunSummary.of(data), axes_or_new(ax, height=3.0), steps)


def costs(model: Any, ax: Axes | None = None, *, workers: Sequence[int] = _COUNTS) -> Axes:
    """Where the time of a step would go by a cost model, against the number of workers: nothing here is measured.

    Parameters
    ----------
    model : CostModel or Scaling
    ax : matplotlib Axes, optional
    workers : sequence of int

    Returns
    -------
    Axes
        Stacked shares of a step; above them the time of the step.
    """
    return _costs.draw_costs(_model(model), _counts(workers), axes_or_new(ax))


def what_if(models: Mapping[str, Any], ax: Axes | None = None, *, workers: int = 1024) -> Axes:
    """Speedup relative to one worker by several cost models, such as of networks or strategies: nothing is measured.

    Parameters
    ----------
    models : mapping of str to CostModel or Scaling
        By the names that the legend shows.
    ax : matplotlib Axes, optional
    workers : int
        How far the axis reaches.

    Returns
    -------
    Axes
        Each speedup is relative to one worker of the same model.
    """
    check_whole("workers", workers, 2)
    if not isinstance(models, Mapping) or not models:
        raise InputError("what_if compares cost models by their names.", remedy='plots.what_if({"as it is": costs})')
    return _costs.draw_what_if({str(name): _model(m) for name, m in models.items()}, [workers], axes_or_new(ax))


def _model(given: Any) -> CostModel:
    found = given if isinstance(given, CostModel) else getattr(given, "costs", None)
    if not isinstance(found, CostModel):
        raise InputError(
            f"{type(given).__name__} is no cost model.",
            remedy="give a CostModel, or a study of pk.sweep; CostModel.from_history makes one of a run's history",
        )
    return found


def _counts(workers: Sequence[int]) -> list[int]:
    for count in workers:
        check_whole("workers", count, 1)
    if not len(workers):
        raise InputError("There are no worker counts to draw.")
    return sorted(set(workers))
