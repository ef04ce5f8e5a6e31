"""A run that has not begun: what a panel will train, checked when the panel is made."""

from __future__ import annotations

import math
from typing import Any, cast

from parakit import strategies
from parakit.data.chunks import DEFAULT_CHUNKS, check_chunks, chunk_count
from parakit.errors import InputError
from parakit.events.records import StepDone
from parakit.runs.options import TrainOptions
from parakit.runs.planning import plan
from parakit.runs.run import Run
from parakit.runs.train import train
from parakit.strategies.base import Strategy
from parakit.widgets.controls import Settings
from parakit.workers.pool import Workers

__all__ = ["Draft", "refuse_options", "settings_of"]

_EPOCHS = 20
_MOST_WORKERS = 64


class Draft:
    """Model, data, pool and options, for `parakit.train`.

    Parameters
    ----------
    model, data, pool
        As for `train`.
    workers : int or None
        How many to begin with.
    options : TrainOptions
        More options of `train`; those that the controls show are their first values.

    Raises
    ------
    ParakitError
        As `train`, if something cannot be right.
    """

    def __init__(self, model: Any, data: Any, pool: Workers, workers: int | None, options: TrainOptions) -> None:
        self._model, self._data, self._pool = model, data, pool
        options = {**options, "workers": workers}
        if options.get("epochs") is None and options.get("steps") is None:
            options["epochs"] = _EPOCHS
        trial = plan(model, data, on=pool, **options)
        order = trial.job.recipe.order
        self.settings = Settings(
            trial.workers,
            most_workers=max(trial.workers, min(pool.most, len(order.sizes), _MOST_WORKERS)),
            strategies=_strategies(options.get("strategy")),
            batch_size=order.batch_size,
            most_samples=sum(order.sizes),
            learning_rate=_finite(trial.rate),
            epochs=options.get("epochs"),
        )
        #: What the run will be, as far as that is known before it begins.
        self.start_planned = trial.start
        self._options = options

    def start(self, wanted: int, **chosen: Any) -> Run:
        """Train, with what was chosen in the controls; `wanted` workers must be possible, if not from the start."""
        pieces = self._options.get("chunks") or DEFAULT_CHUNKS
        check_chunks(wanted, chunk_count(self.settings.most_samples, chosen["batch_size"], pieces))
        if chosen["learning_rate"] == self.settings.learning_rate:
            chosen["learning_rate"] = self._options.get("learning_rate")  # a schedule may begin at a rate of its own
        options = cast(TrainOptions, {**self._options, **chosen})
        return train(self._model, self._data, on=self._pool, **options)


def settings_of(run: Run) -> Settings:
    """What the controls over a run show."""
    job = run.plan.job
    sizes = job.recipe.order.sizes
    latest = run.history.latest(StepDone)
    return Settings(
        run.target,
        most_workers=max(run.world_size, run.target, min(run.pool.most, len(sizes), _MOST_WORKERS)),
        strategies={type(job.strategy).__name__: job.strategy},
        batch_size=job.recipe.order.batch_size,
        most_samples=sum(sizes),
        learning_rate=_finite(latest.learning_rate if latest else run.plan.rate),
        epochs=None,
    )


def _strategies(own: Strategy | None) -> dict[str, Strategy]:
    offered: dict[str, Strategy] = {} if own is None else {type(own).__name__: own}
    return offered | {name: getattr(strategies, name)() for name in strategies.__all__ if name not in offered}


def _finite(rate: float) -> float | None:
    """A learning rate, or None for an optimizer that has none."""
    return rate if math.isfinite(rate) else None


def refuse_options(given: dict[str, Any]) -> None:
    """Refuse what only makes sense for a run that has not begun."""
    named = sorted(name for name, value in given.items() if value is not None)
    if named:
        raise InputError(
            f"{', '.join(named)} cannot be given for a run that has begun.",
            remedy="pk.panel(run) alone; or pk.panel(model, data, on=workers, ...), which starts one",
        )
