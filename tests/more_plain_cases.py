"""More models, losses and optimizers of `tests.plain_cases`: bent losses, objects that count, what meets in a batch."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.plain_cases import CLASSES, FEATURES, WEIGHTS, Made, case, mlp

# --- losses that are put through something


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=WEIGHTS)


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=1)


class Clamped(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output, target).clamp(max=25)


for _name, _loss in {
    "class weights, guarded from above": lambda o, t: weighted(o, t).clamp(max=25),
    "an ignored label, guarded from above": lambda o, t: ignoring(o, t).clamp(max=25),
    "class weights in a subclass, guarded from above": Clamped(weight=WEIGHTS),
    "class weights, flooded far below": lambda o, t: (weighted(o, t) - 0.05).abs() + 0.05,
    "twice the class weights less a constant": lambda o, t: 2 * weighted(o, t) - 0.5,
}.items():
    case(_name)(lambda loss=_loss: Made(mlp(), loss=loss))

_NO_LINE = "would depend on the number of workers|neither a mean nor a sum|does not add up"
case("class weights, flooded where the loss is", _NO_LINE)(
    lambda: Made(mlp(), loss=lambda o, t: (weighted(o, t) - 1.1).abs() + 1.1)
)
case("a mean, flooded where the loss is", _NO_LINE)(
    lambda: Made(mlp(), loss=lambda o, t: (F.cross_entropy(o, t) - 1.1).abs() + 1.1)
)
case("a square root of a mean", _NO_LINE)(lambda: Made(mlp(), loss=lambda o, t: F.cross_entropy(o, t).sqrt()))
case("an exponential of class weights", _NO_LINE)(lambda: Made(mlp(), loss=lambda o, t: weighted(o, t).exp()))

# --- a mean with weights, beside what is 0 at first


class Uncertain(nn.Module):
    """Learns how to weigh its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.s = mlp(), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), self.s.expand(len(x))


def by_uncertainty(loss: Callable[..., Tensor], output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    scores, s = output
    return loss(scores, target) * (-s.mean()).exp() + s.mean()


def anchored(loss: Callable[..., Tensor]) -> Made:
    """Pulled back to where it began."""
    model = mlp()
    start = [p.detach().clone() for p in model.parameters()]

    def pulled(output: Tensor, target: Tensor) -> Tensor:
        away = sum(((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True)), torch.zeros(()))
        return loss(output, target) + 0.5 * away

    return Made(model, loss=pulled)


for _name, _loss in {"a mean": F.cross_entropy, "class weights": weighted, "an ignored label": ignoring}.items():
    case(f"{_name}, weighed by what the model learns")(
        lambda loss=_loss: Made(Uncertain(), loss=functools.partial(by_uncertainty, loss))
    )
    case(f"{_name}, and a pull to where training began")(lambda loss=_loss: anchored(loss))

# --- what counts, in other places


@dataclasses.dataclass
class Record:
    calls: int = 0


class Meter:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class WithRecord(nn.Module):
    def __init__(self, record: Any) -> None:
        super().__init__()
        self.body, self.record = mlp(), record

    def forward(self, x: Tensor) -> Tensor:
        self.record.calls += 1
        return self.body(x) * (1 + 0.1 * self.record.calls)


case("a record that counts")(lambda: Made(WithRecord(Record())))
case("an object with slots that counts")(lambda: Made(WithRecord(Meter())))


def counter() -> Callable[[], float]:
    calls = 0

    def count() -> float:
        nonlocal calls
        calls += 1
        return 1 + 0.1 * calls

    return count


class WithFunction(nn.Module):
    def __init__(self, factor: Callable[[], float]) -> None:
        super().__init__()
        self.body, self.factor = mlp(), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor()


class CountingObject:
    calls = 0

    def __call__(self) -> float:
        type(self).calls += 1
        return 1 + 0.1 * self.calls


@case("an object as an attribute, whose class counts")
def class_of_an_object() -> Made:
    CountingObject.calls = 0
    return Made(WithFunction(CountingObject()))


case("a function as an attribute, which counts")(lambda: Made(WithFunction(counter())))
case("a partial as an attribute, which counts")(lambda: Made(WithFunction(functools.partial(counter()))))


class SlotsLoss:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, target) * (1 + 0.1 * self.calls)


case("a loss with slots that counts")(lambda: Made(mlp(), loss=SlotsLoss()))


