"""Models, losses and optimizers as people write them, each of which is to train as in a plain loop, or to be refused.

A case makes everything anew from a seed, so that a plain loop and a run share no object. All of it is in doubles, and
nothing in it is random.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.utils as U
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

ROWS, FEATURES, CLASSES = 120, 6, 3
PARAMETRIZE = U.parametrizations


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass
class Made:
    """What a run and a plain loop are given."""

    model: nn.Module
    loss: Any = field(default_factory=nn.CrossEntropyLoss)
    inputs: Any = None
    targets: Any = None
    optimizer: Callable[[Any], Any] = sgd
    options: dict[str, Any] = field(default_factory=dict)
    train: bool = True  # whether a plain loop would call model.train()
    default: torch.dtype = torch.float32  # that the process has

    def __post_init__(self) -> None:
        self.inputs = numbers() if self.inputs is None else self.inputs
        self.targets = labels() if self.targets is None else self.targets


@dataclass(frozen=True)
class Case:
    """One kind of thing."""

    name: str
    make: Callable[[], Made]
    refused: str = ""  # what the refusal says, where there is one


CASES: dict[str, Case] = {}


def case(name: str, refused: str = "") -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        assert name not in CASES
        CASES[name] = Case(name, make, refused)
        return make

    return add


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(ROWS, *(shape or (FEATURES,)), generator=generator(seed), dtype=torch.float64)


def labels(*shape: int, classes: int = CLASSES, seed: int = 2) -> Tensor:
    return torch.randint(0, classes, (ROWS, *shape), generator=generator(seed))


def mlp(inputs: int = FEATURES, outputs: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def images() -> Tensor:
    return numbers(3, 6, 6)


def cnn() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(288, CLASSES)).double()


# --- layers and layouts

case("a perceptron")(lambda: Made(mlp()))
case("a convolutional network")(lambda: Made(cnn(), inputs=images()))
case("channels_last, SGD")(lambda: Made(cnn().to(memory_format=torch.channels_last), inputs=images()))
case("channels_last, Adam")(
    lambda: Made(
        cnn().to(memory_format=torch.channels_last), inputs=images(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)
    )
)
case("channels_last inputs too, AdamW with amsgrad")(
    lambda: Made(
        cnn().to(memory_format=torch.channels_last),
        inputs=images().contiguous(memory_format=torch.channels_last),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    )
)
case("channels_last in three dimensions")(
    lambda: Made(
        nn.Sequential(nn.Conv3d(2, 4, 2), nn.Flatten(), nn.Linear(32, CLASSES))
        .double()
        .to(memory_format=torch.channels_last_3d),
        inputs=numbers(2, 3, 3, 3),
    )
)


class Transposed(nn.Module):
    """Weights whose elements lie column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.float64).t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


case("transposed weights, SGD")(lambda: Made(Transposed()))
case("transposed weights, Adagrad")(lambda: Made(Transposed(), optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1)))


class Gaps(nn.Module):
    """Weights that are every other column of a wider matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(CLASSES, 2 * FEATURES, dtype=torch.float64)[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


case("weights with gaps in memory")(lambda: Made(Gaps(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = mlp(), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


case("a parameter of a single number")(lambda: Made(Scaled()))
case("a transposed convolution")(
    lambda: Made(
        nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(576, CLASSES)).double(),
        inputs=images(),
    )
)
case("layer, group and instance normalisation")(
    lambda: Made(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.LayerNorm(64),
            nn.Linear(64, CLASSES),
        ).double(),
        inputs=images(),
    )
)  # fmt: skip


class Last(nn.Module):
    """The last state of a recurrent network."""

    def __init__(self, kind: Any, **how: Any) -> None:
        super().__init__()
        self.r = kind(FEATURES, 8, batch_first=True, **how)
        self.o = nn.Linear(16 if how.get("bidirectional") else 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0][:, -1])


case("a GRU")(lambda: Made(Last(nn.GRU).double(), inputs=numbers(5, FEATURES)))
case("a bidirectional LSTM of two layers")(
    lambda: Made(Last(nn.LSTM, num_layers=2, bidirectional=True).double(), inputs=numbers(5, FEATURES))
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.i, self.t, self.o = nn.Linear(FEATURES, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.t(self.i(x), mask=nn.Transformer.generate_square_subsequent_mask(5).double()).mean(1))


case("a transformer")(lambda: Made(Attention().double(), inputs=numbers(5, FEATURES)))

WORDS = 40


def words(length: int = 5) -> Tensor:
    return labels(length, classes=WORDS, seed=3)


class Words(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(WORDS, 8, **how), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.e(x).mean(1))


case("an embedding")(lambda: Made(Words().double(), inputs=words()))
case("an embedding with padding")(lambda: Made(Words(padding_idx=0).double(), inputs=words()))
case("an embedding with sparse gradients")(lambda: Made(Words(sparse=True).double(), inputs=words()))
case("an embedding with a largest norm")(lambda: Made(Words(max_norm=1.0).double(), inputs=words()))
case("an embedding with a largest norm, Adam")(
    lambda: Made(Words(max_norm=0.5).double(), inputs=words(), optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
)
case("a bag of embeddings with a largest norm")(
    lambda: Made(nn.EmbeddingBag(WORDS, CLASSES, max_norm=0.7).double(), inputs=words())
)


class Branching(nn.Module):
    """Takes a branch by what a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.rare = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rare = x[:, 0] > 2.0
        return self.common(x) + rare[:, None] * self.rare(x) if bool(rare.any()) else self.common(x)


