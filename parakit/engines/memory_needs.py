"""What a run needs of memory, before it begins: parameters, gradients, the optimizer's state, and the commits of both.

What forward needs for its activations goes by the model and the rows of a share, and is not counted: the true need is
larger. A run that cannot fit even so is refused at the call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, optim

from parakit.errors import ModelError
from parakit.system.cores import free_memory

__all__ = ["MemoryNeeds", "check_fits_memory", "needs_of", "states_of"]

_COMMITS = 2
_PASSING = 0.8  # of the gradients: what backward has beside those that stay


def _size(nbytes: int) -> str:
    """Bytes as people write them."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a run needs, without activations.

    Attributes
    ----------
    notebook : int
        Of this process: the model as it began, and as it is read in the end.
    workers : int
        Of all workers together, commits included.
    each : int
        Of one worker at most.
    """

    notebook: int
    workers: int
    each: int

    def __repr__(self) -> str:
        parts = (self.notebook, self.workers, self.each)
        notebook, workers, each = map(_size, parts)
        return f"MemoryNeeds(notebook={notebook}, workers={workers}, each={each} at most)"


def states_of(optimizer: optim.Optimizer) -> float:
    """How many tensors an optimizer keeps for each parameter: as it does, or as its class is known to, or else 2."""
    trained = [sum(p.nbytes for p in group["params"] if p.requires_grad) for group in optimizer.param_groups]
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    if held:
        return float(sum(v.nbytes for v in held) / max(1, sum(trained)))
    kept = [_states_of_group(optimizer, group) for group in optimizer.param_groups]
    return float(sum(map(operator.mul, kept, trained)) / max(1, sum(trained)))


def _states_of_group(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> float:
    if isinstance(optimizer, optim.SGD):
        return 1.0 if group.get("momentum") else 0.0
    if isinstance(optimizer, optim.Adam | optim.AdamW):
        return 3.0 if group.get("amsgrad") else 2.0
    if isinstance(optimizer, optim.Adagrad):
        return 1.0
    return 2.0


def needs_of(model: nn.Module, states: float, workers: int, *, divided: bool, in_turns: bool) -> MemoryNeeds:
    """What a run of so many workers needs.

    Parameters
    ----------
    model : nn.Module
    states : float
        Tensors that the optimizer keeps for each parameter.
    workers : int
    divided : bool
        Whether they hold parameters and the optimizer's state in common, on one host.
    in_turns : bool
        Whether they are one process, which is this one.
    """
    tensors = [*model.parameters(), *model.buffers()]
    whole = sum(t.nbytes for t in tensors)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    kept = whole + states * trained
    if in_turns:
        return MemoryNeeds(int(2 * whole + 2 * kept + trained), 0, 0)
    gradients = (1 + _PASSING) * trained
    if divided:
        commits = _COMMITS * kept
        return MemoryNeeds(2 * whole, int(kept + workers * gradients + commits), int(kept + gradients + commits))
    each = kept + gradients + _COMMITS * kept
    return MemoryNeeds(2 * whole, int(workers * (kept + gradients) + _COMMITS * kept), int(each))


def check_fits_memory(needs: MemoryNeeds, parameters: int, limits: Sequence[int], *, here: bool) -> None:
    """Refuse what cannot fit.

    Parameters
    ----------
    needs : MemoryNeeds
    parameters : int
        For the message.
    limits : sequence of int
        Of the memory of each worker, as far as it has one; 0 where it has not.
    here : bool
        Whether the workers are processes of this machine.

    Raises
    ------
    ModelError
        If this machine, or a worker, has less than the run needs.
    """
    free = free_memory()
    total = needs.notebook + (needs.workers if here else 0)
    what = f"{parameters:,} parameters need about {_size(total)} beside their activations"
    if total > free:
        raise ModelError(
            f"{what}: {_size(needs.notebook)} in this process and {_size(total - needs.notebook)} in the "
            f"workers. This machine has {_size(free)} left.",
            cause="gradients, the optimizer's state, and two commits of it all",
            remedy="fewer workers, an optimizer that keeps less (SGD), half precision, or a machine with more memory",
        )
    tight = [limit for limit in limits if limit and needs.each > limit]
    if tight:
        raise ModelError(
            f"{parameters:,} parameters need about {_size(needs.each)} in one worker, beside their activations, "
            f"and {len(tight)} of {len(limits)} workers may use {_size(min(tight))}.",
            cause="a memory_limit of the cluster's workers",
            remedy="raise memory_limit where the workers are started, or use an optimizer that keeps less",
        )
