"""What must hold of pools, strategies and data before anything is started."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from parakit.data.samples import Samples
from parakit.errors import DataError, InputError
from parakit.trees import leaves
from parakit.validation import brief, check_choice
from parakit.workers.pool import Workers

__all__ = ["check_given", "check_on_cores", "check_pool", "check_samples", "check_strategy"]

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