case("a branch that few samples take")(
    lambda: Made(Branching().double(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1))
)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda h: torch.tanh(self.a(h)), x.requires_grad_(), use_reentrant=False))


case("activations that are computed again")(lambda: Made(Recomputed().double()))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.body(torch.cat([left, right], 1))


case("several inputs, by name")(lambda: Made(TwoInputs(), inputs={"left": numbers()[:, :2], "right": numbers()[:, 2:]}))
case("several inputs, in a tuple")(lambda: Made(TwoInputs(), inputs=(numbers()[:, :2], numbers()[:, 2:])))

# --- modes and frozen parts


@case("a frozen backbone in eval mode")
def frozen_backbone() -> Made:
    back = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)).double()
    back[1].running_mean.uniform_(-1, 1)  # type: ignore[operator]
    model = nn.Sequential(back, nn.Linear(8, CLASSES).double())
    back.requires_grad_(False).eval()
    return Made(model, train=False)


@case("normalisation in eval mode that trains its weights")
def normalised_in_eval() -> Made:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
    model[1].eval()
    return Made(model, train=False)


@case("a root in eval mode with one layer in training mode")
def root_in_eval() -> Made:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double().eval()
    model[2].train()
    return Made(model, train=False)


@case("frozen weights")
def frozen_weights() -> Made:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return Made(model)


# --- parametrizations

for _name, _make in {
    "weight_norm": PARAMETRIZE.weight_norm,
    "orthogonal weights": PARAMETRIZE.orthogonal,
    "spectral_norm": PARAMETRIZE.spectral_norm,
    "the older weight_norm": U.weight_norm,
    "the older spectral_norm": U.spectral_norm,
    "pruned weights": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
}.items():

    def _parametrized(make: Any = _make) -> Made:
        return Made(nn.Sequential(make(nn.Linear(FEATURES, 16)), nn.Tanh(), nn.Linear(16, CLASSES)).double())

    case(_name)(_parametrized)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


@case("a parametrization of one's own")
def own_parametrization() -> Made:
    layer = nn.Linear(FEATURES, FEATURES)
    U.parametrize.register_parametrization(layer, "weight", Symmetric())
    return Made(nn.Sequential(layer, nn.Linear(FEATURES, CLASSES)).double())


