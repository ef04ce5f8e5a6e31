"""Attributes: plain Python values that count are read, told apart, and given back; and that workers have them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parakit.errors import ModelError
from parakit.model_state.agreement import Agreement
from parakit.model_state.attributes import ABSENT, Attributes, Kept, same, too_large
from parakit.model_state.buffers import Buffers, Rule
from parakit.model_state.late_attributes import Late
from parakit.model_state.structure import Structure


class Net(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


def net(**attributes: Any) -> Any:
    return Net(**attributes)


def plain_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def of(model: nn.Module, loss: Any = plain_loss, **how: Any) -> Attributes:
    return Attributes(model, loss, **how)


@dataclass
class Record:
    calls: int = 0
    seen: list[float] = field(default_factory=list)


class Ticking:
    """An object that says itself what is kept of it."""

    def __init__(self) -> None:
        self.ticks = 0

    def __getstate__(self) -> int:
        return self.ticks

    def __setstate__(self, ticks: int) -> None:
        self.ticks = ticks


# --- a value of each kind, a change of it, and what of it is looked at


def set_calls(model: Any) -> None:
    model.kept += 1


def deep(model: Any) -> None:
    model.kept["a"][0].append(2)


def fill(model: Any) -> None:
    model.kept.fill_(5)


def count_record(model: Any) -> None:
    model.kept.calls += 1
    model.kept.seen.append(0.5)


def tick(model: Any) -> None:
    model.kept.ticks += 1


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[Any], Any]]] = {
    "whole number": (lambda: 3, set_calls, lambda kept: kept),
    "number": (lambda: 0.5, set_calls, lambda kept: kept),
    "tuple": (lambda: (1, "a"), lambda m: setattr(m, "kept", (2, "a")), lambda kept: kept),
    "word": (lambda: "a", lambda m: setattr(m, "kept", "b"), lambda kept: kept),
    "nothing": (lambda: None, lambda m: setattr(m, "kept", 1), lambda kept: kept),
    "list": (lambda: [1, 2], lambda m: m.kept.append(3), list),
    "nested": (lambda: {"a": [[1]]}, deep, lambda kept: [list(x) for x in kept["a"]]),
    "set": (lambda: {1}, lambda m: m.kept.add(2), sorted),
    "tensor": (lambda: torch.ones(3), fill, lambda kept: kept.tolist()),
    "array": (lambda: np.ones(3), lambda m: m.kept.fill(5), lambda kept: kept.tolist()),
    "tensors in a list": (lambda: [torch.ones(2)], lambda m: m.kept[0].fill_(5), lambda kept: kept[0].tolist()),
    "dataclass": (Record, count_record, lambda kept: (kept.calls, list(kept.seen))),
    "object": (lambda: SimpleNamespace(calls=0), lambda m: setattr(m.kept, "calls", 1), lambda kept: kept.calls),
    "object with a state": (Ticking, tick, lambda kept: kept.ticks),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    make, change, _ = CHANGES[name]
    model = net(kept=make())
    attributes = of(model)
    before = attributes.read(["kept"])
    assert same(attributes.read(["kept"])["kept"], before["kept"])
    change(model)
    assert not same(attributes.read(["kept"])["kept"], before["kept"])


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_can_be_undone(name: str) -> None:
    make, change, look = CHANGES[name]
    model = net(kept=make())
    attributes, before = of(model), look(model.kept)
    values = attributes.read()
    change(model)
    assert look(model.kept) != before
    attributes.write(values)
    assert look(model.kept) == before
    assert same(attributes.read(["kept"])["kept"], values["kept"])


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_kept_is_not_changed_by_later_changes(name: str) -> None:
    make, change, look = CHANGES[name]
    model = net(kept=make())
    attributes, before = of(model), look(model.kept)
    values = attributes.read()
    for _ in range(2):  # what is given back is no hold on what is kept either
        change(model)
        attributes.write(values)
        assert look(model.kept) == before


@pytest.mark.parametrize("name", CHANGES)
def test_one_copy_takes_the_values_of_another(name: str) -> None:
    make, change, look = CHANGES[name]
    one, other = net(kept=make()), net(kept=make())
    change(one)
    of(other).write(of(one).read())
    assert look(other.kept) == look(one.kept)


@pytest.mark.parametrize("name", CHANGES)
def test_marks_tell_of_a_change(name: str) -> None:
    make, change, _ = CHANGES[name]
    model = net(kept=make())
    before = of(model).marks(["kept"])
    assert of(net(kept=make())).marks(["kept"]) == before
    change(model)
    assert of(model).marks(["kept"]) != before


def test_a_mark_is_of_one_place_or_of_several() -> None:
    model = net(one=1, two=2)
    before = of(model).marks(["one", ["one", "two"], []])
    model.two = 3
    after = of(model).marks(["one", ["one", "two"], []])
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize(
    ("one", "other"),
    [({8, 0}, {0, 8}), ({"a", "b", "c"}, {"c", "b", "a"}), (["a b"], [" ".join("ab")])],
    ids=["sets of numbers", "sets of texts", "lists of texts"],
)
def test_equal_values_are_the_same_however_they_were_made(one: Any, other: Any) -> None:
    attributes = [of(net(kept=value)) for value in (one, other)]
    assert attributes[0].marks(["kept"]) == attributes[1].marks(["kept"])
    assert same(attributes[0].read()["kept"], attributes[1].read()["kept"])


@pytest.mark.parametrize("name", ["list", "nested", "set", "dataclass", "object"])
def test_containers_are_changed_in_place(name: str) -> None:
    make, change, look = CHANGES[name]
    model = net(kept=make())
    held, attributes, before = model.kept, of(model), look(model.kept)
    values = attributes.read()
    change(model)
    attributes.write(values)
    assert model.kept is held
    assert look(held) == before


# --- what is read


def test_parameters_buffers_and_code_are_left_to_others() -> None:
    model = net(act=torch.tanh, kind=int, dtype=torch.float32, calls=1)
    model.register_buffer("mean", torch.ones(2))
    read = of(model).read()
    assert "calls" in read
    assert {"act", "kind", "dtype", "mean", "layer", "weight"}.isdisjoint(read)


def test_a_layer_in_a_plain_list_is_known_and_not_copied() -> None:
    model = net()
    model.layers = [model.layer]
    attributes = of(model)
    values = attributes.read(["layers"])
    model.layers = []
    attributes.write(values)
    assert model.layers == [model.layer]
    assert model.layers[0] is model.layer


def test_what_cannot_be_kept_is_left_out() -> None:
    model = net(numbers=(n for n in range(3)), calls=1)
    assert "numbers" not in of(model).read()


def test_only_what_is_asked_for_is_read() -> None:
    assert set(of(net(one=1, two=2)).read(["one"])) == {"one"}


def test_what_is_asked_for_and_not_there_is_absent() -> None:
    assert of(net()).read(["calls"]) == {"calls": ABSENT}


def test_two_names_of_one_value_are_one_again() -> None:
    model = net()
    model.one = model.two = [1]
    attributes = of(model)
    values = attributes.read()
    model.one, model.two = [5], [6]
    attributes.write(values)
    assert model.one == [1]
    assert model.one is model.two


def test_an_attribute_that_was_made_since_is_taken_away() -> None:
    model = net()
    attributes = of(model)
    values = attributes.read(["calls"])
    model.calls = 1
    attributes.write(values)
    assert not hasattr(model, "calls")


def test_an_attribute_that_was_deleted_since_comes_back() -> None:
    model = net(calls=1)
    attributes = of(model)
    values = attributes.read()
    del model.calls
    attributes.write(values)
    assert model.calls == 1


# --- what belongs to the model, and what to code that others run too


class Counting(Net):
    total = 0

    def forward(self, x: Tensor) -> Tensor:
        return x * type(self).total


@pytest.fixture
def counting() -> Iterator[Any]:
    model: Any = Counting(calls=3)
    yield model
    Counting.total = 0


def test_values_of_code_that_others_run_are_told_apart(counting: Any) -> None:
    attributes = of(counting)
    assert attributes.shared(["calls", "Counting.total"]) == {"Counting.total": 0}


def test_what_is_the_models_own_can_be_set_alone(counting: Any) -> None:
    attributes = of(counting)
    values = attributes.read()
    counting.calls, Counting.total = 5, 5
    attributes.write(values, own=True)
    assert (counting.calls, Counting.total) == (3, 5)


def test_what_is_not_can_be_given_back_alone(counting: Any) -> None:
    attributes = of(counting)
    values = attributes.shared(["Counting.total"])
    counting.calls, Counting.total = 5, 5
    attributes.restore(values)
    assert (counting.calls, Counting.total) == (5, 0)


# --- what is large


def test_a_large_tensor_is_compared_and_not_kept() -> None:
    model = net(kept=torch.zeros(5_000_000))
    attributes = of(model)
    before = attributes.read(["kept"])["kept"]
    assert too_large(before)
    model.kept[7] = 1
    assert not same(attributes.read(["kept"])["kept"], before)
    attributes.write({"kept": before})
    assert model.kept[7] == 1


def test_what_is_small_is_not_too_large() -> None:
    assert not too_large(of(net(kept=torch.zeros(10))).read()["kept"])


def test_a_large_object_is_told_by_its_kind() -> None:
    model = net(kept=SimpleNamespace(table=b"x" * (1 << 24)))
    before = of(model).read(["kept"])["kept"]
    assert too_large(before)
    model.kept = SimpleNamespace(table=b"x" * (1 << 24))
    assert not same(of(model).read(["kept"])["kept"], before)


# --- equal values


EQUAL: dict[str, tuple[Kept, Kept, bool]] = {
    "numbers": (1, 1, True),
    "other numbers": (1, 2, False),
    "of another type": (1, 1.0, False),
    "flags are no numbers": (True, 1, False),
    "not a number": (float("nan"), float("nan"), True),
    "tensors": (torch.ones(2), torch.ones(2), True),
    "other tensors": (torch.ones(2), torch.zeros(2), False),
    "of another shape": (torch.ones(2), torch.ones(2, 1), False),
    "of another precision": (torch.ones(2), torch.ones(2).double(), False),
    "tensors that are not numbers": (torch.tensor([float("nan"), 1]), torch.tensor([float("nan"), 1]), True),
    "one of them is": (torch.tensor([float("nan"), 1]), torch.tensor([0.0, 1]), False),
    "nothing": (ABSENT, ABSENT, True),
    "nothing and None": (ABSENT, None, False),
}


@pytest.mark.parametrize("name", EQUAL)
def test_values_are_equal_or_not(name: str) -> None:
    one, other, expected = EQUAL[name]
    assert same(one, other) is expected
    assert same(other, one) is expected


# --- plain values that change unexpectedly


def test_a_surprise_is_told_as_it_was() -> None:
    model = net(calls=3, seen=[1])
    attributes = of(model)
    assert attributes.surprises() == {}
    model.calls += 1
    model.seen.append(2)  # no plain value: too slow to look at every time
    assert attributes.surprises() == {"calls": 3}


def test_what_is_ignored_is_no_surprise() -> None:
    model = net(last=3)
    attributes = of(model, ignored=["last"])
    model.last = 4
    assert attributes.surprises() == {}


def test_a_value_that_came_back_is_no_surprise() -> None:
    model = net(size=1000.5)
    attributes = of(model)
    model.size = float("1000.5")
    assert attributes.surprises() == {}


def test_plain_values_are_given_back_and_it_is_said_whether_they_were_others() -> None:
    model = net(calls=3)
    attributes = of(model)
    before = attributes.plain()
    assert not attributes.give_back(before)
    model.calls = 4
    assert attributes.give_back(before)
    assert model.calls == 3


def test_late_changes_are_undone() -> None:
    model = net(calls=3)
    late = Late(of(model))
    with late.undone():
        model.calls += 1
    assert late.seen
    assert model.calls == 3


def test_where_nothing_changes_nothing_is_seen() -> None:
    late = Late(of(net(calls=3)))
    with late.undone():
        pass
    assert not late.seen


def test_also_when_the_block_raises() -> None:
    model = net(calls=3)
    late = Late(of(model))

    def half() -> None:
        model.calls += 1
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), late.undone():
        half()
    assert model.calls == 3


# --- agreement of workers


class Looked:
    """A worker's model as it is looked at."""

    def __init__(self, model: nn.Module, rules: Mapping[str, Rule], loss: Any = plain_loss) -> None:
        self.structure = Structure(model, loss)
        self.buffers = Buffers(model, loss, rules)
        self.attributes = of(model, loss)


