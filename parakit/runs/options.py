"""The options of training: their names, types and defaults, once for `train`, plans, studies and panels.

`train` spells them out all the same, because its signature is the manual.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast

from torch import Tensor

from parakit.engines.recipe import OptimizerFactory, SchedulerFactory
from parakit.strategies.base import Strategy

__all__ = ["DEFAULTS", "StepOptions", "TrainOptions", "check_names", "with_defaults"]


class StepOptions(TypedDict, total=False):
    """How a step is computed: options that studies have too, meant as `parakit.train` says."""

    loss: Callable[[Any, Any], Tensor] | None
    optimizer: OptimizerFactory | None
    clip_norm: float | None
    strategy: Strategy | None
    limit_seconds: float


class TrainOptions(StepOptions, total=False):
    """All options of `parakit.train`, which says what they mean; model, data and pool are none."""

    workers: int | None
    threads: int | None
    learning_rate: float | None
    scheduler: SchedulerFactory | None
    scheduler_every: str
    batch_size: int | None
    epochs: int | None
    steps: int | None
    validation: Any
    seed: int
    chunks: int | None
    on_nonfinite: str
    gather: bool
    buffers: Mapping[str, str] | None
    check: bool | float
    checkpoint: str | os.PathLike[str] | None
    checkpoint_seconds: float
    checkpoint_keep: int
    resume: Any


#: Of the options that are something else than None if they are left out.
DEFAULTS: TrainOptions = {
    "scheduler_every": "epoch",
    "seed": 0,
    "limit_seconds": 10.0,
    "on_nonfinite": "stop",
    "gather": False,
    "check": True,
    "checkpoint_seconds": 30.0,
    "checkpoint_keep": 3,
}


def check_names(options: Mapping[str, Any], known: type[Any], function: str) -> None:
    """Refuse options that a TypedDict does not know.

    Raises
    ------
    TypeError
        In the words of Python about a call of this function.
    """
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def with_defaults(options: TrainOptions, function: str) -> TrainOptions:
    """All options, with their defaults where none were given.

    Raises
    ------
    TypeError
        If there is no such option, in the words of Python about a call of this function.
    """
    check_names(options, TrainOptions, function)
    return cast(TrainOptions, {**dict.fromkeys(TrainOptions.__annotations__), **DEFAULTS, **options})