# A plain loop wakes lazy layers with its first batch; here they are woken by other rows, to the same shapes, and given
# the same values by the loss function's maker.
class Waking(nn.Module):
    """Layers without a shape, whose values do not depend on chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LazyLinear(8, dtype=torch.float64), nn.LazyLinear(CLASSES, dtype=torch.float64)

        def fill(layer: nn.Module, _: Any) -> None:
            if not hasattr(layer, "filled"):
                layer.filled = True
                for parameter in layer.parameters():
                    nn.init.constant_(parameter, 0.1)

        for layer in (self.a, self.b):
            layer.register_forward_pre_hook(fill)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x * torch.arange(1.0, FEATURES + 1, dtype=torch.float64))))


case("lazy layers")(lambda: Made(Waking()))

# --- ties


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.e, self.d = nn.Linear(FEATURES, 8, bias=False), nn.Linear(8, FEATURES, bias=False)
        self.o, self.how = nn.Linear(FEATURES, CLASSES), how
        if how == "parameter":
            self.d = nn.Linear(FEATURES, 8, bias=False)
            self.d.weight = self.e.weight
        elif how == "view":
            self.d.weight = nn.Parameter(self.e.weight.t())
        elif how == "computed":
            del self.d
            self.w = self.e.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.e(x))
        if self.how == "computed":
            return self.o(F.linear(h, self.w))
        if self.how == "parameter":
            return self.o(F.linear(h, self.d.weight.t()))
        return self.o(self.d(h))


case("weights that are one parameter in two places")(lambda: Made(Tied("parameter").double()))


@case("two parameters in one memory")
def two_parameters_in_one_memory() -> Made:
    model = Tied("none").double()
    model.d.weight = nn.Parameter(model.e.weight.t())
    return Made(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.05))


@case("weights computed from others when the model is made", "was computed from parameters when the model was made")
def weights_computed_once() -> Made:
    model = Tied("none").double()
    del model.d
    model.w, model.how = model.e.weight.t(), "computed"
    return Made(model)


# --- what forward does to parameters


class Constrained(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.l, self.how = nn.Linear(FEATURES, CLASSES), how

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.how == "clamped":
                self.l.weight.clamp_(-0.3, 0.3)
            elif self.how == "normalised":
                self.l.weight.data = F.normalize(self.l.weight.data, dim=1)
            elif self.how == "decayed":
                self.l.weight.mul_(0.99)
            elif self.how == "copied":
                self.l.weight.copy_(self.l.weight - self.l.weight.mean())
            elif self.how == "by data":
                self.l.weight.add_(x.mean(0)[None], alpha=0.01)
        if self.how == "replaced":
            self.l.weight = nn.Parameter(self.l.weight.detach() * 0.99)
        return self.l(x)


for _how in ("clamped", "normalised", "decayed", "copied"):
    case(f"weights {_how} in forward")(lambda how=_how: Made(Constrained(how).double()))
case("weights changed by the data in forward", "in a way that several workers cannot put together")(
    lambda: Made(Constrained("by data").double())
)
case("a parameter replaced in forward", "puts another parameter in the place of")(
    lambda: Made(Constrained("replaced").double())
)


class Restructured(nn.Module):
    """Does something to its own parts in forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, FEATURES, bias=False), nn.Linear(FEATURES, FEATURES, bias=False)
        self.o, self.how, self.calls = nn.Linear(FEATURES, CLASSES), how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.how == "in one memory":
            self.b.weight.data = self.a.weight.data
        elif self.how == "tied":
            self.b.weight = self.a.weight
        elif self.how == "frozen" or (self.how == "frozen later" and self.calls == 4):
            self.a.requires_grad_(False)
        elif self.how == "unfrozen later":
            self.a.requires_grad_(self.calls >= 4)
        elif self.how == "grown later" and self.calls == 4:
            self.more = nn.Linear(FEATURES, FEATURES).double()
        elif self.how == "in evaluation later" and self.calls == 4:
            self.b.eval()
        elif self.how == "writing to its inputs":
            x.mul_(0.9)
        return self.o(self.b(torch.tanh(self.a(x))))


for _how, _refused in {
    "in one memory": "puts parameter b.weight into the memory of parameter a.weight",
    "tied": "takes parameters away: b.weight",
    "frozen": "has set requires_grad of parameter a.weight to False",
    "frozen later": "has set requires_grad of parameter a.weight to False",
    "unfrozen later": "has set requires_grad of parameter a.weight to",
    "grown later": "makes parameters: more.weight",
    "in evaluation later": "",
    "writing to its inputs": "",
}.items():
    case(f"layers in forward: {_how}", _refused)(lambda how=_how: Made(Restructured(how).double()))


