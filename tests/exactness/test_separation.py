"""Separation: rows together come to what they come to in parts; what is known to disturb that is silenced meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.data.samples import Samples
from parakit.exactness.separation import Difference, Separation, cut_of, difference
from parakit.exactness.turns import MOST_SECONDS, Purse, Turns
from parakit.losses.summed import SummedLoss
from parakit.model_state.undisturbed import Still, quiet_layers

ROWS, FEATURES, CLASSES = 8, 4, 3


def samples(dtype: torch.dtype = torch.float32) -> Samples:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return Samples(inputs, torch.arange(ROWS) % CLASSES)


def still(model: nn.Module, loss: Any, **how: Any) -> Still:
    known: dict[str, Any] = {"buffers": (), "parameters": (), "attributes": (), "noisy": False, "others": False}
    return Still(model, loss, **{**known, **how})


def separation(model: nn.Module, loss: SummedLoss, **how: Any) -> Separation:
    return Separation(model, loss, still(model, loss.function, **how))


def looked(model: nn.Module, loss: SummedLoss, *, gradient: bool = True, **how: Any) -> Difference | None:
    dtype = next(model.parameters()).dtype
    return separation(model, loss, **how).look(samples(dtype), 3, gradient=gradient)


MEAN = SummedLoss(nn.CrossEntropyLoss(), "mean")


class Body(nn.Module):
    """A small network; its heirs say what they make of its hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    def hidden(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(torch.tanh(self.first(x))))


