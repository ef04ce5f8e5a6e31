"""Models, layouts, types, losses and optimizers drawn at random: each trains as in a plain loop of the same batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.utils as U
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import parakit as pk
from tests.plain_cases import Made
from tests.test_same_as_plain import BATCH, SEED, difference, plain, taken

ROWS, STEPS, SIDE, CHANNELS, CLASSES = 120, 5, 4, 3, 4
# Of the largest value: what one order of adding or another does to some steps.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.05, torch.float16: 0.02}

pytestmark = pytest.mark.dask


# --- layers, each from images to images


class Shifted(nn.Module):
    """A parameter that is a part of another memory: with gaps, or in another order."""

    def __init__(self, how: str) -> None:
        super().__init__()
        wide = torch.randn(CHANNELS, 2 * CHANNELS) * 0.3
        self.w = nn.Parameter({"gaps": wide[:, ::2], "transposed": wide[:, :CHANNELS].t()}[how])

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", x, self.w)


class TwiceTheSame(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = convolution(), convolution()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))


class Clamped(nn.Module):
    """A layer whose forward keeps its weights small."""

    def __init__(self) -> None:
        super().__init__()
        self.c = convolution()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.c.weight.clamp_(-0.2, 0.2)
        return self.c(x)


class Warming(nn.Module):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + min(self.calls, 8) / 8)


class Normalized(nn.Module):
    """A norm over each image. (torch's own GroupNorm of few channels ends the process in channels_last.)"""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
        return centred * (centred.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-3).rsqrt()


class Scaled(nn.Module):
    """A parameter of a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(1.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s


def convolution() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


def hooked() -> nn.Module:
    layer = convolution()
    layer.weight.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
    return layer


def half_frozen() -> nn.Module:
    layer = convolution()
    layer.bias.requires_grad_(False)  # type: ignore[union-attr]
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": convolution,
    "tanh": nn.Tanh,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "normalized": Normalized,
    "norm in eval mode": lambda: nn.BatchNorm2d(CHANNELS).eval(),
    "gaps": lambda: Shifted("gaps"),
    "transposed": lambda: Shifted("transposed"),
    "twice the same": TwiceTheSame,
    "weight norm": lambda: U.parametrizations.weight_norm(convolution()),
    "clamped": Clamped,
    "warming": Warming,
    "scaled": Scaled,
    "hooked": hooked,
    "half frozen": half_frozen,
    "one group each": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, groups=CHANNELS, bias=False),
}

# --- losses, of outputs with a column for each class


def by_sum_and_count(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    kept = target != 1
    return (F.cross_entropy(output.double(), target, reduction="none") * kept).sum(), kept.sum()


LOSSES: dict[str, Any] = {
    "cross entropy": nn.CrossEntropyLoss(),
    "a function": lambda o, t: F.cross_entropy(o.double(), t),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "an ignored label": nn.CrossEntropyLoss(ignore_index=2),
    "a weighted function": lambda o, t: F.cross_entropy(o.double(), t, weight=torch.arange(1.0, CLASSES + 1).double()),
    "a sum": lambda o, t: F.cross_entropy(o.double(), t, reduction="sum") / BATCH,
    "a sum and a count": by_sum_and_count,
    "squares": lambda o, t: (o.double() - F.one_hot(t, CLASSES)).square().mean(),
}

# --- optimizers

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.05),
    "momentum": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "foreach": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.5, foreach=True),
}
# These divide by roots of squared gradients. What half precision leaves of a square is mostly rounding: `eps` must be
# larger there, or the steps of a plain loop differ from each other.
BY_ROOTS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "AdamW, amsgrad": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.02),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
}


def optimizer_of(name: str, dtype: torch.dtype) -> Callable[..., torch.optim.Optimizer]:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    return functools.partial(BY_ROOTS[name], eps=0.2 if dtype.itemsize == 2 else 1e-2)


@dataclass(frozen=True)
class Drawn:
    """One draw."""

    layers: tuple[str, ...]
    channels_last: bool
    dtype: torch.dtype
    loss: str
    optimizer: str
    clip: float | None
    seed: int

    def made(self) -> Made:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            body = [LAYERS[name]() for name in self.layers]
            model = nn.Sequential(*body, nn.Flatten(), nn.Linear(CHANNELS * SIDE * SIDE, CLASSES)).to(self.dtype)
            inputs = torch.randn(ROWS, CHANNELS, SIDE, SIDE).to(self.dtype)
            targets = torch.randint(CLASSES, (ROWS,))
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        options = {} if self.clip is None else {"clip_norm": self.clip}
        optimizer = optimizer_of(self.optimizer, self.dtype)
        return Made(model, LOSSES[self.loss], inputs, targets, optimizer, options, train=False)


DRAWS = st.builds(
    Drawn,
    layers=st.lists(st.sampled_from(sorted(LAYERS)), max_size=4).map(tuple),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    loss=st.sampled_from(sorted(LOSSES)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS | BY_ROOTS)),
    clip=st.sampled_from([None, None, 0.1]),
    seed=st.integers(0, 999),
)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, pk.Workers]]:
    with pk.connect(2) as processes, pk.connect("inline") as inline:
        yield {"processes": processes, "inline": inline}


def compare(drawn: Drawn, on: pk.Workers, workers: int, strategy: Any) -> None:
    losses, expected = plain(drawn.made(), STEPS)
    made = drawn.made()
    run = pk.train(
        made.model, (made.inputs, made.targets), on=on, workers=workers, strategy=strategy, loss=made.loss,
        optimizer=made.optimizer, batch_size=BATCH, steps=STEPS, seed=SEED, **made.options,
    )  # fmt: skip
    run.wait(timeout=60, progress=False)
    limit = ROUNDING[drawn.dtype]
    assert max(abs(a - b) for a, b in zip(run.history.losses.tolist(), losses, strict=True)) <= limit * max(losses)
    largest = max(float(p.detach().abs().max()) for p in expected.parameters())
    assert difference(run.model, expected) <= limit * max(1.0, largest)
    start = drawn.made().model
    moved = difference(start, expected)
    assert moved > 0, "it learns"
    # In half precision a step may be smaller than the rounding that is allowed: as much must have changed as in plain.
    assert difference(start, run.model) >= 0.5 * moved


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(drawn=DRAWS, workers=st.integers(1, 3))
def test_drawn_models_train_as_in_a_plain_loop(pools: dict[str, pk.Workers], drawn: Drawn, workers: int) -> None:
    compare(drawn, pools["inline"], workers, pk.strategies.AllReduce())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    drawn=DRAWS,
    workers=st.integers(1, 2),
    strategy=st.sampled_from([
        pk.strategies.AllReduce(exchange="shared memory"), pk.strategies.AllReduce(exchange="gloo"),
        pk.strategies.AllReduce(exchange="shared memory", shard=False), pk.strategies.MapReduce(),
    ]),
)  # fmt: skip
def test_drawn_models_train_so_in_processes(
    pools: dict[str, pk.Workers], drawn: Drawn, workers: int, strategy: Any
) -> None:
    refused = isinstance(strategy, pk.strategies.MapReduce) and "clamped" in drawn.layers
    if not refused:  # its tasks cannot speak to each other, and say so: see test_bad_input.py
        compare(drawn, pools["processes"], workers, strategy)


def test_rows_are_taken_in_any_layout() -> None:
    """What the comparison rests on: a plain loop gets the rows that a run gets, in the layout that it was given."""
    images = torch.randn(ROWS, CHANNELS, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    assert torch.equal(taken(images, torch.arange(3)), images[:3])
