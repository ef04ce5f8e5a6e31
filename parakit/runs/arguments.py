"""What a user gives: what must hold of it before anything is started, and what stands for what is left out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.data.source import InMemory, Source
from parakit.errors import DataError, InputError
from parakit.model_state.buffers import check_rules
from parakit.preflight import Wanted
from parakit.runs.options import TrainOptions, with_defaults
from parakit.strategies import AllReduce
from parakit.strategies.base import Strategy, requirements_of
from parakit.system.process_settings import foreign_hooks
from parakit.trees import leaves
from parakit.validation import brief, check_choice, check_positive, check_whole, plain
from parakit.workers.pool import Workers

__all__ = [
    "Asked",
    "check_on_cores",
    "check_options",
    "check_pool",
    "default_loss",
    "default_optimizer",
    "samples_of",
    "warn_of_hooks",
]

_USUAL_CHECK = 0.01
_NUMBERS = (
    "workers", "threads", "learning_rate", "clip_norm", "batch_size", "epochs", "steps", "seed", "chunks",
    "limit_seconds", "check", "checkpoint_seconds", "checkpoint_keep",
)  # fmt: skip

# torch can hold these, but not pick rows of them.
_NO_ROWS = (torch.uint16, torch.uint32, torch.uint64)


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


@dataclass(frozen=True)
class Asked:
    """What is asked of training on a pool, checked as far as no data say more.

    Parameters
    ----------
    options : TrainOptions
        All of them, with their defaults, in plain numbers.
    workers, chunks : int
    strategy : Strategy
    wanted : Wanted
        Of the model.
    check : float
        Share of the time for checking.
    """

    options: TrainOptions
    workers: int
    chunks: int
    strategy: Strategy
    wanted: Wanted
    check: float


def check_options(given: TrainOptions, pool: Workers) -> Asked:
    """What the options of training ask for, with their defaults."""
    options = _plain(with_defaults(given, "plan"))
    workers = pool.check_count(pool.size if options["workers"] is None else options["workers"])
    _check_threads(options["threads"], pool)
    check_positive("checkpoint_seconds", options["checkpoint_seconds"])
    check_whole("checkpoint_keep", options["checkpoint_keep"], 1)
    check_choice("scheduler_every", options["scheduler_every"], ("epoch", "step"))
    check_positive("clip_norm", options["clip_norm"], none=True)
    check_positive("limit_seconds", options["limit_seconds"])
    check_choice("on_nonfinite", options["on_nonfinite"], ("stop", "continue"))
    check_whole("seed", options["seed"], 0)
    share = _share_of_time(options["check"])
    wanted = Wanted(check_rules(options["buffers"]), _flag("gather", options["gather"]), checks=share > 0)
    chunks = pool.chunks if options["chunks"] is None else options["chunks"]
    check_whole("chunks", chunks, 1)
    _check_strategy(options["strategy"])
    strategy = options["strategy"] or AllReduce()
    _check_exchange(strategy, pool)
    return Asked(options, workers, chunks, strategy, wanted, share)


def _plain(options: TrainOptions) -> TrainOptions:
    """Loops over numpy's ranges give numpy's numbers."""
    numbers = {name: plain(value) for name, value in options.items() if name in _NUMBERS}
    return cast(TrainOptions, {**options, **numbers})


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {brief(value)}; it must be True or False.")
    return value


def _check_strategy(strategy: Any) -> None:
    """Refuse what is no strategy."""
    if strategy is None:
        return
    if isinstance(strategy, type) or not callable(getattr(strategy, "step", None)):
        raise InputError(
            f"The strategy is {brief(strategy)}, which has no step(team, step) to call.",
            remedy="give an instance, such as parakit.strategies.AllReduce()",
        )
    check_choice("strategy.runs_on", getattr(strategy, "runs_on", None), ("workers", "driver"))


def _check_given(model: Any, data: Any) -> None:
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


def _check_samples(samples: Samples, what: str = "data") -> None:
    """Refuse tensors of which torch cannot pick rows."""
    for leaf in leaves((samples.inputs, samples.targets)):
        kind = str(leaf.dtype if leaf.layout is torch.strided else leaf.layout).removeprefix("torch.")
        if leaf.layout is not torch.strided or leaf.dtype in _NO_ROWS:
            raise DataError(
                f"{what} has a {kind} tensor of shape {tuple(leaf.shape)}, of which torch cannot pick rows.",
                remedy="tensor.to_dense()" if kind.startswith("sparse") else "targets.long(), or inputs.float()",
            )


def _check_exchange(strategy: Strategy, pool: Workers) -> None:
    if pool.device != "cpu" and requirements_of(strategy).exchange == "shared memory":
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


def source_of(model: Any, data: Any) -> Source:
    """Where the rows come from that a model is to be trained on."""
    return data if isinstance(data, Source) else InMemory(samples_of(model, data))


def samples_of(model: Any, data: Any) -> Samples:
    """Data that a model is to be trained on, or evaluated, in memory."""
    _check_given(model, data)
    samples = Samples.of(data)
    _check_samples(samples)
    return samples


def default_loss(targets: Any) -> nn.Module:
    """Cross entropy for classes, or else the mean squared error."""
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    return nn.CrossEntropyLoss() if whole else nn.MSELoss()


def default_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def warn_of_hooks(level: int) -> None:
    """Warn of hooks for all modules, on behalf of a caller so many calls above."""
    there = foreign_hooks()
    if there:
        warnings.warn(
            f"This process has {there} hooks for all modules or optimizers (register_module_forward_hook and the "
            "like). They belong to no model, so workers do not call them.",
            UserWarning,
            stacklevel=level,
        )
