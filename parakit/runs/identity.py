"""The identity of a run: what must be the same for its steps to go on as if never interrupted, in plain values.

Worker count, strategy and kind of pool are no part of it: they do not change what a step computes.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from parakit.data.chunks import ORDER
from parakit.data.source import Source
from parakit.engines.recipe import Parts, Recipe

__all__ = ["identity_of"]


def identity_of(recipe: Recipe, parts: Parts, source: Source) -> dict[str, Any]:
    """What a run trains, on what, and in which order.

    Parameters
    ----------
    recipe : Recipe
    parts : Parts
        A living copy of it.
    source : Source
        Of the training data.

    Returns
    -------
    dict
        Of strings, numbers and lists: what JSON can hold.
    """
    order, model = recipe.order, parts.model
    made = parts.optimizer(list(model.parameters()))
    schedule = parts.scheduler(made) if parts.scheduler else None
    return {
        "parakit": version("parakit"),
        "torch": str(torch.__version__),
        "seed": recipe.seed,
        "order of rows": ORDER,
        "batch_size": order.batch_size,
        "samples": sum(order.sizes),
        "chunks": len(order.sizes),
        "data": source.fingerprint(),
        "clip_norm": recipe.clip_norm,
        "optimizer": type(made).__name__,
        "scheduler": None if schedule is None else type(schedule).__name__,
        "scheduler_every": recipe.scheduler_every if schedule is not None else None,
        "parameters": {name: _form(p) for name, p in model.named_parameters()},
        "buffers": {name: _form(b) for name, b in model.named_buffers()},
    }


def _form(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
