"""Structure: of which parameters and buffers a model consists, in which shapes, and what of them is trained.

Workers add gradients up place by place, and a state has a place for every tensor. So all of that stays as it is from
the call to the end of a run; forward may change values, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from parakit.errors import ModelError
from parakit.model_state.buffers import buffers_of
from parakit.validation import in_short

__all__ = ["Structure"]


class Structure:
    """What a model and its loss consist of, as they are now.

    Parameters
    ----------
    model : nn.Module
    loss : callable
    """

    def __init__(self, model: nn.Module, loss: Any) -> None:
        self._model, self._loss = model, loss
        self._parameters = _named(model)
        self._flags = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        self._memory = _in_one_memory(self._parameters.values())
        self._buffers = {name: _form(buffer) for name, buffer in buffers_of(model, loss).items()}
        self._pairs = list(zip(self._parameters.values(), self._flags.values(), strict=True))

    @property
    def new_buffers(self) -> list[str]:
        """Names of buffers that were not there."""
        return [name for name in buffers_of(self._model, self._loss) if name not in self._buffers]

    def check_flags(self) -> None:
        """Refuse that another set of parameters is to be trained; quick, for there is one call in each step.

        Raises
        ------
        ModelError
        """
        if all(parameter.requires_grad is flag for parameter, flag in self._pairs):
            return
        name = next(name for name, flag in self._flags.items() if self._parameters[name].requires_grad is not flag)
        raise ModelError(
            f"forward has set requires_grad of parameter {name} to {not self._flags[name]}.",
            cause="layers that are frozen or unfrozen in forward",
            remedy="set requires_grad before the call; to change it later, end the run, set it in run.model, and train "
            "that on: train(run.model, ...)",
        )

    def check(self) -> None:
        """Refuse all that is not as it was, but for values.

        Raises
        ------
        ModelError
        """
        self.check_flags()
        self._check_parameters(_named(self._model))
        self._check_buffers()

    def _check_parameters(self, now: dict[str, nn.Parameter]) -> None:
        remedy = (
            "make parameters, and tie them, in __init__; change values in forward by computing new tensors, or by "
            "torch.nn.utils.parametrize"
        )
        gone = [name for name in self._parameters if name not in now]
        new = [name for name in now if name not in self._parameters]
        if gone or new:
            what = f"takes parameters away: {in_short(gone)}" if gone else f"makes parameters: {in_short(new)}"
            raise ModelError(f"forward {what}; no optimizer knows of that.", remedy=remedy)
        other = [name for name, parameter in self._parameters.items() if now[name] is not parameter]
        if other:
            raise ModelError(
                f"forward puts another parameter in the place of {other[0]}.",
                cause="self.weight = ... in forward: a new parameter, or one of another layer",
                remedy=remedy,
            )
        tied = _in_one_memory(now.values()) - self._memory
        if tied:
            names = {id(parameter): name for name, parameter in now.items()}
            one, same = (names[number] for number in min(tied))
            raise ModelError(
                f"forward puts parameter {same} into the memory of parameter {one}.",
                cause="self.a.weight.data = self.b.weight.data in forward",
                remedy="share the parameter itself, once, in __init__: self.a.weight = self.b.weight",
            )

    def _check_buffers(self) -> None:
        now = buffers_of(self._model, self._loss)
        gone = [name for name in self._buffers if name not in now]
        if gone or self.new_buffers:
            what = f"takes away: {in_short(gone)}" if gone else f"makes: {in_short(self.new_buffers)}"
            raise ModelError(
                f"There are buffers that forward {what}.",
                cause="register_buffer in forward, when it is called for the first time, or later",
                remedy="make buffers in __init__, where all workers make the same ones",
            )
        for name, form in self._buffers.items():
            if _form(now[name]) != form:
                (was, kind), (shape, new_kind) = form, _form(now[name])
                raise ModelError(
                    f"forward changes the buffer {name} from {kind} of shape {was} to {new_kind} of shape {shape}.",
                    cause="a list that grows, or a cache that takes the size of its inputs",
                    remedy="give it its largest size in __init__, with a buffer that counts what of it is filled; or "
                    "keep a cache that every call makes anew in a plain attribute",
                )


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def _form(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _in_one_memory(parameters: Iterable[nn.Parameter]) -> set[tuple[int, int]]:
    """Pairs of parameters that begin at one place."""
    first: dict[int, nn.Parameter] = {}
    pairs = set()
    for parameter in parameters:
        place = parameter.data_ptr() if parameter.numel() and parameter.layout is torch.strided else 0
        if place and first.setdefault(place, parameter) is not parameter:
            pairs.add((id(first[place]), id(parameter)))
    return pairs
