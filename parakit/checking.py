"""Checks before a run starts: a mistake surfaces at the call, in words, and nothing has been started.

What can be known here is known here: the model and the loss are tried on a few samples, the optimizer is made once,
and everything that must travel to a worker is pickled.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from parakit.data import Samples, leaves, map_tree
from parakit.errors import InputError, LossError, ModelError
from parakit.gradients import call_model
from parakit.losses import SummedLoss, check_labels, summed
from parakit.rates import AtRate, learning_rate
from parakit.replica import Recipe
from parakit.workers.base import Strategy

__all__ = [
    "at_rate", "check_choice", "check_optimizer", "check_positive", "check_rate", "check_strategy", "check_travels",
    "check_whole", "own_copy", "pickled", "try_out",
]  # fmt: skip

_PROBE_ROWS = 8
_PROBE_LABELS = 64


def check_whole(name: str, value: Any, least: int, *, none: bool = False) -> None:
    """Refuse what is no whole number, or a smaller one; None may be allowed."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            f"{name} is {value!r}; it must be a whole number of at least {least}{', or None' if none else ''}."
        )


def check_positive(name: str, value: Any, *, none: bool = False) -> None:
    """Refuse what is no number above 0; None may be allowed."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{name} is {value!r}; it must be a number above 0{', or None' if none else ''}.")


def check_rate(name: str, value: Any, present: float) -> None:
    """Refuse what is no finite number above 0, or any where an optimizer has no rate at present (NaN)."""
    check_positive(name, value)
    if value > sys.float_info.max:
        raise InputError(f"{name} is {value!r}; it must be a finite number above 0.")
    if math.isnan(present):
        raise ModelError(
            f"{name} cannot be {value:g}: the optimizer has none.",
            cause='its parameter groups hold no "lr"',
            remedy="leave its step size to the optimizer, or keep it under that name in the groups",
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def check_strategy(strategy: Any) -> None:
    """Refuse what is no strategy."""
    if strategy is None:
        return
    if isinstance(strategy, type) or not callable(getattr(strategy, "step", None)):
        raise InputError(
            f"The strategy is {strategy!r}, which has no step(team, step) to call.",
            remedy="give an instance, such as parakit.strategies.AllReduce()",
        )
    check_choice("strategy.runs_on", getattr(strategy, "runs_on", None), ("workers", "driver"))


def own_copy(model: Any, *, training: bool = True) -> nn.Module:
    """A copy of the user's model on the CPU, checked for being trainable."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model is {model!r}, which is no torch.nn.Module.",
            remedy="give an instance, not a class: Model(), not Model" if isinstance(model, type) else "",
        )
    try:
        own = copy.deepcopy(model).cpu()
    except Exception as error:
        raise ModelError(
            f"The model {type(model).__name__} cannot be copied: {type(error).__name__}: {error}",
            cause="an attribute that cannot be copied, such as an open file, a lock or a tensor with a graph",
            remedy="create such things in forward, or leave them out in __getstate__",
        ) from error
    if training and not any(p.requires_grad for p in own.parameters()):
        raise ModelError(
            f"The model {type(model).__name__} has no trainable parameters.",
            cause="every parameter has requires_grad=False, or layers are held in a plain list",
            remedy="hold layers in nn.ModuleList, and leave requires_grad=True where the model is to learn",
        )
    if training and any(p.is_complex() for p in own.parameters() if p.requires_grad):
        raise ModelError(
            f"The model {type(model).__name__} has complex parameters, which cannot be trained here.",
            remedy="hold the real and imaginary parts as two real parameters (torch.view_as_complex in forward)",
        )
    return own


def try_out(
    model: nn.Module, loss: Any, samples: Samples, held_out: Samples | None, *, training: bool = True
) -> SummedLoss:
    """Try model and loss on a few samples here, where an error is easy to read.

    Initialises lazy layers of the model; otherwise leaves it, and torch's random numbers, as they were.
    """
    probe = samples.take(_probe_rows(samples.targets))
    with torch.random.fork_rng(devices=[]):
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            _forward(model, probe)
        trial = copy.deepcopy(model).train(training)
        with torch.set_grad_enabled(training):
            output = _forward(trial, probe)
            still = map_tree(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)
            check_labels(loss, still, samples.targets, "data")
            if held_out is not None:
                check_labels(loss, still, held_out.targets, "validation")
            loss_sum = summed(loss, still, probe.targets)
            if training:
                total, _ = loss_sum(output, probe.targets)
                _backward(total)
    return loss_sum


def _probe_rows(targets: Any) -> Tensor:
    """A few rows, among them one of each label, so that weights and ignored labels show."""
    first = leaves(targets)[0]
    rows = torch.arange(min(_PROBE_ROWS, len(first)))
    if first.is_floating_point() or first.is_complex():
        return rows
    labels, where = torch.unique(first.reshape(len(first), -1)[:, 0], return_inverse=True)
    if len(labels) > _PROBE_LABELS:
        return rows
    one_each = torch.full((len(labels),), len(first)).scatter_reduce(0, where, torch.arange(len(first)), "amin")
    chosen: Tensor = torch.cat([rows, one_each]).unique()
    return chosen


