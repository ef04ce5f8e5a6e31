"""From what a user gives to a checked plan, so that mistakes surface at the call."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parakit.checkpoints import Checkpoint, Checkpoints, check_fits, check_plain, load
from parakit.data.chunks import DEFAULT_CHUNKS, EpochOrder, check_chunks, chunk_count, cut
from parakit.data.ownership import ChunkAssignment
from parakit.data.samples import Samples
from parakit.engines.make import make_engine
from parakit.engines.memory_needs import check_fits_memory, needs_of
from parakit.engines.optimizers import AtRate
from parakit.engines.recipe import OptimizerFactory, Parts, Recipe, SchedulerFactory, Traits
from parakit.errors import CheckpointError, DataError, InputError
from parakit.events.records import RunStart
from parakit.model_state.buffers import check_rules
from parakit.preflight import Trial, Wanted, check_model, frozen_parts, traits_of
from parakit.preflight.optimizers import check_optimizer, check_rate_of_schedule
from parakit.runs.arguments import check_given, check_pool, check_samples, check_strategy
from parakit.runs.identity import identity_of
from parakit.runs.plan import Plan, Resumption, Saving
from parakit.runs.run import Run
from parakit.strategies import AllReduce
from parakit.strategies.base import Strategy
from parakit.system.process_settings import Settings, foreign_hooks
from parakit.validation import brief, check_choice, check_positive, check_rate, check_whole, plain
from parakit.workers.assignment import GroupAssignment
from parakit.workers.pool import Workers
from parakit.workers.session import Job

__all__ = ["plan"]

_DEFAULT_BATCH = 256
_USUAL_CHECK = 0.01


def plan(
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
) -> Plan:
    """Check what `train` is given, and plan the run without starting it; parameters and errors as for `train`."""
    pool = check_pool(on)
    # Loops over numpy's ranges give numpy's numbers.
    workers, threads, batch_size, epochs, steps = map(plain, (workers, threads, batch_size, epochs, steps))
    seed, chunks, checkpoint_keep, checkpoint_seconds = map(plain, (seed, chunks, checkpoint_keep, checkpoint_seconds))
    learning_rate, clip_norm, limit_seconds = map(plain, (learning_rate, clip_norm, limit_seconds))
    active = pool.check_count(pool.size if workers is None else workers)
    _check_threads(threads, pool)
    check_positive("checkpoint_seconds", checkpoint_seconds)
    check_whole("checkpoint_keep", checkpoint_keep, 1)
    samples = _samples(model, data)
    held_out = None if validation is None else Samples.of(validation, what="validation")
    batch = _batch_size(batch_size, len(samples))
    check_choice("scheduler_every", scheduler_every, ("epoch", "step"))
    check_positive("clip_norm", clip_norm, none=True)
    check_positive("limit_seconds", limit_seconds)
    check_choice("on_nonfinite", on_nonfinite, ("stop", "continue"))
    check_whole("seed", seed, 0)
    wanted = Wanted(check_rules(buffers), _flag("gather", gather), checks=_share_of_time(plain(check)) > 0)
    chunks = pool.chunks if chunks is None else chunks
    check_whole("chunks", chunks, 1)
    check_strategy(strategy)
    chosen = strategy or AllReduce()
    _check_exchange(chosen, pool)
    pieces = cut(len(samples), chunk_count(len(samples), batch, chunks), seed)
    check_chunks(active, len(pieces))
    order = EpochOrder(tuple(len(rows) for rows in pieces), batch, seed)
    total = _steps(epochs, steps, order.steps_per_epoch)

    check_model(model)
    own_loss = _default_loss(samples.targets) if loss is None else loss
    factory = _default_optimizer if optimizer is None else optimizer
    if learning_rate is not None and resume is None:
        factory = AtRate(factory, learning_rate)
    _warn_of_hooks(4)
    _warn_of_modes(model, 4)
    trial = Trial(frozen_parts(Parts(model, own_loss, factory, scheduler, chosen)), samples, (batch,))
    traits = traits_of(trial, wanted, model, held_out)
    optimizing = check_optimizer(trial, total, order.steps_per_epoch, scheduler_every)
    rate = optimizing.rate
    for note in optimizing.notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    if learning_rate is not None:
        check_rate("learning_rate", learning_rate, rate)
        rate = float(learning_rate)
        if resume is None:
            check_rate_of_schedule(trial, rate)
    recipe = Recipe(
        trial.frozen, replace(traits, closure=optimizing.closure), scheduler_every, clip_norm, seed, order,
        on_nonfinite == "stop", Settings.here(), _share_of_time(plain(check)),
    )  # fmt: skip
    _check_meets(recipe.traits, chosen)
    identity = identity_of(recipe, trial.parts, samples)
    parameters = sum(p.numel() for p in trial.model.parameters() if p.requires_grad)
    if not pool.simulated and pool.device == "cpu":
        divided = "divided" in pool.exchange_of(chosen)
        needs = needs_of(trial.model, optimizing.states, active, divided=divided, in_turns=pool.in_turns)
        check_fits_memory(needs, parameters, pool.memory_limits, here=pool.maps_memory)
    del trial  # its copy of the model is not held while the run goes on
    resumption = None if resume is None else _resumption(resume, identity, total, learning_rate)
    saving = None if checkpoint is None else Saving(Checkpoints(checkpoint, keep=checkpoint_keep), checkpoint_seconds)
    if saving is not None:
        check_plain(make_engine(recipe).live_state())

    validation_pieces = _pieces_in_order(held_out, batch if recipe.traits.gather else None)
    job = Job(
        uuid.uuid4().hex[:8], recipe, chosen,
        lambda chunk: samples.take(pieces[chunk]),
        lambda chunk: held_out.take(validation_pieces[chunk]) if held_out is not None else _nothing(),
        float(limit_seconds), threads, pieces,
    )  # fmt: skip
    if active > pool.size:  # virtual workers, which come into being when they are needed
        pool.grow(active)
    members = pool.names[:active]
    assignment = _assignment(members, order, validation_pieces)
    start = RunStart(
        0.0, repr(chosen), members, pool.kind, pool.cores, threads or pool.threads, parameters, len(samples),
        len(pieces), batch, total, order.steps_per_epoch, seed, pool.exchange_of(chosen), pool.simulated, pool.device,
    )  # fmt: skip
    return Plan(job, assignment, active, total, start, rate, identity, resumption, saving, optimizing.notes)


def _warn_of_hooks(level: int) -> None:
    there = foreign_hooks()
    if there:
        warnings.warn(
            f"This process has {there} hooks for all modules or optimizers (register_module_forward_hook and the "
            "like). They belong to no model, so workers do not call them.",
            UserWarning,
            stacklevel=level,
        )


def _warn_of_modes(model: nn.Module, level: int) -> None:
    modules = list(model.modules())
    minding = [module for module in modules if _minds_its_mode(module)]
    if minding and not any(module.training for module in modules):
        warnings.warn(
            f"The whole model is in evaluation mode, and is trained so: {len(minding)} of its modules, such as "
            f"{type(minding[0]).__name__}, do not do what they do in training. If that is not meant, call "
            "model.train() first.",
            UserWarning,
            stacklevel=level,
        )


def _minds_its_mode(module: nn.Module) -> bool:
    """Whether a layer of torch's does something else in training."""
    known = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, known) or bool(getattr(module, "dropout", 0.0) and isinstance(module, nn.RNNBase))


