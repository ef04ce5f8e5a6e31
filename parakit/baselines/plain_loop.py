"""Plain PyTorch, the rival: one process, all cores, no parakit.

Owns the loop that a user would write by hand, and its timing; refuses to know of runs and pools. Its rows are the
next ones of a shuffled index, its batches are all full, and no schedule steps. What it draws at random is given back.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.engines.optimizers import set_mode
from parakit.engines.recipe import Parts, Recipe
from parakit.gradients.forward import call_model
from parakit.losses.summed import mean_of
from parakit.system.cores import usable_cores
from parakit.system.devices import computing_on, finish, generators_of

__all__ = ["MOST_SECONDS", "PlainRates", "PlainTrial", "halt", "measure"]

SECONDS = 1.0
MOST_SECONDS = 6.0  # unless a single step takes longer: warm-up and timing end after the step in which this is over
_WARM_UP_STEPS = 2
_WARM_UP_SECONDS = 0.3
_FEWEST_STEPS = 5

# Trials that are to end early. Known in this process only: a trial elsewhere ends by its own limit.
_halted: set[str] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class PlainTrial:
    """What to train, and for how long.

    Parameters
    ----------
    name : str
        Unique; ends the trial early, by `halt`.
    blob : bytes
        The pickled recipe.
    memory : SharedMemoryKey or array
        Where the recipe's tensors are, or they themselves.
    samples : Samples
        Packed.
    batch_size : int
        Rows in a batch; all rows where there are fewer.
    seconds : float
        How long to time steps; longer until there are five, but no longer than the most with the warm-up.
    cores : int, optional
        Threads to train with. Default: all cores that the process may use.
    device : {"cpu", "cuda"}
        Where to train.
    most_seconds : float, optional
        After which warm-up and timing end, after the present step. Default: 6.
    """

    name: str
    blob: bytes = field(repr=False)
    memory: Any = field(repr=False)
    samples: Samples = field(repr=False)
    batch_size: int
    seconds: float = SECONDS
    cores: int | None = None
    most_seconds: float | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class PlainRates:
    """What came of a trial.

    Attributes
    ----------
    cores : int
        Threads that were used.
    rates : tuple of float
        Samples per second in each timed step.
    error : str
        Why it failed, in words: an exception of a user's code may not be able to travel.
    """

    cores: int
    rates: tuple[float, ...]
    error: str = ""


def halt(name: str) -> None:
    """End a trial of this process after its present step."""
    with _lock:
        _halted.add(name)


def measure(trial: PlainTrial) -> PlainRates:
    """Time the plain loop; leaves this process's random state and number of threads as they were."""
    cores = trial.cores or (usable_cores() if trial.device == "cpu" else 1)
    used = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        with (
            computing_on(trial.device) as device,
            torch.random.fork_rng(devices=generators_of(device)),
            closing(_loop(trial, device)) as loop,
        ):
            return PlainRates(cores, tuple(_timed(loop, trial)))
    except Exception as error:
        return PlainRates(cores, (), f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(used)
        with _lock:
            _halted.discard(trial.name)


def _timed(loop: Iterator[int], trial: PlainTrial) -> list[float]:
    began = perf_counter()
    _warm_up(loop)
    most_seconds = trial.most_seconds or MOST_SECONDS
    first, rates = perf_counter(), list[float]()
    while trial.name not in _halted:
        start = perf_counter()
        rows = next(loop)
        now = perf_counter()
        rates.append(rows / max(1e-9, now - start))
        if now - began > most_seconds or (len(rates) >= _FEWEST_STEPS and now - first > trial.seconds):
            break
    return rates


def _warm_up(loop: Iterator[int]) -> None:
    """Let memory and caches be filled, and threads be started: the first steps are slower than all others."""
    began = perf_counter()
    for _ in range(_WARM_UP_STEPS):
        next(loop)
        if perf_counter() - began > _WARM_UP_SECONDS:
            break


def _loop(trial: PlainTrial, device: torch.device) -> Generator[int, None, None]:
    """Train as a user would by hand; yields the rows of each step when it is done."""
    recipe: Recipe = pickle.loads(trial.blob)
    with recipe.settings.in_force():  # from the first step to the last: to set them takes as long as a small step
        yield from _steps(recipe, trial, device)


def _steps(recipe: Recipe, trial: PlainTrial, device: torch.device) -> Iterator[int]:
    parts: Parts = recipe.frozen.within(trial.memory).thaw()
    model, loss = parts.model.to(device), parts.loss
    if isinstance(loss, nn.Module):
        loss.to(device)
    parameters = list(model.parameters())
    if not recipe.frozen.ties:  # in memory of its own, as a model is that was made here
        for parameter in parameters:
            parameter.data = parameter.data.clone()
    optimizer = parts.optimizer(parameters)
    set_mode(optimizer, "train")
    samples = trial.samples.unpack().on(device)
    for rows in _batches(len(samples), trial.batch_size):
        batch = samples.take(rows.to(device))

        def closure(batch: Samples = batch) -> Tensor:
            optimizer.zero_grad()
            value: Any = mean_of(loss(call_model(model, batch.inputs), batch.targets))
            value.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
            return value  # type: ignore[no-any-return]  # a user's function made it

        if recipe.traits.closure:
            optimizer.step(closure)  # type: ignore[arg-type]  # as torch's own may return tensors too
        else:
            closure()
            optimizer.step()
        finish(device)
        yield len(rows)


def _batches(count: int, batch_size: int) -> Iterator[Tensor]:
    """Row numbers of one full batch after the other, in a new order each time the rows are used up."""
    generator = torch.Generator().manual_seed(0)
    size = min(batch_size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)
