"""Optimizers and schedules: made once over a private copy, so that what cannot work is told at the call."""

from __future__ import annotations

import linecache
import math
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from parakit.engines.memory_needs import states_of
from parakit.engines.optimizers import AtRate, learning_rate
from parakit.errors import ModelError
from parakit.failures.source_lines import describe_error, listing, places_of
from parakit.preflight.trial import Trial
from parakit.validation import brief

__all__ = ["Optimizing", "check_optimizer", "check_rate_of_schedule", "lengths_of"]

_SMALL_BYTES = 1 << 26  # of parameters with which a step is tried, which takes as much memory again, or more


@dataclass(frozen=True)
class Optimizing:
    """What was found out about an optimizer and its schedule.

    Attributes
    ----------
    rate : float
        The learning rate that the optimizer is made with, before a schedule; NaN where it has none.
    closure : bool
        Whether it evaluates the loss itself.
    states : float
        Tensors that it keeps for each parameter.
    notes : tuple of str
        What a user should know of the schedule, a sentence each.
    """

    rate: float
    closure: bool
    states: float
    notes: tuple[str, ...] = ()


def check_optimizer(trial: Trial, steps: int, per_epoch: int, every: str) -> Optimizing:
    """Make the optimizer and the schedule, and see whether they can step.

    Parameters
    ----------
    trial : Trial
    steps, per_epoch : int
        Of the run, and of an epoch.
    every : {"epoch", "step"}
        When the schedule steps.

    Returns
    -------
    Optimizing

    Raises
    ------
    ModelError
    """
    factory, parameters = trial.parts.optimizer, list(trial.model.parameters())
    raw = factory.factory if isinstance(factory, AtRate) else factory
    made_already = isinstance(raw, torch.optim.Optimizer)
    if not callable(raw) or made_already:
        given = f"{type(raw).__name__}, made already" if made_already else brief(raw)
        raise ModelError(
            f"optimizer is {given}, but must be a function that makes one.",
            cause="each worker needs an optimizer of its own, over its own copy of the parameters",
            remedy="optimizer=lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    made = _made(raw, parameters, "optimizer")
    if not isinstance(made, torch.optim.Optimizer):
        several = isinstance(made, tuple | list) and all(isinstance(one, torch.optim.Optimizer) for one in made)
        raise ModelError(
            f"The optimizer function returned {len(made)} optimizers, not one."
            if several
            else f"The optimizer function returned {brief(made)}, which is no torch.optim.Optimizer.",
            cause="several optimizers, which take turns" if several else "",
            remedy="one optimizer with a parameter group for each: torch.optim.SGD([{'params': p[:2], 'lr': 0.1}, "
            "{'params': p[2:], 'lr': 0.01}])"
            if several
            else "optimizer=lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    own = {id(p) for p in parameters}
    if any(id(p) not in own for group in made.param_groups for p in group["params"]):
        raise ModelError(
            "The optimizer function made an optimizer over other parameters than those it was given.",
            cause="it names a model by a global name of an installed module, or makes parameters of its own",
            remedy="use the argument: lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    rate = learning_rate(made)
    notes: list[str] = []
    if trial.parts.scheduler is not None:
        notes += _check_schedule(trial.parts.scheduler, made, steps, per_epoch, every)
    closure = _asks_for_closure(made)
    if not closure:
        _try_step(made, trial)
    return Optimizing(rate, closure, states_of(made), tuple(notes))


def _made(factory: Any, argument: Any, name: str) -> Any:
    examples = {
        "optimizer": "lambda p: torch.optim.SGD(p, lr=0.1)",
        "scheduler": "lambda o: torch.optim.lr_scheduler.StepLR(o, 10)",
    }
    if not callable(factory):
        raise ModelError(
            f"{name} is {brief(factory)}, but must be a function that makes one.", remedy=f"{name}={examples[name]}"
        )
    try:
        return factory(argument)
    except Exception as error:
        given = "the list of parameters" if name == "optimizer" else "the optimizer"
        raise ModelError(
            f"The {name} function raised {describe_error(error)}",
            where=listing(places_of(error)),
            cause=f"it is called with {given}, and with nothing else",
            remedy=f"{name}={examples[name]}, say",
        ) from error


# --- steps


def _asks_for_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer cannot step without being able to evaluate the loss; tried without any gradient."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return True
    before = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    try:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _tell(optimizer, "train")
            optimizer.step()
    except Exception as error:
        return "closure" in str(error).lower() or "closure" in _line_of(error)
    finally:
        grads = iter(before)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = next(grads)
    return False


def _line_of(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else ""


def _try_step(optimizer: torch.optim.Optimizer, trial: Trial) -> None:
    """Let an optimizer make a step, where that takes little memory."""
    parameters = [p for p in trial.model.parameters() if p.requires_grad]
    if sum(p.nbytes for p in parameters) > _SMALL_BYTES:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _tell(optimizer, "train")
            optimizer.step()
    except Exception as error:
        if "dense" in str(error) and "sparse" in f"{type(optimizer).__name__} {error}".lower():
            raise ModelError(
                f"The optimizer {type(optimizer).__name__} cannot step: {describe_error(error)}",
                cause="it wants sparse gradients, and workers add gradients up as dense ones",
                remedy="use its sibling for dense gradients, such as torch.optim.Adam",
            ) from error
        raise ModelError(
            f"The optimizer {type(optimizer).__name__} cannot step: {describe_error(error)}",
            where=listing(places_of(error)),
            remedy="let it make a step with one batch in this notebook until it works",
        ) from error
    finally:
        for parameter in parameters:
            parameter.grad = None


def _tell(optimizer: torch.optim.Optimizer, mode: str) -> None:
    tell = getattr(optimizer, mode, None)
    if callable(tell):
        tell()


# --- schedules


def _check_schedule(
    factory: Any, optimizer: torch.optim.Optimizer, steps: int, per_epoch: int, every: str
) -> Iterator[str]:
    """Refuse a schedule that cannot be stepped as it will be; says where it was made for something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = _made(factory, optimizer, "scheduler")
    if not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ModelError(
            f"The scheduler function returned {brief(schedule)}, which is no torch.optim.lr_scheduler.LRScheduler.",
            cause="a schedule of your own, or a function that returns something else",
            remedy="a rule of your own, as factors of the learning rate: lambda o: "
            "torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)); or derive the class from LRScheduler",
        )
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ModelError(
            f"The scheduler function returned {brief(schedule)}, which cannot be stepped without a metric.",
            remedy="use a scheduler that follows steps or epochs: lambda o: torch.optim.lr_scheduler.StepLR(o, 10)",
        )
    epochs = steps // per_epoch
    times, other = (steps, "epoch") if every == "step" else (epochs, "step")
    for name, length, kind in lengths_of(schedule):
        made_for = f"{name} was made for {length:,} steps of the schedule"
        if kind == "bound" and times > length:
            raise ModelError(
                f"{made_for} and cannot make more, but would be stepped {times:,} times, once every {every}.",
                remedy=f"make it for {times}; or scheduler_every={other!r}",
            )
        by_steps = every == "epoch" and 0 < 2 * times < length and steps <= 2 * length <= 4 * steps
        by_epochs = every == "step" and kind == "returns" and 2 * length <= times and length <= 2 * epochs <= 4 * length
        if by_steps or by_epochs:
            what = "hardly begins" if by_steps else "goes to and fro"
            yield (
                f"{made_for}, but is stepped {times:,} times, once every {every}: it {what}. If that is not meant, "
                f"give scheduler_every={other!r}, or make it for {times:,}."
            )


def lengths_of(schedule: Any) -> Iterator[tuple[str, int, str]]:
    """For how many steps a schedule, and each that it is made of, was made; and what comes then.

    Yields
    ------
    name : str
    length : int
    kind : {"bound", "returns", "stays"}
        It refuses more steps; its rates go back to where they came from; or they stay as they are.
    """
    for part in getattr(schedule, "_schedulers", ()):
        yield from lengths_of(part)
    name = type(schedule).__name__
    if isinstance(schedule, torch.optim.lr_scheduler.OneCycleLR):
        yield name, int(schedule.total_steps), "bound"
    elif not getattr(schedule, "_schedulers", ()):
        for attribute, kind in (("T_max", "returns"), ("total_iters", "stays")):
            with suppress(AttributeError, TypeError, ValueError):
                yield name, int(getattr(schedule, attribute)), kind
    for function in getattr(schedule, "lr_lambdas", ()):  # as Hugging Face's schedules are made
        total = getattr(function, "keywords", {}).get("num_training_steps")
        if isinstance(total, int):
            yield name, total, "stays"


def check_rate_of_schedule(trial: Trial, rate: float) -> None:
    """Refuse a learning rate that a schedule would not begin from.

    Raises
    ------
    ModelError
    """
    if trial.parts.scheduler is None:
        return
    made = trial.parts.optimizer(list(trial.model.parameters()))
    trial.parts.scheduler(made)
    initial = float(made.param_groups[0].get("initial_lr", rate))
    if not math.isclose(initial, rate):
        raise ModelError(
            f"learning_rate is {rate:g}, but the scheduler begins at {initial:g}.",
            cause="a scheduler with rates of its own, such as OneCycleLR or CyclicLR",
            remedy="give the rate to the scheduler, and leave learning_rate= out",
        )
