"""Shards: each worker updates its own slice of the parameters and of the optimizer's state, in memory that all map.

Where workers share memory, an update done by everyone is the same work done N times. A `Shard` lays a model's
parameters, and the tensors of its optimizer's state, end to end in common memory; each member runs the same optimizer
over its slice of them, and a barrier later all see the whole. This is the first stage of ZeRO (Rajbhandari, Rasley,
Ruwase and He, SC20, arXiv:1910.02054) without its all-gather: whoever maps the memory has nothing to gather.

It gives what the whole update gives where that is made element by element. The whole optimizer stays: it holds the
hyperparameters, which schedules change, and sees its state as if it had made it. Owns that layout and the update;
refuses to know how gradients are summed, and who the others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn, optim

from parakit.engines.base import Group
from parakit.gradients.gradient_sum import GradientSlice
from parakit.tensor_layout import in_order_of, is_dense, shaped_like

__all__ = ["Shard", "can_shard", "common_nbytes"]

# Each of their updates is made element by element; a class of a user's that is derived from one may do anything.
_ELEMENT_WISE = frozenset({
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax,
    optim.RMSprop, optim.Rprop, optim.Adagrad, optim.Adadelta, optim.ASGD,
})  # fmt: skip
_MOST_STATES = 3  # tensors that one of them keeps for each parameter
_ALIGNED = 64
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def can_shard(optimizer: optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether an optimizer's update can be divided among workers: it must not look beyond single elements."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return (
        type(optimizer) in _ELEMENT_WISE
        and not hooks
        and not any(group.get("differentiable") for group in optimizer.param_groups)
        and all(p.dim() and is_dense(p) and p.device.type == "cpu" for p in parameters)
        and len({p.dtype for p in parameters}) == 1
        and len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    )


def common_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes of common memory that a shard may ask for. What it does not ask for takes no memory."""
    return (1 + _MOST_STATES) * (numel * dtype.itemsize + _ALIGNED)


@dataclass(frozen=True)
class _Piece:
    """What one member updates of one parameter; empty for most parameters of a large model.

    Attributes
    ----------
    whole : Parameter
    first, last : int
        Where the parameter lies in the flat vector of all.
    begin, end : int
        Where the piece lies there.
    values : Parameter, (end - begin,)
    """

    whole: nn.Parameter
    first: int
    last: int
    begin: int
    end: int
    values: nn.Parameter


