"""The identity of a run: what must be the same for its steps to go on as if never interrupted, in plain values.

Worker count, strategy and kind of pool are no part of it: they do not change what a step computes.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from parakit.data.chunks import ORDER
from parakit.data.samples import Samples
from parakit.engines.recipe import Parts, Recipe
from parakit.trees import leaves

__all__ = ["identity_of"]

_SEEN_ROWS = 64


def identity_of(recipe: Recipe, parts: Parts, samples: Samples) -> dict[str, Any]:
    """What a run trains, on what, and in which order.

    Parameters
    ----------
    recipe : Recipe
    parts : Parts
        A living copy of it.
    samples : Samples
        The training data.

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
        "data": _fingerprint(samples),
        "clip_norm": recipe.clip_norm,
        "optimizer": type(made).__name__,
        "scheduler": None if schedule is None else type(schedule).__name__,
        "scheduler_every": recipe.scheduler_every if schedule is not None else None,
        "parameters": {name: _form(p) for name, p in model.named_parameters()},
        "buffers": {name: _form(b) for name, b in model.named_buffers()},
    }


def _form(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _fingerprint(samples: Samples) -> str:
    """A short mark of the data: forms, and values of some rows spread over all of them."""
    count = len(samples)
    some = samples.take(torch.linspace(0, count - 1, min(count, _SEEN_ROWS)).long())
    mark = hashlib.sha256()
    for leaf in leaves((some.inputs, some.targets)):
        mark.update(f"{list(leaf.shape)} {leaf.dtype}".encode())
        mark.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()[:16]