class WritesTargets(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        target[target == 2] = -100
        return super().forward(output, target)


case("a loss that writes to its targets")(lambda: Made(mlp(), loss=WritesTargets()))

# --- buffers


class Buffered(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.l, self.how = nn.Linear(FEATURES, CLASSES), how
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("largest", torch.full((FEATURES,), -1e9, dtype=torch.float64))
        self.register_buffer("average", torch.randn(CLASSES, FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training and self.how == "counts":
                self.steps += 1
                self.average.mul_(0.9).add_(self.l.weight, alpha=0.1)
            elif self.training and self.how == "rows":
                self.seen += len(x)
            elif self.training and self.how == "largest":
                self.largest = torch.maximum(self.largest, x.amax(0))
        return self.l(x) * (1 + 0.01 * self.steps) + 0.1 * x @ self.average.t()


case("a buffer that counts steps, and a slow copy of the weights")(lambda: Made(Buffered("counts").double()))
case("a buffer that counts rows, without a rule", "changes a buffer in forward by the rows it sees")(
    lambda: Made(Buffered("rows").double())
)
case("a buffer that counts rows, with the rule sum")(
    lambda: Made(Buffered("rows").double(), options={"buffers": {"seen": "sum"}})
)
case("a largest value, with the rule max")(
    lambda: Made(Buffered("largest").double(), options={"buffers": {"larg*": "max"}})
)


class Late(nn.Module):
    """Makes a buffer when it is called, or begins to change one late."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.l, self.how, self.calls = nn.Linear(FEATURES, CLASSES), how, 0
        if "later" in how:
            self.register_buffer("made", torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.how == "a mask, made once" and not hasattr(self, "made"):
            self.register_buffer("made", torch.linspace(0.5, 1, x.shape[1], dtype=x.dtype), persistent=False)
        elif self.how == "a mask, made anew each time":
            self.register_buffer("made", torch.linspace(0.5, 1, x.shape[1], dtype=x.dtype))
        elif self.how == "from the first rows" and not hasattr(self, "made"):
            self.register_buffer("made", x.mean(0))
        elif self.how == "that changes later" and self.calls > 4:
            self.made += 0.1
        elif self.how == "that grows later" and self.calls > 4:
            self.made = torch.cat([self.made, self.made[:1]])
        return self.l(x * self.made.mean() if "grows" in self.how else x * self.made)


for _how, _refused in {
    "a mask, made once": "",
    "a mask, made anew each time": "",
    "from the first rows": "forward makes the buffer made when it is called",
    "that changes later": "began to keep something from call to call|has changed the buffer made",
    "that grows later": "changes the buffer made from float64 of shape",
}.items():
    case(f"a buffer in forward: {_how}", _refused)(lambda how=_how: Made(Late(how).double()))


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.ReLU(), nn.Linear(8, CLASSES)).double()


case("synchronised batch normalisation")(lambda: Made(with_norm(nn.SyncBatchNorm(8))))
case("synchronised batch normalisation with a running mean over all steps")(
    lambda: Made(with_norm(nn.SyncBatchNorm(8, momentum=None)))
)
case("synchronised batch normalisation without weights or statistics")(
    lambda: Made(with_norm(nn.SyncBatchNorm(8, affine=False, track_running_stats=False)))
)
case("synchronised batch normalisation of images")(
    lambda: Made(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(64, CLASSES)).double(),
        inputs=images(),
    )
)

# --- attributes that count


class Warming(nn.Module):
    def __init__(self, how: str = "number") -> None:
        super().__init__()
        self.l, self.how, self.calls, self.log = nn.Linear(FEATURES, CLASSES), how, 0, {"calls": [0]}
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "rows":
            self.calls += len(x)
        elif self.training:
            self.calls += 1
            self.log["calls"][0] += 2
            self.last = self.l(x).detach()
        return self.l(x) * (1 + min(self.log["calls"][0] if self.how == "deep" else self.calls, 30) / 30)


case("a number that counts calls")(lambda: Made(Warming().double()))
case("a list in a dict that counts calls")(lambda: Made(Warming("deep").double()))
case("a number that counts rows", "goes from call to call, and is otherwise for other rows")(
    lambda: Made(Warming("rows").double())
)


class Switching(nn.Module):
    """Weighs otherwise after some calls."""

    def __init__(self, after: int = 6) -> None:
        super().__init__()
        self.calls, self.after = 0, after

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, target) * (1.0 if self.calls <= self.after else 0.1)


case("a loss that counts its calls")(lambda: Made(mlp(), loss=Switching()))


@case("a loss that counts in the function around it")
def counting_closure() -> Made:
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(output, target) * (1.0 + 0.05 * calls)

    return Made(mlp(), loss=loss)


_calls = 0


def counting_globally(output: Tensor, target: Tensor) -> Tensor:
    global _calls
    _calls += 1
    return F.cross_entropy(output, target) * (1.0 + 0.05 * _calls)


@case("a loss that counts in a global variable")
def counting_global() -> Made:
    global _calls
    _calls = 0
    return Made(mlp(), loss=counting_globally)


class LateCount(nn.Module):
    """Begins to count late."""

    def __init__(self, *, rows: bool) -> None:
        super().__init__()
        self.l, self.calls, self.late, self.rows = nn.Linear(FEATURES, CLASSES), 0, 0, rows

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 4:
            self.late += len(x) if self.rows else 1
        return self.l(x) * (1 + 0.1 * self.late)


case("a number that counts calls from the fifth on")(lambda: Made(LateCount(rows=False).double()))
case("a number that counts rows from the fifth call on", "would depend on the number of workers")(
    lambda: Made(LateCount(rows=True).double())
)


class Counting(nn.Module):
    """Counts its calls where Python lets it."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(FEATURES, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) * self.scale()

    def scale(self) -> float:
        raise NotImplementedError


class CountingInItsClass(Counting):
    def scale(self) -> float:
        type(self).calls += 1
        return 1 + 0.1 * self.calls


class CountingGlobally(Counting):
    def scale(self) -> float:
        global _calls
        _calls += 1
        return 1 + 0.1 * _calls


class CountingInADefault(Counting):
    def scale(self, calls: list[int] = [0]) -> float:  # noqa: B006
        calls[0] += 1
        return 1 + 0.1 * calls[0]


@case("a class that counts the calls of its instances")
def counting_class() -> Made:
    CountingInItsClass.calls = 0
    return Made(CountingInItsClass())


@case("a method that counts in a global variable")
def counting_method() -> Made:
    global _calls
    _calls = 0
    return Made(CountingGlobally())


@case("a method that counts in a default argument")
def counting_default() -> Made:
    CountingInADefault.scale.__defaults__[0][0] = 0  # type: ignore[index]
    return Made(CountingInADefault())


class CountingHook:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any) -> Tensor:
        output: Tensor = args[-1]
        self.calls += 1
        return output * (1 + 0.1 * self.calls)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self(output), target)


def counting_hook(by: float) -> Callable[..., Tensor]:
    calls = 0

    def hook(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return args[-1] * (1 + by * calls)

    return hook


@case("hooks that count, made by one function")
def counting_hooks() -> Made:
    model = mlp()
    model[0].register_forward_hook(counting_hook(0.1))
    model[2].register_forward_hook(counting_hook(0.01))
    return Made(model)


@case("a hook on a parameter that counts")
def counting_parameter_hook() -> Made:
    model = mlp()
    model[0].weight.register_hook(counting_hook(0.1))
    return Made(model)


@case("an object as a hook, which counts")
def counting_hook_object() -> Made:
    model = mlp()
    model[1].register_forward_hook(CountingHook())
    return Made(model)


case("a method of an object as the loss, which counts")(lambda: Made(mlp(), loss=CountingHook().loss))


@case("a loss that counts in an attribute of itself")
def counting_function() -> Made:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        loss.calls += 1  # type: ignore[attr-defined]
        return F.cross_entropy(output, target) * (1 + 0.05 * loss.calls)  # type: ignore[attr-defined]

    loss.calls = 0  # type: ignore[attr-defined]
    return Made(mlp(), loss=loss)


@case("a partial whose argument counts")
def counting_partial() -> Made:
    def loss(output: Tensor, target: Tensor, calls: list[int]) -> Tensor:
        calls[0] += 1
        return F.cross_entropy(output, target) * (1 + 0.05 * calls[0])

    return Made(mlp(), loss=functools.partial(loss, calls=[0]))


class OwnNumbers(nn.Module):
    """Draws from a generator of its own, as many numbers whatever the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.g = nn.Linear(FEATURES, CLASSES), torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(FEATURES, generator=self.g, dtype=torch.float64) if self.training else 0.0
        return self.l(x + 0.1 * noise)


case("a generator of the model's own")(lambda: Made(OwnNumbers().double()))

# --- hooks


@case("hooks that scale gradients of parameters")
def scaling_hooks() -> Made:
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad * 0.3)
    model[2].bias.register_hook(lambda grad: grad * 2)
    return Made(model)


@case("hooks that clip gradients of parameters")
def clipping_hooks() -> Made:
    model = mlp()
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    return Made(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))


@case("hooks after gradients are there")
def hooks_after() -> Made:
    model = mlp()

    def sign(parameter: Tensor) -> None:
        parameter.grad = parameter.grad.sign()  # type: ignore[union-attr]

    model[0].weight.register_post_accumulate_grad_hook(sign)
    return Made(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))


@case("a hook on activations that divides by the norm of a gradient", "does not add up over samples")
def norm_hook() -> Made:
    model = mlp()
    model[1].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda grad: grad / (grad.norm() + 1e-6)) and None
    )
    return Made(model)


@case("activations that a hook keeps for the loss")
def activation_penalty() -> Made:
    model, kept = mlp(), {}
    model[1].register_forward_hook(lambda module, args, output: kept.__setitem__("hidden", output))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 0.1 * kept["hidden"].square().mean()

    return Made(model, loss=loss)


@case("a backward hook that turns gradients round")
def backward_hook() -> Made:
    model = mlp()
    model[1].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * -0.5,))
    return Made(model)


# --- gradients in forward and in the loss


class Force(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        e = self.n(x)
        (f,) = torch.autograd.grad(e.sum(), x, create_graph=True)
        return e, -f


@case("energies and forces")
def forces() -> Made:
    targets = {"e": numbers(1, seed=4), "f": numbers(FEATURES, seed=5)}
    return Made(
        Force().double(), loss=lambda o, t: F.mse_loss(o[0], t["e"]) + F.mse_loss(o[1], t["f"]), targets=targets
    )


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_(True)
        return self.n(x), x


def residual(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    u, x = output
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return ((du + u) ** 2).mean()


case("the residual of a differential equation")(
    lambda: Made(Field().double(), loss=residual, inputs=numbers(1), targets=numbers(1))
)

# --- outputs


class Object(OrderedDict):
    """As Hugging Face's outputs are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


@dataclasses.dataclass
class Record:
    logits: Tensor
    loss: Any = None


Pair = namedtuple("Pair", "logits hidden")


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, mlp()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        o = self.body(x)
        loss = None if labels is None else F.cross_entropy(o, labels)
        if self.kind == "object":
            return Object(logits=o) if loss is None else Object(loss=loss, logits=o)
        if self.kind == "record":
            return Record(o, loss)
        if self.kind == "dict":
            return {"logits": o, "nothing": None}
        return Pair(o, o) if self.kind == "pair" else loss


def of_logits(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target)


def with_labels() -> dict[str, Tensor]:
    return {"x": numbers(), "labels": labels()}


for _kind in ("object", "record", "pair"):
    case(f"a model that returns: {_kind}")(lambda kind=_kind: Made(Outputs(kind), loss=of_logits))
case("a model that returns: dict")(lambda: Made(Outputs("dict"), loss=lambda o, t: F.cross_entropy(o["logits"], t)))
for _kind in ("object", "record"):
    case(f"a loss of the model's own, in: {_kind}")(
        lambda kind=_kind: Made(Outputs(kind), loss=lambda o, t: o.loss, inputs=with_labels())
    )
case("a model that returns its loss alone")(lambda: Made(Outputs("scalar"), loss=lambda o, t: o, inputs=with_labels()))


class WithBalance(nn.Module):
    """Returns what a mixture of experts adds to its loss: a square of a mean over the batch."""

    def __init__(self, *, rows: bool) -> None:
        super().__init__()
        self.body, self.rows = mlp(), rows

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        o = self.body(x)
        return o, o.softmax(1) if self.rows else (o.softmax(1).mean(0) ** 2).sum()


case("an auxiliary loss over the batch", "neither a mean nor a sum|does not add up over samples")(
    lambda: Made(WithBalance(rows=False), loss=lambda o, t: F.cross_entropy(o[0], t) + 0.5 * o[1])
)
case("an auxiliary loss over the batch, gathered")(
    lambda: Made(
        WithBalance(rows=True),
        loss=lambda o, t: F.cross_entropy(o[0], t) + 0.5 * (o[1].mean(0) ** 2).sum(),
        options={"gather": True},
    )
)

# --- losses

WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


class Derived(nn.CrossEntropyLoss):
    pass


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ce = nn.CrossEntropyLoss(weight=WEIGHTS)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.ce(output, target)


def two_heads(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=WEIGHTS) + 0.5 * F.cross_entropy(-output, target, weight=WEIGHTS)


for _name, _loss in {
    "class weights in torch's object": nn.CrossEntropyLoss(weight=WEIGHTS),
    "class weights in a function": lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS),
    "class weights in a partial": functools.partial(F.cross_entropy, weight=WEIGHTS),
    "class weights in a subclass": Derived(weight=WEIGHTS),
    "class weights in a module around it": Around(),
    "class weights in two heads": two_heads,
    "class weights beside another mean": lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS) + o.square().mean(),
    "smoothed labels with weights": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
    "an ignored label in a function": lambda o, t: F.cross_entropy(o, t, ignore_index=1),
    "negative log likelihood in a function": lambda o, t: F.nll_loss(o.log_softmax(1), t, weight=WEIGHTS),
    "a sum": lambda o, t: F.cross_entropy(o, t, reduction="sum") / 30,
    "a focal loss, sample by sample": lambda o, t: (
        (1 - (-F.cross_entropy(o, t, reduction="none")).exp()) ** 2 * F.cross_entropy(o, t, reduction="none")
    ).mean(),
    "margins between classes": nn.MultiMarginLoss(),
    "a sum and a count": lambda o, t: (F.cross_entropy(o, t, weight=WEIGHTS, reduction="sum"), WEIGHTS[t].sum()),
}.items():
    case(_name)(lambda loss=_loss: Made(mlp(), loss=loss))

for _name, _loss in {
    "squares": nn.MSELoss(),
    "absolute values": F.l1_loss,
    "a Huber loss": nn.HuberLoss(delta=0.5),
    "a summed square": nn.MSELoss(reduction="sum"),
    "a loss of Poisson's": nn.PoissonNLLLoss(),
    "quantiles": lambda o, t: torch.maximum(0.9 * (t - o), -0.1 * (t - o)).mean(),
    "a log of a hyperbolic cosine": lambda o, t: (o - t).cosh().log().mean(),
}.items():
    case(_name)(
        lambda loss=_loss: Made(
            mlp(), loss=loss, targets=numbers(CLASSES, seed=6).abs(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
        )
    )


@case("yes or no with weights")
def yes_or_no() -> Made:
    return Made(mlp(), loss=nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), targets=(numbers(CLASSES, seed=6) > 0).double())


@case("distributions")
def distributions() -> Made:
    loss = nn.KLDivLoss(reduction="batchmean")
    return Made(nn.Sequential(mlp(), nn.LogSoftmax(1)), loss=loss, targets=numbers(CLASSES, seed=6).softmax(1))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.r, self.o = nn.Embedding(WORDS, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(self.e(x))[0])


def padded() -> Tensor:
    lengths = torch.randint(1, 8, (ROWS,), generator=generator(8)).sort(descending=True).values
    return (words(7) + 1).clamp(max=WORDS - 1) * (torch.arange(7)[None] < lengths[:, None])


case("a language model, word by word")(
    lambda: Made(
        Tagger().double(), loss=lambda o, t: F.cross_entropy(o.reshape(-1, WORDS), t.reshape(-1)),
        inputs=words(7), targets=words(7).roll(-1, 1),
    )
)  # fmt: skip
case("padding that is ignored, sorted by length")(
    lambda: Made(
        Tagger().double(), loss=lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), ignore_index=0),
        inputs=padded(), targets=padded(),
    )
)  # fmt: skip


