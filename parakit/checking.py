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
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.data import Samples, leaves, map_tree
from parakit.errors import DataError, InputError, LossError, ModelError
from parakit.gradients import call_model
from parakit.losses import SummedLoss, check_labels, summed
from parakit.rates import AtRate, learning_rate
from parakit.replica import Recipe
from parakit.workers.base import Strategy, Workers

__all__ = [
    "at_rate", "brief", "check_choice", "check_given", "check_optimizer", "check_pool", "check_positive", "check_rate",
    "check_samples", "check_strategy", "check_travels", "check_whole", "own_copy", "pickled", "plain", "try_out",
]  # fmt: skip

_PROBE_ROWS = 8
_PROBE_LABELS = 64
_BRIEF = 80
# torch can hold these, but not pick rows of them.
_NO_ROWS = (torch.uint16, torch.uint32, torch.uint64)


def brief(value: Any) -> str:
    """A value as a message can show it: one line, and no long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def plain(value: Any) -> Any:
    """A number of numpy, or a tensor of a single one, as a number of Python; anything else as it is."""
    single = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0)
    return value.item() if single else value


def check_whole(name: str, value: Any, least: int, *, none: bool = False) -> None:
    """Refuse what is no whole number, or a smaller one; None may be allowed."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            f"{name} is {brief(value)}; it must be a whole number of at least {least}{', or None' if none else ''}."
        )


def check_positive(name: str, value: Any, *, none: bool = False) -> None:
    """Refuse what is no number above 0; None may be allowed."""
    if none and value is None:
        return
    known = isinstance(value, int | float) and not isinstance(value, bool)
    too_large = known and sys.float_info.max < value < math.inf  # an int that no float can hold
    if not known or not value > 0 or too_large:
        within = " and below 1e308" if too_large else ""
        raise InputError(f"{name} is {brief(value)}; it must be a number above 0{within}{', or None' if none else ''}.")


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
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {brief(value)}; it must be one of {', '.join(map(repr, choices))}.")


def check_pool(on: Any) -> Workers:
    """Refuse what is no pool, or one that was closed."""
    if not isinstance(on, Workers):
        raise InputError(
            f"on is {brief(on)}, which is no pool of workers.",
            remedy='connect first: workers = parakit.connect(2), then on=workers; or parakit.connect("inline")',
        )
    on.check_open()
    return on


def check_on_cores(on: Workers, what: str) -> None:
    """Refuse a pool whose workers compute on GPUs, for what measures cores."""
    if on.device != "cpu":
        raise InputError(
            f"{what} measures what the cores of a machine do, but these workers compute on GPUs.",
            remedy='connect(..., device="cpu"); on GPUs, let a run go on and resize it: its panel shows the speedup',
        )


def check_strategy(strategy: Any) -> None:
    """Refuse what is no strategy."""
    if strategy is None:
        return
    if isinstance(strategy, type) or not callable(getattr(strategy, "step", None)):
        raise InputError(
            f"The strategy is {brief(strategy)}, which has no step(team, step) to call.",
            remedy="give an instance, such as parakit.strategies.AllReduce()",
        )
    check_choice("strategy.runs_on", getattr(strategy, "runs_on", None), ("workers", "driver"))


def check_given(model: Any, data: Any) -> None:
    """Refuse what is often given for data by mistake, where more can be said than that it cannot be read."""
    if isinstance(data, nn.Module):
        raise DataError(
            f"data is {brief(data)}, a model.",
            cause="" if isinstance(model, nn.Module) else "model and data are swapped",
            remedy="the model comes first, then the data",
        )
    if isinstance(data, type):
        raise DataError(f"data is the class {data.__name__}.", remedy=f"give an instance: {data.__name__}(...)")
    if not isinstance(data, tuple | list) or len(data) != 2:
        return
    for name, part in zip(("inputs", "targets"), data, strict=True):
        first = part
        while isinstance(first, list) and first:
            first = first[0]
        if isinstance(part, list) and isinstance(first, int | float | str):
            raise DataError(
                f"The {name} of data are a list of {len(part)} {type(part[0]).__name__}s, not a tensor.",
                remedy=f"{name} = torch.tensor({name}), or numpy.array({name})",
            )


def check_samples(samples: Samples, what: str = "data") -> None:
    """Refuse tensors of which torch cannot pick rows."""
    for leaf in leaves((samples.inputs, samples.targets)):
        kind = str(leaf.dtype if leaf.layout is torch.strided else leaf.layout).removeprefix("torch.")
        if leaf.layout is not torch.strided or leaf.dtype in _NO_ROWS:
            raise DataError(
                f"{what} has a {kind} tensor of shape {tuple(leaf.shape)}, of which torch cannot pick rows.",
                remedy="tensor.to_dense()" if kind.startswith("sparse") else "targets.long(), or inputs.float()",
            )


