"""Rewrites: parameters that forward itself changes, such as embeddings of a largest norm, or constraints.

In a plain loop forward sees the whole batch, and what it writes is there for everybody. Here each worker's forward
writes into its own copy: what only the rows of one worker call for has to reach the others. Elements that several
workers changed must have come to the same, as a norm that is cut down does; otherwise there is no one result, and the
run stops. So parameters that forward changes are never shared by processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from parakit.errors import ModelError
from parakit.model_state.peers import Peers

__all__ = ["Rewrites"]

_ROUNDING = 64.0  # multiples of a type's precision


class Rewrites:
    """Looks after what forward does to the parameters of one worker's model.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Parameters that forward is known to change.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        self._names = tuple(names)
        self._before: list[Tensor] = []
        self._marks: list[tuple[str, int, int]] = []

    def begin(self, *, look: bool = False) -> None:
        """Note how parameters are before forward.

        Parameters
        ----------
        look : bool
            Whether to notice changes of others than those that are known.
        """
        if self._names:
            there = dict(self._model.named_parameters())
            self._before = [there[name].detach().clone() for name in self._names]
        self._marks = self._mark() if look else []

    def check(self) -> None:
        """Refuse what nobody knew of.

        Raises
        ------
        ModelError
            If forward has changed another parameter.
        """
        if not self._marks:
            return
        for before, now in zip(self._marks, self._mark(), strict=False):
            if before != now:
                raise ModelError(
                    f"forward has changed parameter {now[0]}, and did not when the model was tried.",
                    cause="a constraint or a renormalisation that begins later, or only for some inputs",
                    remedy="apply it to the parameters when the optimizer has stepped (register_step_post_hook), or "
                    "compute constrained weights in forward without writing to the parameter "
                    "(torch.nn.utils.parametrize)",
                )
        self._marks = []

    def settle(self, peers: Peers) -> None:
        """After the backward pass, let every worker have what all of them wrote; all workers call this together.

        Raises
        ------
        ModelError
            If two wrote different values to one place.
        """
        if not self._names or peers.size == 1:
            return
        there = dict(self._model.named_parameters())
        for name, before in zip(self._names, self._before, strict=True):
            now = there[name].detach()
            change = (now - before).double()
            both = torch.stack([change, (change != 0).double()])
            peers.sum(both)
            told, count = both
            merged = before + (told / count.clamp(min=1.0)).to(before.dtype)
            self._check_agreed(name, now, merged, change)
            there[name].detach().copy_(merged)

    @staticmethod
    def _check_agreed(name: str, now: Tensor, merged: Tensor, change: Tensor) -> None:
        limit = _ROUNDING * torch.finfo(now.dtype).eps * float(now.abs().max().clamp(min=1.0))
        if bool(((now - merged).abs() * (change != 0) > limit).any()):
            raise ModelError(
                f"forward changes parameter {name} by the rows it sees, and workers have come to different values.",
                cause="an average or a codebook that is kept in a parameter",
                remedy="make it a buffer (register_buffer), with a rule: train(..., buffers={...}); or compute it "
                "without writing to the parameter",
            )

    def _mark(self) -> list[tuple[str, int, int]]:
        known = set(self._names)
        return [(name, p._version, p.data_ptr()) for name, p in self._model.named_parameters() if name not in known]