def masked_mean(output: Tensor, target: Tensor) -> Tensor:
    mask = target != 0
    return (F.cross_entropy(output.transpose(1, 2), target, reduction="none") * mask).sum() / mask.sum()


def masked_sum(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    mask = target != 0
    return (F.cross_entropy(output.transpose(1, 2), target, reduction="none") * mask).sum(), mask.sum()


case("a masked mean by hand", "neither a mean nor a sum over samples")(
    lambda: Made(Tagger().double(), loss=masked_mean, inputs=padded(), targets=padded())
)
case("a masked mean as a sum and a count")(
    lambda: Made(Tagger().double(), loss=masked_sum, inputs=padded(), targets=padded())
)


@case("two heads, with labels missing in each")
def missing_labels() -> Made:
    one, two = labels(), labels(seed=9)
    one[::3], two[1::4] = -100, -100

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(output, target[0]) + 0.5 * F.cross_entropy(-output, target[1])

    return Made(mlp(), loss=loss, targets=(one, two))


class OwnTokens(nn.Module):
    """Computes a mean over words that are not padding in its own forward, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Tagger()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.body(x)
        return Object(loss=nn.CrossEntropyLoss()(logits.flatten(0, 1), labels.flatten()), logits=logits)


@case("a mean over words in the model's own loss")
def own_tokens() -> Made:
    ids = padded()
    inputs = {"x": ids, "labels": ids.masked_fill(ids == 0, -100)}
    return Made(OwnTokens().double(), loss=lambda o, t: o.loss, inputs=inputs, targets=ids[:, 0])


# --- losses over a batch


class Contrastive(nn.Module):
    """One loss a row: that of finding its partner in the batch."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.a, self.b, self.inside = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, 4), inside

    def forward(self, x: Tensor) -> Any:
        one, two = F.normalize(self.a(x), dim=1), F.normalize(self.b(x), dim=1)
        return find_partner((one, two)) if self.inside else (one, two)


def find_partner(output: tuple[Tensor, Tensor]) -> Tensor:
    one, two = output
    return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)), reduction="none")