def own_copy(model: Any, *, training: bool = True) -> nn.Module:
    """A copy of the user's model on the CPU, checked for being trainable."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model is {brief(model)}, which is no torch.nn.Module.",
            remedy=_remedy_for_no_model(model),
        )
    try:
        own = copy.deepcopy(model).cpu()
    except Exception as error:
        raise ModelError(
            f"The model {type(model).__name__} cannot be copied: {_told(error)}",
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


def _remedy_for_no_model(given: Any) -> str:
    if isinstance(given, type):
        return "give an instance, not a class: Model(), not Model"
    if isinstance(getattr(given, "model", None), nn.Module):
        return "give the model that it holds: run.model"
    if callable(given):
        return "write a class Model(torch.nn.Module) whose forward does this, and give Model()"
    return "give a model such as torch.nn.Linear(64, 10)"


def _told(error: Exception) -> str:
    """An error of somebody else's in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if len(text) <= 300 else f"{type(error).__name__}: {text[:300]}..."


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
            _check_kind_of_labels(loss, still, samples.targets)
            check_labels(loss, still, samples.targets, "data")
            if held_out is not None:
                check_labels(loss, still, held_out.targets, "validation")
            loss_sum = summed(loss, still, probe.targets)
            if training:
                total, _ = loss_sum(output, probe.targets)
                _backward(total)
        if held_out is not None:
            _try_held_out(trial.eval(), loss_sum, held_out.slice(0, _PROBE_ROWS), probe)
    return loss_sum


def _check_kind_of_labels(loss: Any, output: Any, targets: Any) -> None:
    """Refuse one number a sample that is meant as a class, in a type that torch does not take for one."""
    if not isinstance(targets, Tensor) or not isinstance(output, Tensor) or output.ndim != targets.ndim + 1:
        return
    classes, dtype = output.shape[1], str(targets.dtype).removeprefix("torch.")
    if targets.dtype in (torch.int64, torch.uint8) or classes < 2:
        return
    by_class = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or loss in (F.cross_entropy, F.nll_loss)
    if by_class or isinstance(loss, nn.MSELoss):
        name = getattr(loss, "__name__", type(loss).__name__)
        takes = "them as int64" if by_class else "as many numbers as the model gives"
        raise DataError(
            f"The targets are {dtype} of shape {tuple(targets.shape)}, but the model gives {classes} numbers for each.",
            cause=f"class labels as {dtype}; {name} takes {takes}",
            remedy='targets.long(), or targets.astype("int64") in numpy; for targets that are no classes, '
            "a model with one output",
        )


def _try_held_out(model: nn.Module, loss: SummedLoss, held_out: Samples, probe: Samples) -> None:
    try:
        loss(call_model(model, held_out.inputs), held_out.targets)
    except Exception as error:
        raise DataError(
            f"validation does not go through the model and the loss: {_told(error)}",
            cause=f"it holds {_forms(held_out)}, while data holds {_forms(probe)}",
            remedy="give validation the same columns and types as data",
        ) from error


def _forms(samples: Samples) -> str:
    """What a row is, in inputs and targets."""
    kinds = [
        f"{str(leaf.dtype).removeprefix('torch.')} rows of shape {tuple(leaf.shape[1:])}"
        for leaf in leaves((samples.inputs, samples.targets))
    ]
    return " and ".join(kinds)


def _probe_rows(targets: Any) -> Tensor:
    """A few rows, among them one of each label, so that weights and ignored labels show."""
    first = leaves(targets)[0]
    rows = torch.arange(min(_PROBE_ROWS, len(first)))
    if first.is_floating_point() or first.is_complex():
        return rows
    labels = first.reshape(len(first), -1)[:, 0]
    one_each: list[int] = []
    others = torch.ones(len(labels), dtype=torch.uint8)
    while len(labels) and others[place := int(others.argmax())]:  # the first of a label not seen yet
        one_each.append(place)
        if len(one_each) > _PROBE_LABELS:
            return rows
        others &= labels != labels[place]  # some passes are cheaper than to sort all labels
    chosen: Tensor = torch.cat([rows, torch.tensor(one_each, dtype=torch.int64)]).unique()
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
            f"The model cannot compute a batch of {len(probe)} samples: {_told(error)}",
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
            f"The loss has no gradient: {_told(error)}",
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
    made_already = isinstance(recipe.optimizer, torch.optim.Optimizer)
    if not callable(recipe.optimizer) or made_already:
        given = f"{type(recipe.optimizer).__name__}, made already" if made_already else brief(recipe.optimizer)
        raise ModelError(
            f"optimizer is {given}, but must be a function that makes one.",
            cause="each worker needs an optimizer of its own, over its own copy of the parameters",
            remedy="optimizer=lambda p: torch.optim.SGD(p, lr=0.1)",
        )
    parameters = list(trial.parameters())
    made = _made(recipe.optimizer, parameters, "optimizer")
    if not isinstance(made, torch.optim.Optimizer):
        raise ModelError(
            f"The optimizer function returned {brief(made)}, which is no torch.optim.Optimizer.",
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
            f"The scheduler function returned {brief(schedule)}, which cannot be stepped without a metric.",
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


_EXAMPLES = {
    "optimizer": "lambda p: torch.optim.SGD(p, lr=0.1)",
    "scheduler": "lambda o: torch.optim.lr_scheduler.StepLR(o, 10)",
}


def _made(factory: Any, argument: Any, name: str) -> Any:
    if not callable(factory):
        raise ModelError(
            f"{name} is {brief(factory)}, but must be a function that makes one.", remedy=f"{name}={_EXAMPLES[name]}"
        )
    try:
        return factory(argument)
    except Exception as error:
        given = "the list of parameters" if name == "optimizer" else "the optimizer"
        raise ModelError(
            f"The {name} function raised {_told(error)}",
            cause=f"it is called with {given}, and with nothing else",
            remedy=f"{name}={_EXAMPLES[name]}, say",
        ) from error


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
            f"The {what} cannot be pickled, so it cannot travel to the workers: {_told(error)}",
            cause="it holds something that lives in this process only, such as a lock, a file or a generator",
            remedy="create such things in forward, or leave them out in __getstate__"
            if what == "model"
            else f"create such things inside the {what}, where they are used",
        ) from error