@case("a module in the loss's closure, which counts")
def module_in_a_closure() -> Made:
    scale = WithFunction(counter())
    scale.body = nn.Sequential()
    return Made(mlp(), loss=lambda o, t: scale(F.cross_entropy(o, t)))


class Reversed(torch.autograd.Function):
    """Counts how often a gradient went through it."""

    calls = 0

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        Reversed.calls += 1
        return grad * (1 + 0.1 * Reversed.calls)


class ThroughReversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(FEATURES, FEATURES).double(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(Reversed.apply(torch.tanh(self.first(x))))


@case("a gradient's way that counts")
def counting_backward() -> Made:
    Reversed.calls = 0
    return Made(ThroughReversed())


class Slow(nn.Module):
    """Follows its own weights slowly, in a copy that it hides from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.slow = [copy.deepcopy(self.body).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            follow(self.slow[0], self.body)
        return self.body(x) + 0.3 * self.slow[0](x)


def follow(slow: nn.Module, quick: nn.Module) -> None:
    with torch.no_grad():
        for one, other in zip(slow.parameters(), quick.parameters(), strict=True):
            one.lerp_(other, 0.3)


case("a slow copy of the weights, in a list")(lambda: Made(Slow()))


@case("a slow copy of the weights, in the loss's closure")
def slow_in_a_closure() -> Made:
    model = mlp()
    slow = copy.deepcopy(model).requires_grad_(False)

    def pulled(output: Tensor, target: Tensor) -> Tensor:
        follow(slow, model)
        pairs = zip(model.parameters(), slow.parameters(), strict=True)
        return F.cross_entropy(output, target) + sum(((a - b).square().sum() for a, b in pairs), torch.zeros(()))

    return Made(model, loss=pulled)


# --- gathered losses


def ratio(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    kept = target != 1
    return (F.cross_entropy(output, target, reduction="none") * kept).sum(), kept.sum()


case("a sum and a count, gathered")(lambda: Made(mlp(), loss=ratio, options={"gather": True}))
case("a square root of a mean, gathered")(
    lambda: Made(mlp(), loss=lambda o, t: F.cross_entropy(o, t).sqrt(), options={"gather": True})
)
case("class weights, flooded where the loss is, gathered")(
    lambda: Made(mlp(), loss=lambda o, t: (weighted(o, t) - 1.1).abs() + 1.1, options={"gather": True})
)


class RowsAsTime(nn.Module):
    """Rows are taken for moments of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(FEATURES, 8).double(), nn.Linear(8, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if bool(x.mean() > 0.05) else self.body(-x)


class Summing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.cumsum(0))


class Positions(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)[:, None])


class Pairs(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(-1, 2, FEATURES).mean(1).repeat_interleave(2, 0))


_MEETING = "rows of a batch together|would depend on the number of workers|does not add up|neither a mean nor a sum"
for _name, _kind in {
    "rows taken for time": RowsAsTime, "a branch by the batch": Branching, "a sum over rows so far": Summing,
    "positions in the batch": Positions,
}.items():  # fmt: skip
    case(_name, _MEETING)(lambda kind=_kind: Made(kind()))
    case(f"{_name}, gathered", _MEETING)(lambda kind=_kind: Made(kind(), options={"gather": True}))
case("rows in pairs", "but not parts of")(lambda: Made(Pairs()))
case("rows in pairs, gathered", "but not parts of")(lambda: Made(Pairs(), options={"gather": True}))

# --- gradients that are changed on their way to a weight


class BySign(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 0.01 * grad.sign()


class Signed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, width).double(), nn.Linear(width, CLASSES).double()
        self.middle = nn.Parameter(torch.randn(width, width, dtype=torch.float64) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.tanh(self.first(x)) @ BySign.apply(self.middle)))


case("the sign of a weight's gradient", "does not add up")(lambda: Made(Signed(8)))
case("the sign of a large weight's gradient", "does not add up")(lambda: Made(Signed(300)))


class SlowBuffers(nn.Module):
    """Follows its own weights slowly, in buffers that begin as copies of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES).double()
        self.register_buffer("slow", self.layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.slow.lerp_(self.layer.weight.detach(), 0.3)  # type: ignore[operator]
        return self.layer(x) + 0.3 * F.linear(x, self.slow)  # type: ignore[arg-type]


case("a slow copy of the weights, in buffers")(lambda: Made(SlowBuffers()))