def agreeing(model: nn.Module, *counted: str, watched: bool = True, **rules: Rule) -> Agreement:
    return Agreement(Looked(model, rules), rules, counted, watched=watched)


def with_buffer(value: float = 0.0, **attributes: Any) -> Any:
    model = net(**attributes)
    model.register_buffer("calls_buffer", torch.tensor(value))
    return model


def test_counted_attributes_are_a_part_of_the_state() -> None:
    model = net(calls=3)
    agreement = agreeing(model, "calls", "later")
    assert agreement.counted() == {"calls": 3, "later": ABSENT}
    assert agreement.state() == {"calls": 3}


def test_a_state_without_one_of_them_takes_it_away() -> None:
    agreement = agreeing(net(calls=3), "calls", "later")
    assert agreement.completed({"calls": 2}) == {"calls": 2, "later": ABSENT}


def test_what_begins_late_can_become_a_part_of_the_state() -> None:
    model = net(calls=3, warm=False)
    agreement = agreeing(model, "calls")
    model.calls, model.warm = 4, True
    assert agreement.late() == {"warm": False}
    agreement.count_late()
    assert agreement.late() == {}
    assert agreement.state() == {"calls": 4, "warm": True}


def test_workers_that_counted_alike_agree() -> None:
    one, other = (agreeing(with_buffer(2.0, calls=3), "calls", calls_buffer="alike") for _ in range(2))
    one.check(one.marks(), other.marks())


