"""Fused updates: torch has, for some optimizers, one pass over the memory in place of one for each operation.

On a CPU it takes them only if asked. This asks, where the user left the choice to torch, and where the fused update has
been seen to do the same: Adam's update of a large network then takes a quarter of the time. Some of torch's fused
updates do not the same for each type (in torch 2.12 and 2.13, SGD leaves parameters in half precision as they are), and
all of them go by memory where others go by index. So each is tried, once in a process, on parameters of the same type
and layout, with the same choices.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from parakit.tensor_layout import is_dense

__all__ = ["prefer_fused", "shown_equal"]

_FUSED = (optim.Adam, optim.AdamW, optim.Adagrad, optim.SGD)
_STEPS = 3
_DTYPES = (torch.float32, torch.float64)  # in half precision, fewer operations are fewer roundings
# Of the largest element, in multiples of the type's precision: what another order of the same operations may do.
_ROUNDING = 8.0


def prefer_fused(optimizer: optim.Optimizer) -> None:
    """Let an optimizer of torch's use its fused update from now on, where it does the same and nobody chose else."""
    if type(optimizer) in _FUSED:
        for group in optimizer.param_groups:
            if _undecided(group) and _possible(optimizer, group):
                group["fused"] = True


def _undecided(group: dict[str, Any]) -> bool:
    chosen = (group.get("fused"), group.get("foreach"))
    return chosen == (None, None) and not group.get("capturable") and not group.get("differentiable")


def _possible(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    trained = [parameter for parameter in group["params"] if parameter.requires_grad]
    if not all(parameter.is_floating_point() and parameter.device.type == "cpu" for parameter in trained):
        return False
    # Gradients are laid out as parameters are only where those are without gaps.
    if not all(is_dense(parameter) for parameter in trained):
        return False
    # Torch's fused SGD fails when only some of its parameters have a momentum yet.
    states = [optimizer.state.get(parameter, {}) for parameter in trained]
    if group.get("momentum") and not all(state.get("momentum_buffer") is not None for state in states):
        return False
    kind: Callable[..., Any] = type(optimizer)
    return _alike(trained, states) and all(
        shown_equal(kind, dtype, order, _choices(group)) for dtype, order in set(map(_kind, trained))
    )


def _alike(parameters: Sequence[nn.Parameter], states: Sequence[dict[str, Any]]) -> bool:
    """Whether what an optimizer keeps for its parameters is laid out as they are."""
    return all(
        value.stride() == parameter.stride()
        for parameter, state in zip(parameters, states, strict=True)
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    )


def _kind(parameter: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type, and order of dimensions in memory."""
    strides = parameter.stride()
    order = sorted(range(parameter.dim()), key=lambda d: (-strides[d], d))
    return parameter.dtype, tuple(range(parameter.dim())) if parameter.is_contiguous() else tuple(order)


def _choices(group: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a group says of its update, but for the parameters; a rate may be a tensor, and changes."""
    left_out = ("params", "fused", "foreach", "initial_lr", "lr")
    plain = {name: value for name, value in group.items() if name not in left_out}
    return tuple((name, value) for name, value in plain.items() if isinstance(value, bool | int | float | tuple))


@functools.cache
def shown_equal(
    kind: Callable[..., Any], dtype: torch.dtype, order: tuple[int, ...], choices: tuple[tuple[str, Any], ...]
) -> bool:
    """Whether the fused update of an optimizer does what its plain one does, tried on a few numbers.

    Parameters
    ----------
    kind : type
    dtype : torch.dtype
        Of the parameters.
    order : tuple of int
        Their dimensions, the one with the largest stride first.
    choices : tuple of (name, value)
        Of a parameter group.
    """
    if dtype not in _DTYPES:
        return False
    takes = inspect.signature(kind).parameters
    known = {name: value for name, value in choices if name in takes}
    try:
        plain, fused = (_tried(kind, dtype, order, {**known, "fused": chosen}) for chosen in (False, True))
    except Exception:  # a fused update that this torch does not have, or does not take
        return False
    largest = max(float(plain.abs().max()), 1.0)
    return bool((plain - fused).abs().max() <= _ROUNDING * torch.finfo(dtype).eps * largest)


def _tried(kind: Any, dtype: torch.dtype, order: tuple[int, ...], choices: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = [3 + d % 2 for d in range(len(order))]

    def numbers() -> Tensor:
        laid = torch.randn([sizes[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
        return laid.permute([order.index(d) for d in range(len(order))])

    parameter = nn.Parameter(numbers())
    optimizer = kind([parameter], lr=0.1, **{**choices, "fused": False})
    for number in range(_STEPS):
        parameter.grad = numbers()
        if number and choices["fused"]:  # as it comes to be in a run: once there is a state
            optimizer.param_groups[0]["fused"] = True
        optimizer.step()
    return parameter.detach().double()
