"""`panel`: what a user asks for, checked, as a panel that is shown."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from parakit.errors import InputError
from parakit.runs.options import TrainOptions
from parakit.runs.run import Run
from parakit.widgets.output import hands_free
from parakit.widgets.panel import Panel
from parakit.widgets.settings import Draft, refuse_options, settings_of
from parakit.workers.pool import Workers

__all__ = ["panel"]


def panel(
    subject: Any,
    data: Any = None,
    *,
    on: Workers | None = None,
    workers: int | None = None,
    baselines: bool = True,
    tour: bool | None = None,
    block: bool = False,
    **options: Any,
) -> Panel:
    """Show a control room: resize, pause and stop a run while it trains, and see what that does to its speed.

    Parameters
    ----------
    subject : Run or nn.Module
        A run, also one that has ended; or a model to be trained when somebody presses Start.
    data, on
        As for `parakit.train`; with a model only.
    workers : int, optional
        How many workers to begin with; all of the pool by default. With a model only.
    baselines : bool
        Whether the panel measures what speed is relative to, as the run begins: plain PyTorch (all cores, or one GPU),
        for about two seconds between two segments; and one worker, by letting the run go on with one for about as long.
        That changes when the run ends, but not what it computes.
    tour : bool, optional
        Whether to visit every worker count right after the start. Default: only where nobody can press the button.
    block : bool
        For front ends whose widgets do not hear from a thread: start at once, show plain pictures, and return when
        the run has ended. The slider is not shown, because it could not be heard.
    **options
        More options of `parakit.train`, with a model only. ``strategy``, ``batch_size``, ``learning_rate`` and
        ``epochs`` (20 by default) are what the controls show at first.

    Returns
    -------
    Panel
        With `run`, `history`, `start`, `tour`, `save` and `close`. When the run ends, or the panel is closed, its
        place in the notebook holds a plain picture and text.

    Raises
    ------
    InputError
        If `subject` is neither, or options were given for a run.
    ParakitError
        As `parakit.train`, if model, data and options cannot be right.

    Notes
    -----
    A run has one panel: a new one closes an older one over the same run. A cell that is executed again closes the
    panel that it made before, and stops a run that this one had started, since nobody could reach it.

    Where nobody can press a button (nbconvert, papermill), set the environment variable ``PARAKIT_HANDS_FREE=1``:
    every panel then behaves as with ``block=True``, and with ``tour=True`` unless that is given.

    Examples
    --------
    >>> import torch, parakit as pk
    >>> digits = pk.datasets.digits()
    >>> with pk.connect("inline") as workers:
    ...     run = pk.train(torch.nn.Linear(64, 10), digits.train, on=workers, epochs=2).wait(progress=False)
    ...     pk.panel(run)
    <Panel (closed): <Run finished: step 12 of 12, ...>>
    """
    if hands_free():
        block, tour = True, tour is None or tour
    if isinstance(subject, Run):
        refuse_options({"data": data, "on": on, "workers": workers, **options})
        made = Panel(subject.pool, subject, None, settings_of(subject), baselines, bool(tour))
    else:
        _check_subject(subject, data, on)
        assert on is not None  # as checked
        draft = Draft(subject, data, on, workers, cast(TrainOptions, options))
        made = Panel(on, None, draft, draft.settings, baselines, bool(tour))
    made.open(block=block)
    return made


def _check_subject(model: Any, data: Any, on: Any) -> None:
    if not isinstance(model, nn.Module) or data is None or on is None:
        raise InputError(
            f"pk.panel cannot show {type(model).__name__} {str(model)[:60]!r}" + ("" if data is None else " with data")
            + ("" if on is not None else " without workers") + ".",
            remedy="pk.panel(run) for a run; or pk.panel(model, data, on=workers) to start one",
        )  # fmt: skip
