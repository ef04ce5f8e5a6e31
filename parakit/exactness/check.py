"""The check of a run: now and then, some rows of a real step are computed as one share and as several.

A model and a loss are tried before a run begins, on a few rows. What looks at the whole batch for some rows only, or
from some step on, is found here, and stops the run in words. What it costs is a share of the time that the user
chooses; by default, less than one per cent.
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from parakit.data import Samples
from parakit.errors import BatchDependent, ModelError
from parakit.exactness.late import Late
from parakit.exactness.separation import Separation, cut_of, difference
from parakit.losses import ShareLoss, SummedLoss, form_of_known, is_same, together

__all__ = ["Check"]

_ROWS = 12  # of a share; a few are enough to see whether rows look at each other
_EVERY = 25  # steps, at most as often
_DOUBTS = 1e-4  # relative; of a loss whose outputs are there


class _Turns:
    """When something comes round: at some steps at the beginning, and then as often as its share of the time allows.

    Parameters
    ----------
    first : tuple of int
        Steps at which it does in any case.
    every : int
        At most once in so many steps, from then on.
    share : float
        Of the time.
    """

    def __init__(self, first: tuple[int, ...], every: int, share: float) -> None:
        self._first, self._every, self._share = first, every, share
        self._next = first[0]
        self._since: tuple[int, float] | None = None

    def due(self, step: int) -> bool:
        """Whether it does at a step."""
        if self._since is None:
            self._since = step, perf_counter()
            self._next = min((at for at in self._first if at >= step), default=step + self._first[0])
        return step >= self._next

    def took(self, step: int, seconds: float) -> None:
        """Note that it did, and how long that took."""
        assert self._since is not None
        before, then = self._since
        per_step = max(1e-6, (perf_counter() - then - seconds) / max(1, step - before))
        wanted = seconds / (self._share * per_step)
        # To powers of two, so that workers who measured about the same do it at the same steps.
        interval = self._every * 2 ** max(0, math.ceil(math.log2(max(1.0, wanted / self._every))))
        early = [at for at in self._first if at > step]
        self._next = early[0] if early else (step // interval + 1) * interval


class Check:
    """Looks now and then whether a share adds up of its parts.

    Parameters
    ----------
    separation : Separation
    loss : SummedLoss
    late : Late
    share : float
        Of the time that it may take, 0 to 1; 1 looks at every step.
    sees_outputs : bool
        Whether the loss may be called again with parts of an output: not if it counts, or draws random numbers.
    """

    def __init__(
        self, separation: Separation, loss: SummedLoss, late: Late, share: float, *, sees_outputs: bool
    ) -> None:
        self._separation, self._loss, self._late = separation, loss, late
        self._always = share >= 1.0
        self._losses = _Turns((4, 24), _EVERY, share / 2)
        self._gradients = _Turns((9,), 8 * _EVERY, share / 4)
        # Torch's own loss objects add up by themselves, whatever they are given.
        able = sees_outputs and loss.form != "several means" and form_of_known(loss.function) is None
        self._outputs = _Turns((0, 2, 6), 8, share / 4) if able else None
        self._number = 0
        self._generator = torch.Generator().manual_seed(0)

    def before(self, step: int, share: Samples) -> None:
        """Look at some rows of a share, if it is time to.

        Raises
        ------
        BatchDependent
            If they do not add up.
        """
        losses, gradients = self._losses.due(step), self._gradients.due(step)
        if not (losses or gradients or self._always) or len(share) < 2:
            return
        began = perf_counter()
        gradient = gradients or self._always
        rows = torch.randperm(len(share), generator=self._generator)[:_ROWS].sort().values
        some = share.take(rows.to(_device_of(share)))
        self._number += 1
        self._look(step, some, cut_of(len(rows), self._number), gradient=gradient)
        seconds = perf_counter() - began
        for turns, due in ((self._losses, losses), (self._gradients, gradients)):
            if due:
                turns.took(step, seconds)

    def after(self, step: int, samples: Samples, output: Any, loss: ShareLoss) -> None:
        """Look at a loss whose output is there, on parts of it, if it is time to.

        Parameters
        ----------
        step : int
        samples : Samples
            All rows of a share.
        output : tree of tensors
            What the model made of them.
        loss : ShareLoss
            What the loss made of that.

        Raises
        ------
        BatchDependent
            If the parts do not come to the whole.
        """
        turns = self._outputs
        if turns is None or not (turns.due(step) or self._always) or len(samples) < 2:
            return
        began = perf_counter()
        self._number += 1
        cut = cut_of(len(samples), self._number)
        if not self._adds_up(samples, output, loss, cut):
            # It may be that the first dimension of an output does not count rows, so the model is asked.
            self._look(step, samples, cut, gradient=False)
            self._outputs = None
        turns.took(step, perf_counter() - began)

    def _look(self, step: int, samples: Samples, cut: int, *, gradient: bool) -> None:
        with self._late.undone():
            found = self._separation.look(samples, cut, gradient=gradient)
            if found is None:
                return
            # What begins to be kept from call to call in the middle of a run makes calls differ, and not rows.
            if self._separation.keeping_all().look(samples, cut, gradient=gradient) is not None:
                raise _batch_dependent(difference(found, f"In step {step}, "))
        if not self._late.seen:
            raise ModelError(
                f"Before step {step}, forward began to keep something from call to call, and did not when the model "
                "was tried.",
                cause="a list, a table or a buffer that begins to be filled later, or only for some inputs",
                remedy="let it begin with the first call; a buffer may have a rule: train(..., buffers={...})",
            )

    def _adds_up(self, samples: Samples, output: Any, loss: ShareLoss, cut: int) -> bool:
        rows, target = len(samples), samples.targets
        if not _has_rows(output, rows):
            return False
        try:
            with torch.no_grad():
                parts = [self._loss(_part(output, a, b), _part(target, a, b)) for a, b in ((0, cut), (cut, rows))]
        except Exception:
            return False
        whole = together([loss])
        return not math.isfinite(whole) or is_same(whole, together(parts), _tolerance(loss.value))


def _batch_dependent(fact: str) -> BatchDependent:
    """The error for a share that does not add up of its parts."""
    return BatchDependent(
        f"The run stopped, because its result would depend on the number of workers. {fact}.",
        cause="a mean over what is not masked or padded, samples that are compared with each other, or statistics of a "
        "batch, in the loss or in the model",
        remedy="return (sum, count) from the loss: both are added up over the workers; train(..., gather=True) gives "
        "the loss the outputs of the whole batch; nn.SyncBatchNorm has the statistics of the whole batch; with "
        "check=False, each worker's share is taken for a batch of its own",
    )


def _tolerance(value: Tensor) -> float:
    eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return max(1e-9, min(_DOUBTS, 1e9 * eps), 64 * eps)


def _device_of(samples: Samples) -> torch.device:
    found: list[torch.device] = []
    samples.map(lambda leaf: found.append(leaf.device))
    return found[0]


def _has_rows(tree: Any, rows: int) -> bool:
    """Whether all of a tree is tensors of so many rows: then parts of it can be had without asking its maker."""
    if isinstance(tree, Tensor):
        return tree.dim() > 0 and len(tree) == rows
    if type(tree) is dict:
        return all(_has_rows(value, rows) for value in tree.values())
    return type(tree) in (tuple, list) and all(_has_rows(value, rows) for value in tree)


def _part(tree: Any, first: int, end: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[first:end]
    if type(tree) is dict:
        return {key: _part(value, first, end) for key, value in tree.items()}
    return type(tree)(_part(value, first, end) for value in tree)