def correlation(output: Tensor, target: Tensor) -> Tensor:
    a, b = output[:, 0] - output[:, 0].mean(), target[:, 0] - target[:, 0].mean()
    return 1 - (a * b).mean() / (a.std() * b.std() + 1e-9)


case("partners found inside the model", "looks at the rows of a batch together")(
    lambda: Made(Contrastive(inside=True).double(), loss=lambda o, t: o.mean())
)
case("partners found in the loss", "looks at the rows|neither a mean nor a sum over samples")(
    lambda: Made(Contrastive(inside=False).double(), loss=lambda o, t: find_partner(o).mean())
)
case("partners found in the loss, gathered")(
    lambda: Made(Contrastive(inside=False).double(), loss=lambda o, t: find_partner(o).mean(), options={"gather": True})
)
case("pairs of neighbours in a batch, gathered")(
    lambda: Made(
        mlp(), loss=lambda o, t: (o[:-1] - o[1:]).square().mean() + F.cross_entropy(o, t), options={"gather": True}
    )
)
case("a correlation", "neither a mean nor a sum over samples")(
    lambda: Made(mlp(), loss=correlation, targets=numbers(CLASSES, seed=6))
)
case("a correlation, gathered")(
    lambda: Made(mlp(), loss=correlation, targets=numbers(CLASSES, seed=6), options={"gather": True})
)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        return (h - h.mean(0)) / (h.std(0) + 1e-5)