class Centred(Body):
    def hidden(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class CentredInGradientsAlone(Body):
    def hidden(self, h: Tensor) -> Tensor:
        scale = h.mean()
        return h * (scale / scale.detach())


class Attending(Body):
    def hidden(self, h: Tensor) -> Tensor:
        return (h @ h.t()).softmax(1) @ h


class Normalised(Body):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def hidden(self, h: Tensor) -> Tensor:
        return self.norm(h)


class NormalisedByTheBatchAlone(Body):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def hidden(self, h: Tensor) -> Tensor:
        return self.norm(h)


class Dropping(Body):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def hidden(self, h: Tensor) -> Tensor:
        return self.drop(h)


class Noisy(Body):
    def hidden(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


class Masked(Body):
    def hidden(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, training=self.training)


class NoisyByNumpy(Body):
    def hidden(self, h: Tensor) -> Tensor:
        return h * float(np.random.rand())  # noqa: NPY002  # the one that users' code draws from


class Counting(Body):
    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def hidden(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


class CountingInABuffer(Body):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def hidden(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


# --- what comes to the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradient", [False, True])
def test_rows_that_are_computed_one_by_one_come_to_the_same(gradient: bool, dtype: torch.dtype) -> None:
    assert looked(Body().to(dtype), MEAN, gradient=gradient) is None


SILENCED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "normalised": (Normalised, {}),
    "normalised by the batch alone": (NormalisedByTheBatchAlone, {}),
    "dropout": (Dropping, {}),
    "dropout in a function": (Masked, {"noisy": True}),
    "noise": (Noisy, {"noisy": True}),
    "noise by numpy": (NoisyByNumpy, {"others": True}),
    "counted": (Counting, {"attributes": ["calls"]}),
    "counted, whatever is known": (Counting, {"attributes": None}),
    "counted in a buffer": (CountingInABuffer, {"buffers": ["calls"]}),
    "counted in a buffer, whatever is known": (CountingInABuffer, {"buffers": None}),
}


@pytest.mark.parametrize("name", SILENCED)
def test_what_is_known_to_disturb_is_silenced(name: str) -> None:
    make, known = SILENCED[name]
    assert looked(make(), MEAN, **known) is None


@pytest.mark.parametrize("name", [name for name in SILENCED if name not in ("counted", "counted in a buffer")])
def test_everything_is_given_back(name: str) -> None:
    make, known = SILENCED[name]
    model: Any = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = dict(vars(model))
    looked(model, MEAN, **known)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert vars(model) == plain
    assert all(layer.training for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_generator_is_moved() -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    looked(NoisyByNumpy(), MEAN, others=True, noisy=True)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()  # type: ignore[index] # noqa: NPY002


# --- what does not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [Centred, Attending])
def test_rows_that_look_at_each_other_are_found_by_the_loss(make: Callable[[], Any], dtype: torch.dtype) -> None:
    found = looked(make().to(dtype), MEAN, gradient=False)
    assert found is not None
    assert (found.what, found.rows, found.cut) == ("loss", ROWS, 3)
    assert found.by == pytest.approx(abs(found.whole - found.parts) / max(found.whole, found.parts))


def test_what_is_in_gradients_alone_is_found_by_gradients() -> None:
    model = CentredInGradientsAlone()
    assert looked(model, MEAN, gradient=False) is None
    found = looked(model, MEAN)
    assert found is not None
    assert found.what == "gradient"


@pytest.mark.parametrize("make", [Counting, CountingInABuffer])
def test_what_counts_unknown_to_anybody_is_found(make: Callable[[], Any]) -> None:
    assert looked(make(), MEAN) is not None


@pytest.mark.parametrize("make", [Counting, CountingInABuffer])
def test_and_not_where_nothing_may_be_kept_from_call_to_call(make: Callable[[], Any]) -> None:
    assert separation(make(), MEAN).keeping_all().look(samples(), 3, gradient=True) is None


def largest_half(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none").topk(len(output) // 2).values.mean()


def test_a_loss_that_looks_at_rows_together_is_found() -> None:
    assert looked(Body(), SummedLoss(largest_half, "mean")) is not None


def test_so_is_a_loss_in_a_wrong_form() -> None:
    assert looked(Body(), SummedLoss(nn.CrossEntropyLoss(), "sum")) is not None
    assert looked(Body(), SummedLoss(nn.CrossEntropyLoss(reduction="sum"), "sum")) is None


@pytest.mark.parametrize(
    ("loss", "form"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])), "weighted"),
        (nn.CrossEntropyLoss(ignore_index=1), "weighted"),
        (lambda o, t: (F.cross_entropy(o, t, reduction="sum"), len(o)), "counted"),
    ],
    ids=["weights", "ignored", "counted"],
)
def test_losses_of_other_forms_come_to_the_same(loss: Any, form: Any) -> None:
    assert looked(Body(), SummedLoss(loss, form)) is None


def test_what_is_no_number_is_left_for_the_run_to_find() -> None:
    assert looked(Body(), SummedLoss(lambda o, t: F.cross_entropy(o, t) * float("nan"), "mean")) is None


def test_frozen_parameters_are_not_looked_at() -> None:
    model = Body()
    model.first.requires_grad_(False)
    assert looked(model, MEAN) is None


def test_a_difference_is_told_in_words() -> None:
    of_loss = Difference("loss", 8, 3, 1.0, 1.25, 0.2)
    assert difference(of_loss, "here ") == (
        "here on 8 samples the loss is 1, but its parts of 3 and 5 samples come to 1.25"
    )
    of_gradient = Difference("gradient", 8, 3, 1.0, 1.25, 0.2)
    assert "the gradient of 8 samples is not the sum of those of 3 and 5 of them" in difference(of_gradient, "")


@pytest.mark.parametrize("rows", [2, 3, 10, 64])
def test_cuts_leave_rows_on_both_sides(rows: int) -> None:
    cuts = [cut_of(rows, number) for number in range(6)]
    assert all(0 < cut < rows for cut in cuts)
    assert cuts[:3] == cuts[3:]
    assert rows < 10 or len(set(cuts)) == 3


# --- stillness


def forward_twice(model: nn.Module, quiet: Still, x: Tensor) -> tuple[Tensor, Tensor]:
    with quiet.kept():
        seen = []
        for _ in range(2):
            with quiet.once():
                seen.append(model(x))
    return seen[0], seen[1]


@pytest.mark.parametrize("name", SILENCED)
def test_the_same_pass_twice_gives_the_same(name: str) -> None:
    make, known = SILENCED[name]
    model = make()
    one, other = forward_twice(model, still(model, MEAN.function, **known), samples().inputs)
    assert torch.equal(one, other)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": torch.randn_like,
    "uniform": torch.rand_like,
    "in place": lambda x: torch.empty_like(x).uniform_(),
    "exponential": lambda x: torch.empty_like(x).exponential_(),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "whole numbers": lambda x: torch.randint_like(x, 0, 10),
    "dropout": lambda x: F.dropout(x, 0.5),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0],
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_torch_draws_is_the_same_for_each_row(name: str) -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return DRAWS[name](x)

    model = Drawing()
    drawn, _ = forward_twice(model, still(model, None, noisy=True), torch.ones(6, 4))
    assert torch.equal(drawn, drawn[:1].expand_as(drawn))


def test_permutations_leave_the_order() -> None:
    class Shuffling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[torch.randperm(len(x))]

    model, x = Shuffling(), torch.arange(5.0)
    assert torch.equal(forward_twice(model, still(model, None, noisy=True), x)[0], x)


def test_layers_that_draw_or_normalise_are_the_quiet_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2), nn.LSTM(2, 2, 2, dropout=0.5), nn.GRU(2, 2))
    assert quiet_layers(model) == [model[1], model[2], model[3]]
    model[1].eval()
    assert quiet_layers(model) == [model[2], model[3]]


