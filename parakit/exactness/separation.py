"""Separation: whether some rows come to the same as one share and as several.

That is what every run on several workers rests on: the loss and the gradient of a batch are sums of what its parts come
to. It is looked at when a model and its loss are tried, and now and then while a run goes on. What looks different is
looked at once more in double precision before anybody believes it, because rounding alone makes differences too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.errors import ModelError, ParakitError
from parakit.exactness.outputs import tensors_in
from parakit.failures.source_lines import describe_error, listing, places_of
from parakit.gradients.forward import call_model
from parakit.losses.summed import ShareLoss, SummedLoss
from parakit.model_state.undisturbed import Still
from parakit.serialization import freeze

__all__ = ["Difference", "Separation", "cut_of", "difference", "outputs_alone", "part_fails"]

_SMALL = 1 << 22  # elements; of larger parameters, one at a time is looked at
_FIRST_TURNS, _EVERY_TURN = 3, 4  # in which turns
_MOST_PARAMETERS = 48
# Of the gradient or the loss. Another order of adding makes less; a kink that one row passes by rounding makes more.
_SUSPICIOUS = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 0.05, torch.float16: 0.02}
_WRONG = 1e-9  # the same in double precision, which decides
_LEAST = 1e-8  # times the loss
_UNCONFIRMED = 1e-2  # where there is no double precision to decide


@dataclass(frozen=True)
class Difference:
    """What does not add up.

    Attributes
    ----------
    what : {"loss", "gradient"}
    rows, cut : int
        How many samples, and of how many the first part was.
    whole, parts : float
        What they came to: losses, or the gradient in the place where it differs most.
    by : float
        The difference, relative.
    kind : torch.dtype
        The least precise type that took part.
    """

    what: str
    rows: int
    cut: int
    whole: float
    parts: float
    by: float
    kind: torch.dtype = torch.float64


@dataclass(frozen=True)
class _Outcome:
    """Of some rows: the summed loss, the count, the gradient in some places, and norms."""

    total: float
    count: float
    rows: int
    gradient: Tensor
    size: float
    weights: tuple[float, ...]
    kind: torch.dtype


class Separation:
    """Looks at one model and its loss.

    Parameters
    ----------
    model : nn.Module
    loss : SummedLoss
    still : Still
    needs_grad : bool
        Whether forward cannot do without gradients.
    """

    def __init__(self, model: nn.Module, loss: SummedLoss, still: Still, *, needs_grad: bool = False) -> None:
        self._model, self._loss, self._still = model, loss, still
        self._needs_grad = needs_grad
        trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
        by_size = sorted(trained, key=lambda p: p.numel())
        sums = list(accumulate(p.numel() for p in by_size))
        small = {id(p) for p, together in zip(by_size, sums, strict=True) if together <= _SMALL}
        in_order = [p for p in trained if id(p) in small]
        step = -(-len(in_order) // _MOST_PARAMETERS)
        self._looked_at = in_order[:: max(1, step)]  # spread over the depth of the model
        self._others = [p for p in trained if id(p) not in {id(p) for p in self._looked_at}]
        self._turn = 0

    def keeping_all(self) -> Separation:
        """The same, which lets nothing at all be kept from call to call."""
        return Separation(self._model, self._loss, self._still.keeping_all(), needs_grad=self._needs_grad)

    def look(self, samples: Samples, cut: int, *, gradient: bool) -> Difference | None:
        """Compare some rows as one share with two parts of them; what differs for certain.

        Parameters
        ----------
        samples : Samples
            At least two rows.
        cut : int
            Rows in the first part.
        gradient : bool
            Whether to compare gradients too.
        """
        self._turn += 1
        found = self._compare(samples, cut, gradient=gradient)
        if found is None or found.by <= _SUSPICIOUS.get(found.kind, 0.05):
            return None
        if found.kind == torch.float64:
            return found
        try:
            with torch.autocast("cpu", enabled=False):
                doubles = self._in_doubles()
                doubles._turn = self._turn
                again = doubles._compare(_doubled(samples), cut, gradient=gradient)
        except Exception:  # constants of another type, most of all
            again = None
        else:
            if again is None or again.by <= _WRONG:
                return None
        if again is None or again.kind != torch.float64:  # a loss that computes in another type, whatever it is given
            return found if found.by > max(_UNCONFIRMED, _SUSPICIOUS.get(found.kind, 0.05)) else None
        return again

    def _in_doubles(self) -> Separation:
        model, loss = freeze((self._model, self._loss)).thaw()
        model.double()
        if isinstance(loss.function, nn.Module):
            loss.function.double()
        return Separation(model, loss, self._still.of(model, loss.function), needs_grad=self._needs_grad)

    def _compare(self, samples: Samples, cut: int, *, gradient: bool) -> Difference | None:
        rows = len(samples)
        with self._still.kept():
            whole = self._outcome(samples, gradient, None)
            try:
                parts = [
                    self._outcome(samples.slice(first, end), gradient, whole) for first, end in ((0, cut), (cut, rows))
                ]
            except ParakitError:
                raise
            except Exception as error:
                raise part_fails(error, rows, cut) from error
        count = sum(part.count for part in parts)
        one, other = whole.total / (whole.count or 1.0), sum(part.total for part in parts) / (count or 1.0)
        by = abs(one - other) / max(abs(one), abs(other), 1e-6)
        if one != one or other != other or one in (float("inf"), float("-inf")):
            return None  # the run finds that by itself
        worst = Difference("loss", rows, cut, one, other, by, whole.kind)
        if not gradient:
            return worst
        together = sum((part.gradient for part in parts), torch.zeros_like(whole.gradient)) / (count or 1.0)
        alone = whole.gradient / (whole.count or 1.0)
        size = max(whole.size / (whole.count or 1.0), sum(part.size for part in parts) / (count or 1.0))
        size = max(size, _LEAST * max(abs(one), 1.0))  # a gradient that is nothing but rounding tells nothing
        off = (alone - together).abs() / size
        place = int(off.argmax())
        if float(off[place]) > by:
            numbers = float(alone[place]), float(together[place]), float(off[place])
            worst = Difference("gradient", rows, cut, *numbers, whole.kind)
        return worst

    def _outcome(self, samples: Samples, gradient: bool, whole: _Outcome | None) -> _Outcome:
        wanted = gradient or self._needs_grad
        weights: list[float] = []

        def divide(number: int, of_these: Any) -> float:
            weights.append(float(of_these))
            return weights[-1] if whole is None else whole.weights[number] * len(samples) / whole.rows

        rows = samples.copy_rows()
        with self._still.once(), torch.set_grad_enabled(wanted):
            share = self._loss.of_share(lambda: call_model(self._model, rows.inputs), rows.targets, divide)
            places, size = self._gradient(share) if gradient else (torch.zeros(1, dtype=torch.float64), 0.0)
        kind = _coarsest(self._model, share.value)
        return _Outcome(share.total, share.count, len(samples), places, size, tuple(weights), kind)

    def _gradient(self, share: ShareLoss) -> tuple[Tensor, float]:
        """Some numbers that go linearly by the gradient of the summed loss, and its norm."""
        root = share.value.new_full(share.value.shape, share.weight)
        now = self._others and (self._turn <= _FIRST_TURNS or self._turn % _EVERY_TURN == 0)
        turn = [self._others[self._turn % len(self._others)]] if now else []
        looked_at = [p for p in (*self._looked_at, *turn) if p.requires_grad]  # forward may have set it
        grads = torch.autograd.grad(share.value, looked_at, root, allow_unused=True)
        numbers, squared = [torch.zeros(1, dtype=torch.float64)], 0.0
        for parameter, grad in zip(looked_at, grads, strict=True):
            flat = (torch.zeros_like(parameter) if grad is None else grad).detach().to_dense().reshape(-1)
            flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
            flat = flat.float() if flat.dtype.itemsize < 4 else flat
            squared += float(torch.linalg.vector_norm(flat)) ** 2
            total = flat.sum().reshape(1).double() / len(flat) ** 0.5
            numbers += [total, flat[:: max(1, len(flat) // 64)].double()]
        return torch.cat(numbers), squared**0.5


def difference(found: Difference, where: str) -> str:
    """A difference in words."""
    first, second = found.cut, found.rows - found.cut
    if found.what == "loss":
        return (
            f"{where}on {found.rows} samples the loss is {found.whole:.6g}, but its parts of {first} and {second} "
            f"samples come to {found.parts:.6g}"
        )
    return (
        f"{where}the gradient of {found.rows} samples is not the sum of those of {first} and {second} of them: "
        f"{found.whole:.6g} and {found.parts:.6g} in one place"
    )


def part_fails(error: Exception, rows: int, cut: int) -> ModelError:
    """The error for rows that go through together, and not in parts."""
    return ModelError(
        f"{rows} samples go through the model and the loss, but not parts of {cut} and {rows - cut} of them: "
        f"{describe_error(error)}",
        where=listing(places_of(error)),
        cause="a batch that must have some sizes, such as an even one: a worker's share of it may have any",
        remedy="make what belongs together, such as a pair, one row of the data; or pad what is missing in forward",
    )


def outputs_alone(output: Any, _target: Any) -> Tensor:
    """A sum over samples of nothing but outputs: in the place of a loss that gets those of the whole batch."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in tensors_in(output):
        if leaf.is_floating_point() and leaf.dim():
            flat = leaf.reshape(len(leaf), -1).double()
            weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=torch.float64, device=flat.device)
            total = total.to(flat.device) + (flat * weights).sum() + flat.square().sum()
    return total


def _coarsest(model: nn.Module, value: Tensor) -> torch.dtype:
    """The least precise type of floating point that takes part."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} | {value.dtype}
    if torch.is_autocast_enabled("cpu"):
        kinds.add(torch.get_autocast_dtype("cpu"))
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def _doubled(samples: Samples) -> Samples:
    return samples.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)


def cut_of(rows: int, number: int) -> int:
    """Where to cut some rows, unevenly and elsewhere each time."""
    return max(1, min(rows - 1, (rows // 3, rows // 2, 2 * rows // 3)[number % 3]))