class Shard:
    """One member's slice of a model in training.

    Until it is left, the parameters and the optimizer's state live in common memory. Nobody else may write to them.

    Parameters
    ----------
    optimizer : Optimizer
        Over the whole parameters; one of which `can_shard` is true. Its state, if any, is the same on all members, as
        are the parameters.
    parameters : sequence of Parameter
        The trainable ones, in the order of the gradient.
    common : Group
        Whose members have memory in common.
    """

    def __init__(self, optimizer: optim.Optimizer, parameters: Sequence[nn.Parameter], common: Group) -> None:
        self._optimizer = optimizer
        self._common = common
        self._numel = sum(parameter.numel() for parameter in parameters)
        #: This member's part of the flat vector.
        self.where = common.slice_of(self._numel)
        self._values = common.memory(self._numel, parameters[0].dtype)
        self._pieces = list(self._cut(parameters))
        self._lengths = [piece.end - piece.begin for piece in self._pieces]
        self._gradients: Sequence[Tensor] = ()
        self._used: Sequence[float] = ()  # for each parameter; 0 if no gradient reached it
        self._squared: float | None = None  # norm of the present gradient, before it was clipped
        self._states: dict[str, Tensor] = {}  # by name: one flat vector for all parameters
        self._inner = self._optimizer_of_pieces()
        for piece in self._pieces:
            _part(piece, piece.whole, into=piece.values)
        placed = [(piece, name, self._place(piece, name, value)) for piece, name, value in self._whole_states()]
        # Up to here nothing that is in use has changed: if a member is lost, the others still have what they had.
        common.barrier()
        for piece in self._pieces:
            piece.whole.data = self._whole(piece, self._values)
        for piece, name, value in placed:
            self._inner.state[piece.values][name] = value
        self._waiting = [piece for piece in self._pieces if not self._adopt(piece)]

    def _cut(self, parameters: Sequence[nn.Parameter]) -> Iterable[_Piece]:
        lasts = list(accumulate(parameter.numel() for parameter in parameters))
        for parameter, last in zip(parameters, lasts, strict=True):
            first = last - parameter.numel()
            begin = min(max(first, self.where.start), last)
            end = max(begin, min(last, self.where.stop))
            values = nn.Parameter(self._values[begin:end])
            yield _Piece(parameter, first, last, begin, end, values)

    def _optimizer_of_pieces(self) -> optim.Optimizer:
        of = {piece.whole: piece.values for piece in self._pieces}
        groups = [
            {**group, "params": [of[parameter] for parameter in group["params"] if parameter in of]}
            for group in self._optimizer.param_groups
        ]
        return type(self._optimizer)(groups)  # type: ignore[call-arg]  # all it needs stands in the groups

    # --- state

    def _whole_states(self) -> list[tuple[_Piece, str, Any]]:
        """What the whole optimizer keeps for each parameter, in an order that is the same on all members."""
        state = self._optimizer.state
        return [
            (piece, name, state[piece.whole][name])
            for piece in self._pieces
            if piece.whole in state
            for name in sorted(state[piece.whole])
        ]

    def _place(self, piece: _Piece, name: str, value: Any) -> Any:
        """The state of a piece, made of the state of its parameter: in common memory if it has a value an element."""
        if not isinstance(value, Tensor) or value.shape != piece.whole.shape:
            return value
        return _part(piece, value, into=self._memory(name, value.dtype)[piece.begin : piece.end])

    def _memory(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._states:
            self._states[name] = self._common.memory(self._numel, dtype)
        return self._states[name]

    def _adopt(self, piece: _Piece) -> bool:
        """Let the whole optimizer see the state that the optimizer of pieces has made; says whether there is any."""
        made = self._inner.state.get(piece.values)
        if not made:
            return False
        seen = self._optimizer.state[piece.whole]
        for name in sorted(made):
            value = made[name]
            if isinstance(value, Tensor) and value.shape == piece.values.shape:
                memory = self._memory(name, value.dtype)
                mine = memory[piece.begin : piece.end]
                if value.data_ptr() != mine.data_ptr():
                    mine.copy_(value)
                made[name] = mine
                seen[name] = self._whole(piece, memory)
            else:  # one number for all elements; members have it each, and advance it alike
                seen[name] = value
        return True

    def _whole(self, piece: _Piece, memory: Tensor) -> Tensor:
        return shaped_like(memory[piece.first : piece.last], piece.whole)

    # --- steps

    def load(self, total: GradientSlice) -> None:
        """Make the mean the gradient of the next step: of this member's slice, which is changed in place."""
        self._used, self._squared = total.used, None
        if len(total.pieces) == 1:
            self._gradients = total.pieces[0].split(self._lengths)
        else:
            given = iter(total.pieces)
            self._gradients = [next(given) if length else self._values[:0] for length in self._lengths]
        self._divide(total.divisor)

    def _divide(self, divisor: float) -> None:
        if divisor != 1.0:
            for piece in self._gradients:
                piece.div_(divisor)

    def squared_norm(self) -> float:
        """Of the gradient over all slices. All members ask, or none; the first time in a step they wait."""
        if self._squared is None:
            norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in self._gradients]
            total = sum((norm * norm for norm in norms), torch.zeros((), dtype=torch.float64)).reshape(1)
            self._common.add(total)
            self._squared = float(total)
        return self._squared

    def call_hooks(self) -> None:
        """There are none: where there are, the update is not divided."""

    def clip(self, most: float) -> None:
        """Scale the gradient over all slices down to a 2-norm."""
        self._divide(max(1.0, (math.sqrt(self.squared_norm()) + _CLIP_EPSILON) / most))

    def step(self, evaluate: Callable[[], float]) -> None:
        """Update this member's slice by its gradient, and wait until the others have updated theirs."""
        evaluate()
        for ours, theirs in zip(self._inner.param_groups, self._optimizer.param_groups, strict=True):
            ours.update({name: value for name, value in theirs.items() if name != "params"})
        for piece, gradient, by in zip(self._pieces, self._gradients, self._used, strict=True):
            piece.values.grad = gradient if by else None
        self._inner.step()
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # as schedules want to see
        if self._waiting:
            self._waiting = [piece for piece in self._waiting if not self._adopt(piece)]
        self._common.barrier()

    def leave(self) -> None:
        """Take parameters and state into this process's own memory. What others write later is not seen any more."""
        for piece in self._pieces:
            piece.whole.data = piece.whole.detach().clone()
            state = self._optimizer.state.get(piece.whole, {})
            state.update({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})


def _part(piece: _Piece, whole: Tensor, *, into: Tensor) -> Tensor:
    """Copy what a piece is of its parameter, or of a tensor with that shape."""
    flat = in_order_of(whole.detach(), piece.whole)
    return into.detach().copy_(flat[piece.begin - piece.first : piece.end - piece.first])
