"""What runs ask of optimizers: their rates, their modes, and how their state lies in memory.

To set a learning rate is to scale all: every parameter group and every rate of a schedule, by the factor that takes
the first group's present rate to the value. So groups keep their proportions, and a schedule goes on along its own
curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from parakit.tensor_layout import shaped_like

__all__ = ["AtRate", "evaluation_mode", "lay_out_state", "learning_rate", "set_learning_rate", "set_mode"]

# Where torch's schedulers keep rates: in the optimizer's groups, and in attributes of their own.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULE_RATES = ("base_lrs", "max_lrs", "_last_lr", "eta_min")
_NOTHING = 1e-12  # of the initial rate: less than that is what rounding leaves of 0, as at the end of a cosine


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate of the first parameter group; NaN where an optimizer has none."""
    rate = optimizer.param_groups[0].get("lr")
    return float("nan") if rate is None else float(rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float, scheduler: LRScheduler | None = None) -> None:
    """Make a value the learning rate of the first parameter group, and scale all other rates likewise.

    A rate of 0 cannot be scaled. Then every group gets the value itself; a schedule goes on from there by its own
    rates, or by the value where those are 0 too.

    Parameters
    ----------
    optimizer : Optimizer
        One with learning rates.
    value : float
        Above 0.
    scheduler : LRScheduler, optional
        Of this optimizer.
    """
    now = learning_rate(optimizer)
    initial = float(optimizer.param_groups[0].get("initial_lr", now))
    if abs(now) > _NOTHING * abs(initial):
        # In this order, so that the first group's rate becomes the value to the last bit.
        _scale(optimizer, scheduler, lambda rate: rate / now * value)
    else:
        _give_all(optimizer, scheduler, value)


def _scale(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, scaled: Callable[[Any], Any]) -> None:
    # Rates may be tensors. They are replaced, never written to: somebody else may hold the same one.
    for group in optimizer.param_groups:
        group.update({name: scaled(group[name]) for name in _GROUP_RATES if name in group})
    for schedule in _schedules(scheduler):
        for name in _SCHEDULE_RATES:
            rates = getattr(schedule, name, None)
            if rates is not None:
                setattr(schedule, name, [scaled(rate) for rate in rates] if isinstance(rates, list) else scaled(rates))


def _give_all(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0 * group["lr"] + value  # a tensor stays one
        if "initial_lr" in group:
            group["initial_lr"] = _or_else(group["initial_lr"], value)
    for schedule in _schedules(scheduler):
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [_or_else(rate, value) for rate in schedule.base_lrs]
        schedule._last_lr = [0 * group["lr"] + value for group in optimizer.param_groups]


def _or_else(rate: Any, value: float) -> Any:
    return rate if float(rate) else rate + value


def _schedules(scheduler: LRScheduler | None) -> Iterator[Any]:
    """A schedule and all that it is made of: some hold others."""
    if scheduler is not None:
        yield scheduler
        for part in getattr(scheduler, "_schedulers", ()):
            yield from _schedules(part)


@dataclass(frozen=True)
class AtRate:
    """A function that makes an optimizer which begins at a learning rate of its own.

    Parameters
    ----------
    factory : callable
        Makes the optimizer from the list of parameters.
    rate : float
        Of the first parameter group; the others scale with it.
    """

    factory: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    rate: float

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over some parameters."""
        optimizer = self.factory(parameters)
        set_learning_rate(optimizer, self.rate)
        return optimizer


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Lay out what an optimizer keeps for its parameters as they are, as its own steps would: a state has one order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                laid = shaped_like(value.new_empty(value.numel()), parameter)
                state[name] = laid.copy_(value)


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Tell an optimizer that wants to know, such as a schedule-free one, whether its model trains or is evaluated."""
    tell = getattr(optimizer, mode, None)
    if callable(tell):
        tell()


@contextmanager
def evaluation_mode(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let parameters be those to evaluate, for an optimizer that trains others."""
    set_mode(optimizer, "eval")
    try:
        yield
    finally:
        set_mode(optimizer, "train")
