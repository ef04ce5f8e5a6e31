"""Which engine the workers of a run use: the one that the strategy names, or else the replicated one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from parakit.engines.base import Engine
from parakit.engines.recipe import Recipe
from parakit.engines.replicated import Replica
from parakit.system.devices import CPU

__all__ = ["engine_of", "holds_parts", "make_engine"]


def engine_of(strategy: Any) -> Callable[..., Engine]:
    """What makes the engine, from a recipe, its parts and a device; the attribute `engine` of a strategy."""
    return getattr(strategy, "engine", None) or Replica


def holds_parts(strategy: Any) -> bool:
    """Whether each worker holds a part of the state alone, so that nobody's speaks for all."""
    return not getattr(engine_of(strategy), "whole", True)


def make_engine(recipe: Recipe, device: torch.device = CPU) -> Engine:
    """The engine of one worker, alone as yet."""
    parts = recipe.parts()
    return engine_of(parts.strategy)(recipe, parts, device)