case("centring by the batch", "looks at the rows of a batch together")(lambda: Made(Centred().double()))

# --- penalties over the model


def penalised(penalty: Callable[[nn.Module], Tensor], **options: Any) -> Made:
    model = mlp()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 0.05 * penalty(model)

    return Made(model, loss=loss, options=options)


def absolute(model: nn.Module) -> Tensor:
    return sum((p.abs().sum() for p in model.parameters()), torch.zeros((), dtype=torch.float64))


case("a penalty over the model in the loss")(lambda: penalised(absolute))
case("a penalty over one layer in the loss")(lambda: penalised(lambda model: model[0].weight.square().sum()))
case("a penalty over the model in the loss, gathered")(lambda: penalised(absolute, gather=True))


@case("a penalty for moving away from where training began")
def elastic_weights() -> Made:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        moved = sum(((p - b).square().sum() for p, b in zip(model.parameters(), before, strict=True)), torch.zeros(()))
        return F.cross_entropy(output, target) + 0.5 * moved

    return Made(model, loss=loss)


class Penalty(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + 0.01 * absolute(self.model)


@case("a loss module that holds the model")
def loss_that_holds_the_model() -> Made:
    model = mlp()
    return Made(model, loss=Penalty(model))


_model: nn.Module


class GlobalPenalty:
    """Knows the model by a global name, as code of a notebook does."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + self.penalty()

    @staticmethod
    def penalty() -> Tensor:
        return 0.05 * absolute(_model)


def by_global_class(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) + GlobalPenalty.penalty()


for _name, _loss in {
    "a class of losses that knows the model by a global name": GlobalPenalty(),
    "a loss that calls a class that knows the model": by_global_class,
}.items():

    @case(_name)
    def _by_a_global_name(loss: Any = _loss) -> Made:
        global _model
        _model = mlp()
        return Made(_model, loss=loss)


# --- optimizers

for _name, _optimizer in {
    "SGD with Nesterov's momentum and decay": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "SGD that goes up": lambda p: torch.optim.SGD(p, lr=1e-3, maximize=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam, fused by choice": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adam, a rate that is a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01, dtype=torch.float64)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
    "groups with rates of their own": lambda p: torch.optim.SGD(
        [{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.01, "weight_decay": 0.1}], lr=0.05, momentum=0.5
    ),
}.items():
    case(_name)(lambda optimizer=_optimizer: Made(mlp(), optimizer=optimizer))


class Centralised(torch.optim.SGD):
    """Looks at whole gradients: takes the mean off each row."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    p.grad.sub_(p.grad.mean(1, keepdim=True))
        return super().step(closure)


class Sam(torch.optim.SGD):
    """Sharpness-aware minimisation: two evaluations a step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None, "sharpness-aware minimisation needs a closure"
        with torch.enable_grad():
            value = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            steps = [0.05 * p.grad / (norm + 1e-12) for p in params]
            for p, e in zip(params, steps, strict=True):
                p.add_(e)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, e in zip(params, steps, strict=True):
                p.sub_(e)
        super().step()
        return value


case("an optimizer that looks at whole gradients")(
    lambda: Made(mlp(), optimizer=lambda p: Centralised(p, lr=0.05, momentum=0.9))
)
case("an optimizer that evaluates twice")(lambda: Made(mlp(), optimizer=lambda p: Sam(p, lr=0.1)))


@case("an optimizer over layers of the notebook's model")
def optimizer_by_layers() -> Made:
    model = mlp()

    def optimizer(_: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}], lr=0.1
        )

    return Made(model, optimizer=optimizer)


class ScheduleFree(torch.optim.SGD):
    """Trains other parameters than those to evaluate, and wants to be told which are wanted."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def train(self) -> None:
        self._turn(training=True)

    def eval(self) -> None:
        self._turn(training=False)

    @torch.no_grad()
    def _turn(self, *, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == training:
                continue
            group["train_mode"] = training
            for p in group["params"]:
                if "slow" in self.state[p]:
                    # Of what is trained and its slow average, the other one is put in the parameter.
                    kept = p.clone()
                    p.copy_(self.state[p]["slow"])
                    self.state[p]["slow"].copy_(kept)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert all(group["train_mode"] for group in self.param_groups), "not in training mode"
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                slow.mul_(0.8).add_(p, alpha=0.2)
        return None


case("a schedule-free optimizer")(lambda: Made(mlp(), optimizer=lambda p: ScheduleFree(p, lr=0.1)))


case("an optimizer for sparse gradients", "does not support dense gradients")(
    lambda: Made(Words(sparse=True).double(), inputs=words(), optimizer=lambda p: torch.optim.SparseAdam(p))
)
case("two optimizers", "returned 2 optimizers")(
    lambda: Made(mlp(), optimizer=lambda p: (torch.optim.SGD(p[:2], lr=0.1), torch.optim.Adam(p[2:])))
)
case("gradients that are clipped")(lambda: Made(mlp(), options={"clip_norm": 0.1}))
case("a schedule, step by step")(
    lambda: Made(
        mlp(),
        options={
            "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=20),
            "scheduler_every": "step",
        },
    )
)

# --- settings of the process


class Constants(nn.Module):
    """Makes tensors without saying of which type."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) @ torch.eye(CLASSES) * torch.linspace(0.1, 0.3, CLASSES)


@case("constants of the default type, which is double")
def constants() -> Made:
    with default_dtype(torch.float64):
        return Made(Constants(), default=torch.float64)
