"""`train` and `evaluate`: from what a user gives to a checked plan, so that mistakes surface at the call."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from parakit.chunks import DEFAULT_CHUNKS, EpochOrder, Ownership, chunk_count, cut
from parakit.conducting import Plan
from parakit.data import Samples, leaves, map_tree, pack, unpack
from parakit.errors import DataError, InputError, LossError, ModelError
from parakit.evaluation import Evaluation, Tally, tally
from parakit.events import History, RunStart
from parakit.gradients import call_model
from parakit.losses import SummedLoss, check_labels, summed
from parakit.replica import OptimizerFactory, Recipe, SchedulerFactory
from parakit.run import Run, check_chunks
from parakit.strategies import AllReduce
from parakit.workers.base import Job, Roster, Strategy, Workers

__all__ = ["evaluate", "train"]

_DEFAULT_BATCH = 256
_PROBE_ROWS = 8
_PROBE_LABELS = 64


def train(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    workers: int | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    scheduler_every: str = "epoch",
    clip_norm: float | None = None,
    strategy: Strategy | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    validation: Any = None,
    seed: int = 0,
    chunks: int = DEFAULT_CHUNKS,
    limit_seconds: float = 30.0,
) -> Run:
    """Train a model on workers; returns at once.

    The loss curve is that of one process with the same seed, whatever the number of workers and however often it
    changes; only speed differs. What depends on the batch as one process sees it (statistics of batch normalisation,
    dropout masks) depends on the worker count.

    Parameters
    ----------
    model : nn.Module
        Any model, also one whose class was defined in a notebook. It is copied, never changed.
    data : (inputs, targets) or torch Dataset
        Tensors or numpy arrays, rows first; inputs may also be a tuple or dict of them, which the model gets as
        arguments. The items of a Dataset are pairs (input, target), read once.
    on : Workers
        From `parakit.connect`.
    workers : int, optional
        How many to begin with; all of the pool by default.
    loss : callable, optional
        Takes (output, target) and returns a mean or a sum over samples. Default: cross entropy for integer targets,
        mean squared error otherwise.
    optimizer : callable, optional
        Makes a torch optimizer from the list of the model's parameters. Default: SGD, rate 0.05, momentum 0.9.
    scheduler : callable, optional
        Makes a torch learning-rate scheduler from the optimizer.
    scheduler_every : {"epoch", "step"}
        When the scheduler steps.
    clip_norm : float, optional
        Largest 2-norm of the global gradient.
    strategy : Strategy, optional
        Default: `parakit.strategies.AllReduce()`.
    batch_size : int, optional
        Rows in a global batch, shared by all workers; the last batch of an epoch may be smaller. Default: 256, or
        all rows if there are fewer.
    epochs, steps : int, optional
        How long to train; give one of them. Default: one epoch.
    validation : as data, optional
        Evaluated by the workers at the end of each epoch.
    seed : int
        Fixes the shuffle, the order of each epoch, and what the model draws at random.
    chunks : int
        The most pieces to cut the data into; fewer for small batches. Workers share them.
    limit_seconds : float
        The longest that a worker may say nothing beyond what its work should take.

    Returns
    -------
    Run

    Raises
    ------
    DataError, ModelError, LossError, WorkerCountError, InputError
        If an argument cannot be right; nothing was started then.
    PoolError
        If another run is going on on these workers, or they were closed.

    Examples
    --------
    >>> import torch, parakit as pk
    >>> digits = pk.datasets.digits()
    >>> with pk.connect("inline") as workers:
    ...     run = pk.train(torch.nn.Linear(64, 10), digits.train, on=workers, epochs=2).wait(progress=False)
    >>> run.status, run.step
    ('finished', 12)
    """
    pool = _pool(on)
    active = pool.check_count(pool.size if workers is None else workers)
    samples = Samples.of(data)
    held_out = None if validation is None else Samples.of(validation, what="validation")
    batch = _batch_size(batch_size, len(samples))
    _check_choice("scheduler_every", scheduler_every, ("epoch", "step"))
    _check_positive("clip_norm", clip_norm, none=True)
    _check_positive("limit_seconds", limit_seconds)
    _check_whole("seed", seed, 0)
    _check_whole("chunks", chunks, 1)
    _check_strategy(strategy)
    pieces = cut(len(samples), chunk_count(len(samples), batch, chunks), seed)
    check_chunks(active, len(pieces))
    order = EpochOrder(tuple(len(rows) for rows in pieces), batch, seed)
    total = _steps(epochs, steps, order.steps_per_epoch)

    initial = _own_copy(model)
    loss_sum = _try_out(initial, loss or _default_loss(samples.targets), samples, held_out)
    recipe = Recipe(
        initial, loss_sum, optimizer or _default_optimizer, scheduler, scheduler_every, clip_norm, seed, order
    )
    _check_optimizer(recipe)
    chosen = strategy or AllReduce()
    _check_travels(recipe, chosen)

    validation_pieces = _pieces_in_order(held_out)
    job = Job(
        uuid.uuid4().hex[:8], recipe, chosen,
        lambda chunk: samples.take(pieces[chunk]),
        lambda chunk: held_out.take(validation_pieces[chunk]) if held_out is not None else _nothing(),
        float(limit_seconds),
    )  # fmt: skip
    members = pool.names[:active]
    roster = _roster(members, order, validation_pieces)
    start = RunStart(
        0.0, repr(chosen), members, pool.kind, pool.cores, pool.threads,
        sum(p.numel() for p in initial.parameters() if p.requires_grad), len(samples), len(pieces), batch, total,
        order.steps_per_epoch, seed,
    )  # fmt: skip
    return Run(Plan(job, roster, active, total, start), pool, History())


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    loss: Callable[[Any, Any], Tensor] | None = None,
    limit_seconds: float = 300.0,
) -> Evaluation:
    """Loss and accuracy of a model on some data, computed by all workers of a pool.

    Parameters
    ----------
    model : nn.Module
    data : as for `train`
    on : Workers
    loss : callable, optional
        As for `train`.
    limit_seconds : float
        The longest to wait.

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError, ModelError, LossError
        If model, data and loss do not fit together.
    WorkerLost
        If the workers do not answer in time.
    """
    pool = _pool(on)
    samples = Samples.of(data)
    _check_positive("limit_seconds", limit_seconds)
    own = _own_copy(model, training=False)
    loss_sum = _try_out(own, loss or _default_loss(samples.targets), samples, None, training=False)
    shares = torch.arange(len(samples)).tensor_split(min(pool.size, len(samples)))
    blob = _dumps((own, loss_sum), "model")
    items = [(blob, _packed(samples.take(rows))) for rows in shares]
    tallies: list[Tally] = pool.map(_tally_packed, items, limit_seconds)
    return sum(tallies, Tally()).result()


def _tally_packed(item: tuple[bytes, Samples]) -> Tally:
    model, loss = cloudpickle.loads(item[0])
    return tally(model, loss, Samples(unpack(item[1].inputs), unpack(item[1].targets)))


def _packed(samples: Samples) -> Samples:
    return Samples(pack(samples.inputs), pack(samples.targets))


def _pool(on: Any) -> Workers:
    if not isinstance(on, Workers):
        raise InputError(
            f"on is {on!r}, which is no pool of workers.",
            remedy='connect first: workers = parakit.connect(2), then on=workers; or parakit.connect("inline")',
        )
    on.check_open()
    return on


def _batch_size(batch_size: int | None, samples: int) -> int:
    if batch_size is None:
        return min(_DEFAULT_BATCH, samples)
    _check_whole("batch_size", batch_size, 1)
    if batch_size > samples:
        raise DataError(
            f"A batch of {batch_size} is larger than the data, which has {samples} samples.",
            remedy=f"choose batch_size from 1 to {samples}",
        )
    return batch_size


def _steps(epochs: int | None, steps: int | None, per_epoch: int) -> int:
    if epochs is not None and steps is not None:
        raise InputError(f"epochs={epochs} and steps={steps} were both given.", remedy="give one of them")
    if steps is not None:
        _check_whole("steps", steps, 1)
        return steps
    if epochs is not None:
        _check_whole("epochs", epochs, 1)
    return (epochs or 1) * per_epoch


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def _check_positive(name: str, value: Any, *, none: bool = False) -> None:
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{name} is {value!r}; it must be a number above 0{', or None' if none else ''}.")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}.")


def _check_strategy(strategy: Any) -> None:
    if strategy is None:
        return
    if isinstance(strategy, type) or not callable(getattr(strategy, "step", None)):
        raise InputError(
            f"The strategy is {strategy!r}, which has no step(team, step) to call.",
            remedy="give an instance, such as parakit.strategies.AllReduce()",
        )
    _check_choice("strategy.runs_on", getattr(strategy, "runs_on", None), ("workers", "driver"))


def _own_copy(model: Any, *, training: bool = True) -> nn.Module:
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


def _default_loss(targets: Any) -> nn.Module:
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    return nn.CrossEntropyLoss() if whole else nn.MSELoss()


def _default_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _try_out(
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


def _check_optimizer(recipe: Recipe) -> None:
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
    if recipe.scheduler is None:
        return
    schedule = _made(recipe.scheduler, made, "scheduler")
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) or not isinstance(
        schedule, torch.optim.lr_scheduler.LRScheduler
    ):
        raise ModelError(
            f"The scheduler function returned {_brief(schedule)}, which cannot be stepped without a metric.",
            remedy="use a scheduler that follows steps or epochs: lambda o: torch.optim.lr_scheduler.StepLR(o, 10)",
        )


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80].splitlines()[0]


def _made(factory: Any, argument: Any, name: str) -> Any:
    if not callable(factory):
        raise ModelError(f"{name} is {_brief(factory)}, but must be a function that makes one.")
    try:
        return factory(argument)
    except Exception as error:
        raise ModelError(f"The {name} function raised {type(error).__name__}: {error}") from error


def _check_travels(recipe: Recipe, strategy: Strategy) -> None:
    for what, part in (
        ("model", recipe.model), ("loss", recipe.loss), ("optimizer", recipe.optimizer),
        ("scheduler", recipe.scheduler), ("strategy", strategy),
    ):  # fmt: skip
        _dumps(part, what)


def _dumps(value: Any, what: str) -> bytes:
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise ModelError(
            f"The {what} cannot be pickled, so it cannot travel to the workers: {type(error).__name__}: {error}",
            cause="it holds something that lives in this process only, such as a lock, a file or a generator",
            remedy="create such things in forward, or leave them out in __getstate__",
        ) from error


def _pieces_in_order(held_out: Samples | None) -> list[Tensor]:
    if held_out is None:
        return []
    return list(torch.arange(len(held_out)).tensor_split(min(DEFAULT_CHUNKS, len(held_out))))


def _nothing() -> Samples:
    raise InputError("This run has no validation data.")


def _roster(members: Sequence[str], order: EpochOrder, validation: Sequence[Tensor]) -> Roster:
    training = Ownership.share_out(order.sizes, members)
    if not validation:
        return Roster(0, training, None)
    sizes = [len(piece) for piece in validation]
    return Roster(0, training, Ownership.share_out(sizes, members[: len(sizes)]))