def _forward(model: nn.Module, probe: Samples) -> Any:
    try:
        return call_model(model, probe.inputs)
    except Exception as error:
        kinds = " and ".join(
            f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}" for leaf in leaves(probe.inputs)
        )
        double = any(leaf.dtype == torch.float64 for leaf in leaves(probe.inputs))
        raise ModelError(
            f"The model cannot compute a batch of {len(probe)} samples: {type(error).__name__}: {error}",
            cause=f"inputs of {kinds}, which the model's layers do not take",
            remedy='the inputs are float64: inputs.astype("float32"), or model.double()'
            if double
            else "try model(inputs[:8]) in this notebook until it works",
        ) from error


def _backward(total: Tensor) -> None:
    try:
        total.backward()
    except Exception as error:
        raise LossError(
            f"The loss has no gradient: {type(error).__name__}: {error}",
            cause="the loss or the model detaches its result, or uses .item() or numpy",
            remedy="compute the loss with torch operations on the model's output only",
        ) from error


def check_optimizer(recipe: Recipe) -> float:
    """Make the optimizer and the schedule once, over a copy of the model.

    Returns
    -------
    float
        The learning rate that the optimizer is made with, before a schedule; NaN where it has none.
    """
    trial = copy.deepcopy(recipe.model)
    if not callable(recipe.optimizer) or isinstance(recipe.optimizer, torch.optim.Optimizer):
        raise ModelError(
            f"optimizer is {_brief(recipe.optimizer)}, but must be a function that makes one.",
            cause="each worker needs an optimizer of its own, over its own copy of the parameters",
            remedy="optimizer=lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    parameters = list(trial.parameters())
    made = _made(recipe.optimizer, parameters, "optimizer")
    if not isinstance(made, torch.optim.Optimizer):
        raise ModelError(
            f"The optimizer function returned {_brief(made)}, which is no torch.optim.Optimizer.",
            remedy="optimizer=lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    own = {id(p) for p in parameters}
    if any(id(p) not in own for group in made.param_groups for p in group["params"]):
        raise ModelError(
            "The optimizer function made an optimizer over other parameters than those it was given.",
            cause="it names a model of the notebook: lambda p: SGD(model.parameters(), ...)",
            remedy="use the argument: lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    rate = learning_rate(made)
    if recipe.scheduler is None:
        return rate
    schedule = _made(recipe.scheduler, made, "scheduler")
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) or not isinstance(
        schedule, torch.optim.lr_scheduler.LRScheduler
    ):
        raise ModelError(
            f"The scheduler function returned {_brief(schedule)}, which cannot be stepped without a metric.",
            remedy="use a scheduler that follows steps or epochs: lambda o: torch.optim.lr_scheduler.StepLR(o, 10)",
        )
    return rate


def at_rate(recipe: Recipe, rate: float) -> Recipe:
    """A checked recipe whose optimizer begins at another learning rate.

    Raises
    ------
    ModelError
        If the scheduler would not begin from that rate.
    """
    changed = dataclasses.replace(recipe, optimizer=AtRate(recipe.optimizer, rate))
    if changed.scheduler is None:
        return changed
    made = changed.optimizer(list(copy.deepcopy(recipe.model).parameters()))
    changed.scheduler(made)
    initial = float(made.param_groups[0].get("initial_lr", rate))
    if not math.isclose(initial, rate):
        raise ModelError(
            f"learning_rate is {rate:g}, but the scheduler begins at {initial:g}.",
            cause="a scheduler with rates of its own, such as OneCycleLR or CyclicLR",
            remedy="give the rate to the scheduler, and leave learning_rate= out",
        )
    return changed


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80].splitlines()[0]


def _made(factory: Any, argument: Any, name: str) -> Any:
    if not callable(factory):
        raise ModelError(f"{name} is {_brief(factory)}, but must be a function that makes one.")
    try:
        return factory(argument)
    except Exception as error:
        raise ModelError(f"The {name} function raised {type(error).__name__}: {error}") from error


def check_travels(recipe: Recipe, strategy: Strategy) -> None:
    """Pickle everything that a worker needs, part by part, so that the culprit can be named."""
    for what, part in (
        ("model", recipe.model), ("loss", recipe.loss), ("optimizer", recipe.optimizer),
        ("scheduler", recipe.scheduler), ("strategy", strategy),
    ):  # fmt: skip
        pickled(part, what)


def pickled(value: Any, what: str) -> bytes:
    """A value as bytes; classes and functions of a notebook travel by value."""
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise ModelError(
            f"The {what} cannot be pickled, so it cannot travel to the workers: {type(error).__name__}: {error}",
            cause="it holds something that lives in this process only, such as a lock, a file or a generator",
            remedy="create such things in forward, or leave them out in __getstate__",
        ) from error