def _resumption(resume: Any, identity: dict[str, Any], total: int, rate: float | None) -> Resumption:
    """Where to go on from: a run that has ended, or a checkpoint."""
    if isinstance(resume, Run):
        state, found, source = resume.kept_state(), resume.plan.identity, f"{resume.status} run"
    elif isinstance(resume, str | os.PathLike):
        checkpoint = _loaded(resume)
        state, found, source = checkpoint.state, checkpoint.identity, checkpoint.name
    else:
        raise InputError(
            f"resume is {brief(resume)}, which no run can go on from.",
            remedy="give a run that has ended, or the folder, file or URL of a checkpoint",
        )
    check_fits(found, identity)
    if int(state["step"]) >= total:
        raise InputError(
            f"The {source} has done {state['step']} steps already, and {total} are asked for.",
            remedy="ask for more: epochs= and steps= count from the very beginning",
        )
    return Resumption(state, source, None if rate is None else float(rate))


def _loaded(place: str | os.PathLike[str]) -> Checkpoint:
    try:
        return load(place)
    except OSError as error:
        raise CheckpointError(
            f"{brief(str(place))} cannot be read: {type(error).__name__}: {error.strerror or error}",
            cause="a name that cannot be, a folder that you may not read, or a store that cannot be reached",
            remedy="give the folder that the run saved to",
        ) from error


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {brief(value)}; it must be True or False.")
    return value


