"""The check of a run: now and then, a real step is computed as one share and as several.

A model and a loss are tried before a run begins, on a few rows. What looks at the whole batch for some rows only, or
from some step on, is found here, and stops the run in words. Three looks share the work:

- *rows*: a few rows of a share are computed by themselves, and compared with what they came to among all;
- *loss*: the loss of the outputs that are there, and its gradient, are compared with those of two parts;
- *all*: model, loss and gradient on some rows, at once and in two parts.

What one of them suspects, the last decides in double precision. What they cost is a share of the time that the user
chooses; by default, less than one per cent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from parakit.data.samples import Samples
from parakit.errors import BatchDependent, ModelError
from parakit.exactness.outputs import replace_tensors, tensors_in
from parakit.exactness.separation import Separation, cut_of, difference
from parakit.exactness.turns import Purse, Turns
from parakit.gradients.forward import call_model
from parakit.losses.summed import ShareLoss, SummedLoss, form_of_known, is_same, together
from parakit.model_state.late_attributes import Late

__all__ = ["Check"]

_SECONDS = 0.05  # that the first steps may take longer
_LEAST, _FEW, _MANY = 6, 12, 256  # rows
_QUICK_SECONDS = 2e-3  # of a look, which may be at twice as many rows the next time
_LONG_SECONDS = 1e-2  # of one, which is at half as many
_EVERY_STEP = tuple(range(50))
_MOST_STEPS = (0, 1, 2, 4, 6, 9, 13, 18, 24, 31, 39, 48)
_SOME_STEPS = (1, 4, 8, 13, 19, 26, 34, 43)
_FEW_STEPS = (9, 32)
_SURE_STEPS = (9, 32, 48)  # however slow a step is
_FALSE_ALARMS = 2  # after which a look is given up
_DIFFERENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}  # relative


class Check:
    """Looks now and then whether the rows of a share are by themselves what they are together.

    Parameters
    ----------
    separation : Separation
    model : nn.Module
    loss : SummedLoss
    late : Late
    share : float
        Of the time that it may take, 0 to 1; 1 looks at every step.
    calm : bool
        Whether model and loss may be called again and come to the same: not if they count, draw random numbers or
        normalise by batches.
    needs_grad : bool
        Whether forward cannot do without gradients.
    gathers : bool
        Whether the loss gets the outputs of all workers: then those of the model are looked at, and it is not.
    """

    def __init__(
        self,
        separation: Separation,
        model: torch.nn.Module,
        loss: SummedLoss,
        late: Late,
        share: float,
        *,
        calm: bool,
        needs_grad: bool = False,
        gathers: bool = False,
    ) -> None:
        self._separation, self._model, self._loss, self._late = separation, model, loss, late
        self._needs_grad, self._gathers = needs_grad, gathers
        purse = Purse(_SECONDS)
        # Torch's own loss objects add up by themselves, whatever they are given.
        own_loss = form_of_known(loss.function) is None and loss.form != "several means" and not gathers
        self._losses = Turns(_EVERY_STEP, purse, share / 4) if calm and own_loss else None
        self._rows = Turns(_MOST_STEPS, purse, share / 4) if calm else None
        first = _FEW_STEPS if calm else _SOME_STEPS
        self._all = Turns(first, purse, share / 2, always=_SURE_STEPS if share else ())
        self._always = share >= 1
        self._at_once = _FEW
        self._number = self._alarms = 0
        self._generator = torch.Generator().manual_seed(0)

    def before(self, step: int, share: Samples) -> None:
        """Look at some rows of a share, before the step, if it is time to.

        Raises
        ------
        BatchDependent
            If they do not add up.
        ModelError
            If forward began to keep something from call to call.
        """
        if len(share) < 2 or not self._all.due(step):
            return
        began = perf_counter()
        self._number += 1
        gradient = self._rows is not None or self._always or self._number % 2 == 0
        some = share.take(self._chosen(share, self._at_once))
        self._look(step, some, cut_of(len(some), self._number), gradient=gradient)
        seconds = perf_counter() - began
        if seconds < _QUICK_SECONDS:
            self._at_once = min(2 * self._at_once, _MANY)
        elif seconds > _LONG_SECONDS:
            self._at_once = max(self._at_once // 2, _LEAST)
        self._all.took(step, seconds)

    def after(self, step: int, samples: Samples, output: Any, loss: ShareLoss) -> None:
        """Look at a step whose output is there, if it is time to.

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
        BatchDependent, ModelError
            As above.
        """
        if len(samples) < 2:
            return
        if self._losses is not None and self._losses.due(step):  # the first, while all that forward left is there
            self._losses = self._taken(step, self._losses, self._loss_adds_up, samples, output, loss)
        if self._rows is not None and self._rows.due(step):
            self._rows = self._taken(step, self._rows, self._rows_agree, samples, output, loss)

    def _taken(self, step: int, turns: Turns, agrees: Callable[..., bool | None], *what: Any) -> Turns | None:
        """Take a quick look; returns its turns, or None where it is no use."""
        began = perf_counter()
        with self._late.undone():
            verdict = agrees(*what)
        if verdict is False:
            self._ask(step, what[0])
            self._alarms += 1
        turns.took(step, perf_counter() - began)
        if verdict is None or self._alarms > _FALSE_ALARMS:
            self._all.come_at(_SOME_STEPS)
            return None
        return turns

    # --- quick looks, which may be wrong

    def _rows_agree(self, samples: Samples, output: Any, _: ShareLoss) -> bool | None:
        """Whether some rows come to the same by themselves; None where outputs have no rows."""
        rows = len(samples)
        kept = [leaf.detach() for leaf in tensors_in(output)]
        if not kept or not any(_has_rows(leaf, rows) for leaf in kept):
            return None
        chosen = self._chosen(samples, min(_FEW, rows - 1))
        with torch.set_grad_enabled(self._needs_grad):
            again = [leaf.detach() for leaf in tensors_in(call_model(self._model, samples.take(chosen).inputs))]
        pairs = zip(kept, again, strict=False)
        return all(_near(leaf[chosen], part) for leaf, part in pairs if _has_rows(leaf, rows))

    def _loss_adds_up(self, samples: Samples, output: Any, loss: ShareLoss) -> bool | None:
        """Whether the loss of outputs, and its gradient, are those of two parts of them; None where they have none."""
        rows, leaves = len(samples), tensors_in(output)
        whole = together([loss])
        if not leaves or not all(_has_rows(leaf, rows) for leaf in leaves) or not math.isfinite(whole):
            return None if leaves and math.isfinite(whole) else True
        self._number += 1
        cut = cut_of(rows, self._number)
        given = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
        try:
            parts = [self._loss_of(output, given, samples, first, end) for first, end in ((0, cut), (cut, rows))]
            if not is_same(whole, together(parts), _tolerance(loss.value)):
                return False
            return self._gradients_agree(output, given, samples, parts)
        except Exception:  # such as a loss that wants the graph that led to its outputs
            return None

    def _loss_of(self, output: Any, given: list[Tensor], samples: Samples, first: int, end: int) -> ShareLoss:
        part = samples.slice(first, end).copy_rows()
        with torch.enable_grad():
            return self._loss(replace_tensors(output, iter([leaf[first:end] for leaf in given])), part.targets)

    def _gradients_agree(self, output: Any, given: list[Tensor], samples: Samples, parts: list[ShareLoss]) -> bool:
        wanted = [leaf for leaf in given if leaf.requires_grad]
        if not wanted:
            return True
        whole = self._loss_of(output, given, samples, 0, len(samples))
        alone = torch.autograd.grad(whole.value, wanted, allow_unused=True)
        both = [torch.autograd.grad(part.value, wanted, allow_unused=True) for part in parts]
        count, sums = whole.count or 1.0, sum(part.count for part in parts) or 1.0
        for leaf, one, first, second in zip(wanted, alone, *both, strict=True):
            pieces = [
                (torch.zeros_like(leaf) if grad is None else grad) * (part.weight / sums)
                for grad, part in zip((first, second), parts, strict=True)
            ]
            expected = (torch.zeros_like(leaf) if one is None else one) * (whole.weight / count)
            if not _near(expected, pieces[0] + pieces[1]):
                return False
        return True

    # --- the last word

    def _ask(self, step: int, samples: Samples) -> None:
        rows = samples
        if len(samples) > _MANY:
            rows = samples.take(self._chosen(samples, _MANY))
        self._look(step, rows, cut_of(len(rows), self._number), gradient=True)

    def _look(self, step: int, samples: Samples, cut: int, *, gradient: bool) -> None:
        with self._late.undone():
            found = self._separation.look(samples, cut, gradient=gradient)
            if found is None:
                return
            # What begins to be kept from call to call in the middle of a run makes calls differ, and not rows.
            if self._separation.keeping_all().look(samples, cut, gradient=gradient) is not None:
                raise _batch_dependent(difference(found, f"In step {step}, "), gathered=self._gathers)
        if not self._late.seen:
            raise ModelError(
                f"Before step {step}, forward began to keep something from call to call, and did not when the model "
                "was tried.",
                cause="a list, a table or a buffer that begins to be filled later, or only for some inputs",
                remedy="let it begin with the first call; a buffer may have a rule: train(..., buffers={...})",
            )

    def _chosen(self, samples: Samples, most: int) -> Tensor:
        """Numbers of some rows, other ones each time, ascending."""
        rows = torch.randperm(len(samples), generator=self._generator)[:most].sort().values
        return rows.to(_device_of(samples))


def _batch_dependent(fact: str, *, gathered: bool) -> BatchDependent:
    """The error for a share that does not add up of its parts."""
    if gathered:
        return BatchDependent(
            "The run stopped, because its result would depend on the number of workers: rows of a batch meet in the "
            f"model, which has a worker's share of them. {fact.replace('the loss is', 'a sum over outputs is')}.",
            cause="a mean, a normalisation, a branch or a comparison over the first dimension in forward",
            remedy="return what is compared, and compare it in the loss, which has the outputs of the whole batch; "
            "nn.SyncBatchNorm has the statistics of the whole batch",
        )
    return BatchDependent(
        f"The run stopped, because its result would depend on the number of workers. {fact}.",
        cause="a mean over what is not masked or padded, or one that is bent (a root, an absolute value), samples that "
        "are compared with each other, or statistics of a batch, in the loss or in the model",
        remedy="return (sum, count) from the loss: both are added up over the workers; train(..., gather=True) gives "
        "the loss the outputs of the whole batch; nn.SyncBatchNorm has the statistics of the whole batch; with "
        "check=False, each worker's share is taken for a batch of its own",
    )


def _has_rows(leaf: Tensor, rows: int) -> bool:
    return leaf.dim() > 0 and len(leaf) == rows


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to what rounding does to the largest of their elements."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return True  # the largest of some numbers, say: rounding may make it another one
    off = (one - other).abs().max() if one.numel() else one.new_zeros(())
    limit = _DIFFERENT.get(one.dtype, 0.05) * one.abs().max().clamp(min=1e-12) if one.numel() else 0.0
    return bool(off <= limit) or not bool(torch.isfinite(off))


def _tolerance(value: Tensor) -> float:
    eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return max(1e-9, min(1e-4, 1e9 * eps), 64 * eps)


def _device_of(samples: Samples) -> torch.device:
    found: list[torch.device] = []
    samples.map(lambda leaf: found.append(leaf.device))
    return found[0]