def test_workers_that_counted_rows_do_not() -> None:
    one, other = (agreeing(with_buffer(calls=rows), "calls", calls_buffer="alike") for rows in (3, 4))
    with pytest.raises(ModelError, match=r"different values of the attributes? calls"):
        one.check(one.marks(), other.marks())


def test_a_buffer_that_differs_is_named() -> None:
    one, other = (agreeing(with_buffer(value), calls_buffer="alike") for value in (1.0, 2.0))
    with pytest.raises(ModelError, match="different values of the buffer calls_buffer"):
        one.check(one.marks(), other.marks())


def test_what_began_late_and_differs_is_named() -> None:
    models = [net(calls=3), net(calls=3)]
    one, other = map(agreeing, models)
    models[0].calls, models[1].calls = 4, 5
    with pytest.raises(ModelError, match=r"different values of the attributes? calls"):
        one.check(one.marks(), other.marks())


def test_buffers_of_another_rule_need_not_be_alike() -> None:
    one, other = (agreeing(with_buffer(value), calls_buffer="own") for value in (1.0, 2.0))
    one.check(one.marks(), other.marks())


def test_what_is_no_number_on_either_is_alike() -> None:
    one, other = (agreeing(with_buffer(float("nan")), calls_buffer="alike") for _ in range(2))
    one.check(one.marks(), other.marks())


def test_a_buffer_without_a_rule_may_not_begin_to_change() -> None:
    model = with_buffer()
    agreement = agreeing(model)
    agreement.check_structure(alone=False)
    model.calls_buffer += 1
    with pytest.raises(ModelError, match="has changed the buffer calls_buffer"):
        agreement.check_structure(alone=False)


def test_unless_a_worker_is_alone_and_nobody_watches() -> None:
    model = with_buffer()
    alone, watched = agreeing(model, watched=False), agreeing(model, watched=True)
    model.calls_buffer += 1
    alone.check_structure(alone=True)
    with pytest.raises(ModelError, match="has changed the buffer"):
        watched.check_structure(alone=True)
