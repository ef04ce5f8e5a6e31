"""`train` and `evaluate`: from what a user gives to a checked plan, so that mistakes surface at the call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from parakit.checking import (
    at_rate,
    check_choice,
    check_optimizer,
    check_positive,
    check_rate,
    check_strategy,
    check_travels,
    check_whole,
    own_copy,
    pickled,
    try_out,
)
from parakit.chunks import DEFAULT_CHUNKS, EpochOrder, Ownership, chunk_count, cut
from parakit.conducting import Plan
from parakit.data import Samples
from parakit.errors import DataError, InputError
from parakit.evaluation import Evaluation, Tally, tally
from parakit.events import History, RunStart
from parakit.replica import OptimizerFactory, Recipe, SchedulerFactory
from parakit.run import Run, check_chunks
from parakit.strategies import AllReduce
from parakit.workers.base import Job, Roster, Strategy, Workers

__all__ = ["evaluate", "plan", "train"]

_DEFAULT_BATCH = 256


def train(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    workers: int | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    learning_rate: float | None = None,
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
    learning_rate : float, optional
        Rate to begin with, in place of the optimizer's own: that of its first parameter group, with which the others
        scale. `Run.set_learning_rate` changes it in mid-run.
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
    checked = plan(
        model, data, on=on, workers=workers, loss=loss, optimizer=optimizer, learning_rate=learning_rate,
        scheduler=scheduler, scheduler_every=scheduler_every, clip_norm=clip_norm, strategy=strategy,
        batch_size=batch_size, epochs=epochs, steps=steps, validation=validation, seed=seed, chunks=chunks,
        limit_seconds=limit_seconds,
    )  # fmt: skip
    return Run(checked, on, History())


def plan(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    workers: int | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: OptimizerFactory | None = None,
    learning_rate: float | None = None,
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
) -> Plan:
    """Check what `train` is given, and plan the run without starting it; parameters and errors as for `train`."""
    pool = _pool(on)
    active = pool.check_count(pool.size if workers is None else workers)
    samples = Samples.of(data)
    held_out = None if validation is None else Samples.of(validation, what="validation")
    batch = _batch_size(batch_size, len(samples))
    check_choice("scheduler_every", scheduler_every, ("epoch", "step"))
    check_positive("clip_norm", clip_norm, none=True)
    check_positive("limit_seconds", limit_seconds)
    check_whole("seed", seed, 0)
    check_whole("chunks", chunks, 1)
    check_strategy(strategy)
    pieces = cut(len(samples), chunk_count(len(samples), batch, chunks), seed)
    check_chunks(active, len(pieces))
    order = EpochOrder(tuple(len(rows) for rows in pieces), batch, seed)
    total = _steps(epochs, steps, order.steps_per_epoch)

    initial = own_copy(model)
    loss_sum = try_out(initial, loss or _default_loss(samples.targets), samples, held_out)
    recipe = Recipe(
        initial, loss_sum, optimizer or _default_optimizer, scheduler, scheduler_every, clip_norm, seed, order
    )
    rate = check_optimizer(recipe)
    if learning_rate is not None:
        check_rate("learning_rate", learning_rate, rate)
        rate = float(learning_rate)
        recipe = at_rate(recipe, rate)
    chosen = strategy or AllReduce()
    check_travels(recipe, chosen)

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
    return Plan(job, roster, active, total, start, rate)


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
    check_positive("limit_seconds", limit_seconds)
    own = own_copy(model, training=False)
    loss_sum = try_out(own, loss or _default_loss(samples.targets), samples, None, training=False)
    shares = torch.arange(len(samples)).tensor_split(min(pool.size, len(samples)))
    blob = pickled((own, loss_sum), "model")
    items = [(blob, samples.take(rows).packed()) for rows in shares]
    tallies: list[Tally] = pool.map(_tally_packed, items, limit_seconds)
    return sum(tallies, Tally()).result()


def _tally_packed(item: tuple[bytes, Samples]) -> Tally:
    model, loss = cloudpickle.loads(item[0])
    return tally(model, loss, item[1].unpacked())


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
    check_whole("batch_size", batch_size, 1)
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
        check_whole("steps", steps, 1)
        return steps
    if epochs is not None:
        check_whole("epochs", epochs, 1)
    return (epochs or 1) * per_epoch


def _default_loss(targets: Any) -> nn.Module:
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    return nn.CrossEntropyLoss() if whole else nn.MSELoss()


def _default_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


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
