"""From what a user gives to a checked plan, in five steps, so that mistakes surface at the call.

Options are checked, the data are split into chunks, a private copy of the model is tried out on some rows, what an
interrupted run left is read, and the plan is put together from all of these.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from parakit.checkpoints import Checkpoint, Checkpoints, check_fits, check_plain, load
from parakit.collectives.topology import equal_counts, hierarchical
from parakit.data.chunks import DEFAULT_CHUNKS, EpochOrder, check_chunks, chunk_count, cut
from parakit.data.ownership import ChunkAssignment
from parakit.data.samples import Samples
from parakit.data.source import ChunkLoader, InMemory, Source, probe, probed_rows
from parakit.engines.make import make_engine
from parakit.engines.memory_needs import check_fits_memory, needs_of
from parakit.engines.optimizers import AtRate
from parakit.engines.recipe import Parts, Recipe, Traits
from parakit.errors import CheckpointError, DataError, InputError
from parakit.events.records import RunStart
from parakit.preflight import Trial, check_model, frozen_parts, traits_of
from parakit.preflight.labels import LabelRange
from parakit.preflight.optimizers import Optimizing, check_optimizer, check_rate_of_schedule
from parakit.runs.arguments import (
    Asked,
    check_options,
    check_pool,
    default_loss,
    default_optimizer,
    source_of,
    warn_of_hooks,
)
from parakit.runs.identity import identity_of
from parakit.runs.options import TrainOptions
from parakit.runs.plan import Plan, Resumption, Saving
from parakit.runs.run import Run
from parakit.strategies.base import Strategy, requirements_of
from parakit.system.process_settings import Settings
from parakit.validation import brief, check_rate, check_whole
from parakit.workers.assignment import GroupAssignment
from parakit.workers.pool import Workers
from parakit.workers.session import Job

__all__ = ["plan"]

_DEFAULT_BATCH = 256


def plan(model: nn.Module, data: Any, *, on: Workers, **options: Unpack[TrainOptions]) -> Plan:
    """Check what `train` is given, and plan the run without starting it; parameters and errors as for `train`."""
    pool = check_pool(on)
    asked = check_options(options, pool)
    split = _split(model, data, asked)
    tried = _try_out(model, split, asked, pool)
    resumption = _resumption(asked.options["resume"], tried.identity, split.steps, asked.options["learning_rate"])
    return _put_together(asked, split, tried, resumption, pool)


# --- the data, split into chunks


@dataclass(frozen=True)
class _Split:
    """The data of a run, in chunks; and how many steps go through them."""

    source: Source
    samples: Samples  # to try a model on: all rows, where they are in memory
    validation: Source | None
    pieces: list[npt.NDArray[np.int64]]
    order: EpochOrder
    steps: int


def _split(model: nn.Module, data: Any, asked: Asked) -> _Split:
    source, options = source_of(model, data), asked.options
    rows = len(source)
    validation = _validation(options["validation"])
    batch = _batch_size(options["batch_size"], rows)
    pieces = cut(rows, chunk_count(rows, batch, asked.chunks), options["seed"])
    check_chunks(asked.workers, len(pieces))
    order = EpochOrder(tuple(len(rows) for rows in pieces), batch, options["seed"])
    steps = _steps(options["epochs"], options["steps"], order.steps_per_epoch)
    return _Split(source, probe(source), validation, pieces, order, steps)


def _validation(given: Any) -> Source | None:
    if given is None or isinstance(given, Source):
        return given
    return InMemory(Samples.of(given, what="validation"))


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


# --- a recipe, tried out


@dataclass(frozen=True)
class _Tried:
    """What is trained, and what was found out about it; the copy that it was tried on is gone."""

    recipe: Recipe
    rate: float
    identity: dict[str, Any]
    parameters: int
    notes: tuple[str, ...]
    labels: LabelRange | None


def _try_out(model: nn.Module, split: _Split, asked: Asked, pool: Workers) -> _Tried:
    check_model(model)
    warn_of_hooks(5)
    _warn_of_modes(model, 5)
    held_out = None if split.validation is None else probe(split.validation)
    parts = frozen_parts(_parts(model, split, asked))
    trial = Trial(parts, split.samples, (split.order.batch_size,), _numbers_of_rows(split))
    traits = traits_of(trial, asked.wanted, model, held_out)
    optimizing = check_optimizer(trial, split.steps, split.order.steps_per_epoch, asked.options["scheduler_every"])
    for note in optimizing.notes:
        warnings.warn(note, UserWarning, stacklevel=4)
    rate = _rate(trial, optimizing.rate, asked.options)
    recipe = _recipe(trial, replace(traits, closure=optimizing.closure), split.order, asked)
    parameters = sum(p.numel() for p in trial.model.parameters() if p.requires_grad)
    _check_memory(trial, optimizing, parameters, asked, pool)
    identity = identity_of(recipe, trial.parts, split.source)
    return _Tried(recipe, rate, identity, parameters, optimizing.notes, trial.labels)


def _numbers_of_rows(split: _Split) -> dict[str, Tensor]:
    """Of what is not in memory, so that only some rows are tried."""
    sources = {"data": split.source, "validation": split.validation}
    return {name: probed_rows(s) for name, s in sources.items() if s is not None and not isinstance(s, InMemory)}


def _parts(model: nn.Module, split: _Split, asked: Asked) -> Parts:
    options = asked.options
    loss = default_loss(split.samples.targets) if options["loss"] is None else options["loss"]
    factory = default_optimizer if options["optimizer"] is None else options["optimizer"]
    if options["learning_rate"] is not None and options["resume"] is None:
        factory = AtRate(factory, options["learning_rate"])
    return Parts(model, loss, factory, options["scheduler"], asked.strategy)


def _rate(trial: Trial, made_with: float, options: TrainOptions) -> float:
    """The learning rate to begin with, before a schedule."""
    if options["learning_rate"] is None:
        return made_with
    check_rate("learning_rate", options["learning_rate"], made_with)
    if options["resume"] is None:
        check_rate_of_schedule(trial, float(options["learning_rate"]))
    return float(options["learning_rate"])


def _recipe(trial: Trial, traits: Traits, order: EpochOrder, asked: Asked) -> Recipe:
    _check_meets(traits, asked.strategy)
    options = asked.options
    return Recipe(
        trial.frozen, traits, options["scheduler_every"], options["clip_norm"], options["seed"], order,
        options["on_nonfinite"] == "stop", Settings.here(), asked.check,
    )  # fmt: skip


def _check_memory(trial: Trial, optimizing: Optimizing, parameters: int, asked: Asked, pool: Workers) -> None:
    if pool.simulated or pool.device != "cpu":
        return
    divided = _may_divide(asked.strategy, pool)
    needs = needs_of(trial.model, optimizing.states, asked.workers, divided=divided, in_turns=pool.in_turns)
    check_fits_memory(needs, parameters, pool.memory_limits, here=pool.maps_memory)


def _may_divide(strategy: Strategy, pool: Workers) -> bool:
    """Whether workers may have the update in common, as far as that is known before they form a group."""
    asked, hosts = requirements_of(strategy), pool.hosts
    together = pool.one_host or len(set(hosts)) == 1 or hierarchical(hosts)
    return asked.divides and together and equal_counts(hosts)


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


# --- what an interrupted run left


def _resumption(resume: Any, identity: dict[str, Any], total: int, rate: float | None) -> Resumption | None:
    """Where to go on from: a run that has ended, or a checkpoint."""
    if resume is None:
        return None
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


# --- the plan


def _put_together(asked: Asked, split: _Split, tried: _Tried, resumption: Resumption | None, pool: Workers) -> Plan:
    saving = _saving(asked.options, tried.recipe)
    validation = _pieces_in_order(split.validation, split.order.batch_size if tried.recipe.traits.gather else None)
    job = _job(asked, split, tried, validation)
    active = asked.workers
    if active > pool.size:  # virtual workers, which come into being when they are needed
        pool.grow(active)
    assignment = _assignment(pool.names[:active], split.order, validation)
    start = _start(job, assignment, split, tried, pool)
    return Plan(
        job, assignment, active, split.steps, start, tried.rate, tried.identity, resumption, saving, tried.notes
    )  # fmt: skip


def _saving(options: TrainOptions, recipe: Recipe) -> Saving | None:
    if options["checkpoint"] is None:
        return None
    checkpoints = Checkpoints(options["checkpoint"], keep=options["checkpoint_keep"])
    check_plain(make_engine(recipe).live_state())
    return Saving(checkpoints, options["checkpoint_seconds"])


def _job(asked: Asked, split: _Split, tried: _Tried, validation: Sequence[Tensor]) -> Job:
    held_out = split.source if split.validation is None else split.validation
    return Job(
        uuid.uuid4().hex[:8], tried.recipe, asked.strategy, _loader(split.source, split.pieces, tried.labels, "data"),
        _loader(held_out, validation, tried.labels, "validation"),
        float(asked.options["limit_seconds"]), asked.options["threads"],
    )  # fmt: skip


def _loader(source: Source, pieces: Sequence[Any], labels: LabelRange | None, what: str) -> ChunkLoader:
    """Loads chunks; rows in memory have had their labels checked already, all at once."""
    if labels is None or isinstance(source, InMemory):
        return ChunkLoader(source, pieces)
    return ChunkLoader(source, pieces, replace(labels, what=what))


def _start(job: Job, assignment: GroupAssignment, split: _Split, tried: _Tried, pool: Workers) -> RunStart:
    order = split.order
    return RunStart(
        0.0, repr(job.strategy), assignment.members, pool.kind, pool.cores, job.threads or pool.threads,
        tried.parameters, len(split.source), len(split.pieces), order.batch_size, split.steps, order.steps_per_epoch,
        order.seed, simulated=pool.simulated, device=pool.device,
    )  # fmt: skip


def _pieces_in_order(held_out: Source | None, rows: int | None) -> list[Tensor]:
    """Held-out rows in pieces; of so many rows each, where a loss looks at a whole piece."""
    if held_out is None:
        return []
    every = torch.arange(len(held_out))
    return list(every.split(rows) if rows else every.tensor_split(min(DEFAULT_CHUNKS, len(held_out))))


def _assignment(members: Sequence[str], order: EpochOrder, validation: Sequence[Tensor]) -> GroupAssignment:
    training = ChunkAssignment.share_out(order.sizes, members)
    if not validation:
        return GroupAssignment(0, training, None)
    sizes = [len(piece) for piece in validation]
    return GroupAssignment(0, training, ChunkAssignment.share_out(sizes, members[: len(sizes)]))