def _share_of_time(check: Any) -> float:
    """What is meant by `check`, as a share of the time."""
    if isinstance(check, bool):
        return _USUAL_CHECK if check else 0.0
    if not isinstance(check, int | float) or not 0 <= check <= 1:
        raise InputError(
            f"check is {brief(check)}; it must be True, False, or a share of the time from 0 to 1.",
            remedy="check=0.05 looks more often, check=1.0 at every step, check=False never",
        )
    return float(check)


def _check_meets(traits: Traits, strategy: Strategy) -> None:
    """Refuse a strategy whose workers cannot speak to each other in the middle of a step."""
    if strategy.runs_on == "workers" or not traits.meets:
        return
    why = {
        "gather=True": traits.gather,
        "synchronised batch normalisation": traits.synchronised,
        "a loss with several means over classes, each with weights of its own": traits.form == "several means",
        f"a parameter that forward changes ({', '.join(traits.rewrites[:2])})": bool(traits.rewrites),
    }
    first = next((name for name, there in why.items() if there), "a buffer with a rule of its own")
    raise InputError(
        f"{type(strategy).__name__} computes gradients in tasks that cannot speak to each other, and this needs them "
        f"to: {first}.",
        remedy="strategy=parakit.strategies.AllReduce(), whose workers live through a whole run",
    )


def _check_exchange(strategy: Strategy, pool: Workers) -> None:
    if pool.device != "cpu" and getattr(strategy, "exchange", "auto") == "shared memory":
        raise InputError(
            "The strategy exchanges gradients in shared memory, but these workers compute on GPUs.",
            cause="gradients are in the memory of the GPUs, which processes do not share",
            remedy='leave the choice to parakit: AllReduce(), or AllReduce(exchange="gloo")',
        )


def _check_threads(threads: Any, pool: Workers) -> None:
    check_whole("threads", threads, 1, none=True)
    if pool.device != "cpu" and threads not in (None, pool.threads):
        raise InputError(
            f"threads is {threads}, but these workers compute on GPUs, with one thread each.",
            remedy="leave threads out",
        )
    if pool.simulated and threads not in (None, pool.threads):
        raise InputError(
            f"threads is {threads}, but these workers are simulated with {pool.threads} each.",
            cause="their speed is that of the steps they were made from",
            remedy="leave threads out, or simulate workers like a study that was made with as many threads",
        )


def _samples(model: Any, data: Any) -> Samples:
    check_given(model, data)
    samples = Samples.of(data)
    check_samples(samples)
    return samples


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


def _pieces_in_order(held_out: Samples | None, rows: int | None) -> list[Tensor]:
    """Held-out rows in pieces; of so many rows each, where a loss looks at a whole piece."""
    if held_out is None:
        return []
    every = torch.arange(len(held_out))
    return list(every.split(rows) if rows else every.tensor_split(min(DEFAULT_CHUNKS, len(held_out))))


def _nothing() -> Samples:
    raise InputError("This run has no validation data.")


def _assignment(members: Sequence[str], order: EpochOrder, validation: Sequence[Tensor]) -> GroupAssignment:
    training = ChunkAssignment.share_out(order.sizes, members)
    if not validation:
        return GroupAssignment(0, training, None)
    sizes = [len(piece) for piece in validation]
    return GroupAssignment(0, training, ChunkAssignment.share_out(sizes, members[: len(sizes)]))
