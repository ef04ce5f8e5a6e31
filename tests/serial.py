"""A naive training loop in one process, as a textbook has it: the known answer of the distributed runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parakit.data.chunks import EpochOrder, cut


def batches(samples: int, chunks: int, batch_size: int, seed: int, steps: int) -> list[torch.Tensor]:
    """The row numbers of each global batch, put together from the pure functions of the chunks."""
    pieces = cut(samples, chunks, seed)
    order = EpochOrder(tuple(len(piece) for piece in pieces), batch_size, seed)
    return [
        torch.cat([torch.from_numpy(pieces[c][order.rows(step, c)]) for c in range(chunks)]) for step in range(steps)
    ]


def train_serially(
    model: nn.Module,
    inputs: Any,
    targets: torch.Tensor,
    order: list[torch.Tensor],
    *,
    loss: Callable[..., torch.Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    scheduler: Callable[..., Any] | None = None,
    clip_norm: float | None = None,
    rates: list[float] | None = None,
) -> tuple[list[float], nn.Module]:
    """Losses and final model of a plain loop over given batches; the scheduler steps after every batch.

    `rates` are the learning rates of every step, of the first group; the other groups keep their ratio to it.
    """
    model = copy.deepcopy(model).train()
    opt = optimizer(list(model.parameters()))
    schedule = scheduler(opt) if scheduler else None
    ratios = [group["lr"] / opt.param_groups[0]["lr"] for group in opt.param_groups]
    losses = []
    for number, rows in enumerate(order):
        if rates is not None:
            for group, ratio in zip(opt.param_groups, ratios, strict=True):
                group["lr"] = rates[number] * ratio

        def closure(rows: torch.Tensor = rows) -> torch.Tensor:
            opt.zero_grad()
            value = loss(_call(model, inputs, rows), targets[rows])
            value.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            return value

        losses.append(opt.step(closure).item())
        if schedule:
            schedule.step()
    return losses, model


def _call(model: nn.Module, inputs: Any, rows: torch.Tensor) -> Any:
    if isinstance(inputs, dict):
        return model(**{name: part[rows] for name, part in inputs.items()})
    if isinstance(inputs, tuple):
        return model(*(part[rows] for part in inputs))
    return model(inputs[rows])
