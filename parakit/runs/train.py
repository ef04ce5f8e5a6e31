"""`train` and `evaluate`: from what a user gives to a checked plan, so that mistakes surface at the call."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parakit.engines.recipe import OptimizerFactory, SchedulerFactory
from parakit.errors import InputError
from parakit.events.history import History
from parakit.runs.plan import Saving
from parakit.runs.planning import plan
from parakit.runs.run import Run
from parakit.strategies.base import Strategy
from parakit.workers.pool import Workers

__all__ = ["train"]

_saving_runs: weakref.WeakSet[Run] = weakref.WeakSet()


def train(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    workers: int | None = None,
    threads: int | None = None,
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
    chunks: int | None = None,
    limit_seconds: float = 10.0,
    on_nonfinite: str = "stop",
    gather: bool = False,
    buffers: Mapping[str, str] | None = None,
    check: bool | float = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    checkpoint_keep: int = 3,
    resume: Any = None,
) -> Run:
    """Train a model on workers; returns at once.

    The loss curve is that of one process with the same seed, whatever the number of workers and however often it
    changes; only speed differs. What depends on the batch as one process sees it (statistics of batch normalisation
    that is not synchronised, dropout masks) depends on the worker count. What would differ otherwise is refused, here
    or, where it shows later, by a run that stops in words.

    Parameters
    ----------
    model : nn.Module
        Any model, also one whose class was defined in a notebook. It is copied, never changed. Each of its modules
        trains in the mode in which it is given: parts in ``eval()`` stay so.
    data : (inputs, targets) or torch Dataset
        Tensors or numpy arrays, rows first; inputs may also be a tuple or dict of them, which the model gets as
        arguments. The items of a Dataset are pairs (input, target), read once.
    on : Workers
        From `parakit.connect`.
    workers : int, optional
        How many to begin with; all of the pool by default.
    threads : int, optional
        Threads that torch uses in each worker, the same for every worker count. Default: as the pool was connected.
    loss : callable, optional
        Takes (output, target) and returns a mean or a sum over samples, or a pair ``(sum, count)``, both of which are
        added up over the workers before they are divided. It may know the model: a penalty over its parameters is one
        over those of the copy that is trained. Default: cross entropy for integer targets, mean squared error
        otherwise.
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
    chunks : int, optional
        The most pieces to cut the data into; fewer for small batches. Workers share them. Default: 64; as many as there
        are workers, where more are simulated.
    limit_seconds : float
        How long a worker may give no sign of life before it is treated as dead; also how long its code may make no
        progress, or ten times a step where that is longer. Lost workers are replaced by those that are left, and by
        others when they come; the loss curve is the same as if nothing had happened.
    on_nonfinite : {"stop", "continue"}
        What to do when the loss or a parameter is NaN or infinite: stop the run at that step and keep the last good
        state, or go on all the same.
    gather : bool
        Whether the loss gets the outputs and targets of the whole batch, on each worker, with gradients: for losses
        that compare samples. Every tensor of an output then has a row for each sample.
    buffers : dict of str to str, optional
        What becomes of buffers that forward changes by the rows it sees: "mean", "sum", "max", "min", "first" (that of
        rank 0) or "own" (each worker's), by name or by a pattern such as ``"*.queue"``.
    check : bool or float
        How much of the time to spend on checking that a share adds up of its parts, 0 to 1. True is 0.01, False is 0:
        then a worker's share is taken for a batch of its own.
    checkpoint : str or path, optional
        A folder, or a URL that fsspec knows, to save the state to: plain tensors and JSON. One run at a time saves to
        a folder.
    checkpoint_seconds : float
        How often to save; the state of the end is saved too.
    checkpoint_keep : int
        How many checkpoints to keep.
    resume : Run, str or path, optional
        Where to go on from: a run that has ended, or a checkpoint (file, or folder with its newest). Model, data and
        options must be as they were then; workers, strategy and kind of pool may be others. `epochs` and `steps` count
        from the very beginning. With `learning_rate`, the run goes on at that rate.

    Returns
    -------
    Run

    Raises
    ------
    DataError, ModelError, LossError, WorkerCountError, InputError
        If an argument cannot be right; nothing was started then.
    PoolError
        If another run is going on on these workers, or they were closed.
    CheckpointError
        If there is no checkpoint to resume from, it is damaged, or it does not fit; it says in what.

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
        model, data, on=on, workers=workers, threads=threads, loss=loss, optimizer=optimizer,
        learning_rate=learning_rate, scheduler=scheduler, scheduler_every=scheduler_every, clip_norm=clip_norm,
        strategy=strategy, batch_size=batch_size, epochs=epochs, steps=steps, validation=validation, seed=seed,
        chunks=chunks, limit_seconds=limit_seconds, on_nonfinite=on_nonfinite, gather=gather, buffers=buffers,
        check=check, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, checkpoint_keep=checkpoint_keep,
        resume=resume,
    )  # fmt: skip
    _check_only_writer(checked.saving)
    run = Run(checked, on, History())
    if checked.saving is not None:
        _saving_runs.add(run)
    return run


def _check_only_writer(saving: Saving | None) -> None:
    """Refuse a folder that a run of this process is saving to."""
    if saving is None:
        return
    place = _absolute(saving.checkpoints.place)
    going = [run for run in list(_saving_runs) if run.status in ("running", "paused")]
    for other in going:
        theirs = other.plan.saving
        if theirs is not None and _absolute(theirs.checkpoints.place) == place:
            raise InputError(
                f"Another run, {other.status} at step {other.step} of {other.steps}, saves its checkpoints to "
                f"{str(saving.checkpoints.place)!r} too.",
                cause="two runs in one folder would remove each other's checkpoints",
                remedy="give each run a folder of its own, or end the other one first: run.stop(), run.wait()",
            )


def _absolute(place: Any) -> str:
    text = os.fspath(place)
    return text if "://" in text else str(Path(text).expanduser().resolve())