def test_an_attribute_that_a_pass_makes_is_taken_away() -> None:
    class Making(Body):
        def hidden(self, h: Tensor) -> Tensor:
            self.last_seen = h.detach()
            return h

    model = Making()
    forward_twice(model, still(model, None, attributes=None), samples().inputs)
    assert not hasattr(model, "last_seen")


def test_parameters_that_a_pass_writes_to_are_given_back() -> None:
    model = nn.Embedding(4, 2, max_norm=0.1)
    before = model.weight.detach().clone()
    forward_twice(model, still(model, None, parameters=["weight"]), torch.arange(4))
    assert torch.equal(model.weight, before)


def test_it_is_given_back_when_a_pass_raises() -> None:
    model = Counting()
    quiet = still(model, None, attributes=["calls"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), quiet.kept(), quiet.once():
        model(torch.ones(2, FEATURES + 1))
    with pytest.raises(RuntimeError, match="must match"), quiet.kept(), quiet.once():
        model(torch.ones(2, FEATURES)) + torch.ones(5, 7)
    assert model.calls == 0


# --- when there is a look


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def looks(turns: Turns, clock: Clock, steps: range, *, cost: float, step_seconds: float = 1.0) -> list[int]:
    """At which steps there are looks that cost so much."""
    due = []
    for step in steps:
        if turns.due(step):
            due.append(step)
            clock.now += cost
            turns.took(step, cost)
        clock.now += step_seconds
    return due


def test_first_looks_come_when_they_should() -> None:
    clock = Clock()
    turns = Turns((0, 1, 3, 7), Purse(100.0), 0.5, clock)
    assert looks(turns, clock, range(9), cost=0.01) == [0, 1, 3, 7]


def test_a_run_that_was_resumed_begins_as_any_other() -> None:
    clock = Clock()
    turns = Turns((0, 2), Purse(100.0), 0.5, clock)
    assert looks(turns, clock, range(40, 45), cost=0.01) == [40, 42]


def test_first_looks_end_with_the_purse() -> None:
    clock = Clock()
    turns = Turns((0, 1, 2, 3), Purse(1.5), 0.5, clock)
    assert looks(turns, clock, range(8), cost=1.0) == [0, 1]


def test_several_kinds_of_looks_have_one_purse() -> None:
    clock, purse = Clock(), Purse(1.0)
    one, other = (Turns((0, 1, 2), purse, 0.5, clock) for _ in range(2))
    assert looks(one, clock, range(1), cost=2.0) == [0]
    assert purse.left == -1.0
    # After its first look it does not know yet how long a step takes.
    assert looks(other, clock, range(3), cost=0.0) == [0, 1]


def test_an_empty_purse_at_the_first_step_does_not_put_looks_off_for_ever() -> None:
    clock = Clock()
    turns = Turns((0, 1, 2), Purse(0.0), 0.1, clock)
    due = looks(turns, clock, range(2000), cost=5.0)
    assert due[:2] == [0, 1]
    assert 3 <= len(due) <= 0.1 * 2000 / 5.0 + 2


def test_some_first_looks_come_whatever_they_cost() -> None:
    clock = Clock()
    turns = Turns((0, 1), Purse(0.0), 0.01, clock, always=(0, 20, 40))
    assert looks(turns, clock, range(50), cost=0.5) == [0, 20, 40]


def test_and_not_more_than_some_seconds_of_them() -> None:
    clock = Clock()
    turns = Turns((0, 1), Purse(0.0), 0.01, clock, always=tuple(range(0, 50, 2)))
    assert looks(turns, clock, range(50), cost=MOST_SECONDS / 4) == [0, 2, 4, 6]


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_later_looks_take_their_share_of_the_time_at_most(share: float) -> None:
    clock = Clock()
    turns = Turns((1,), Purse(0.0), share, clock)
    due = looks(turns, clock, range(10_000), cost=10.0)
    assert 2 <= len(due) <= share * 10_000 / 10.0 + 1


def test_they_come_at_steps_that_workers_have_in_common() -> None:
    clock = Clock()
    turns = Turns((1,), Purse(0.0), 0.1, clock)
    due = looks(turns, clock, range(3, 2000), cost=10.0)[1:]
    assert due
    assert all(step % 25 == 0 for step in due)


def test_a_share_of_one_is_every_step() -> None:
    clock = Clock()
    turns = Turns((0,), Purse(0.0), 1.0, clock)
    assert looks(turns, clock, range(5), cost=10.0) == [0, 1, 2, 3, 4]


def test_first_steps_can_be_changed() -> None:
    clock = Clock()
    turns = Turns((0, 1), Purse(100.0), 0.5, clock)
    turns.come_at((2, 4))
    assert looks(turns, clock, range(6), cost=0.01) == [2, 4]
