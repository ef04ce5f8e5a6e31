"""Variables: each place where code can keep a value is found, by a name for people, and can be read and written."""

from __future__ import annotations

import importlib
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from parakit.model_state.variables import ABSENT, Place, variable_to_be, variables_of
from parakit.serialization import freeze

CALLS = 0
TABLE = {"calls": 0}
ALIAS = TABLE


def places(model: Any, loss: Any = None, hooks: Any = ()) -> dict[str, Place]:
    return {place.path: place for place in variables_of(model, loss, hooks)}


def plain_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Net(nn.Module):
    """A model that does nothing but what is done to it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def net(**attributes: Any) -> Any:
    model = Net()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def nested(**attributes: Any) -> Any:
    return nn.Sequential(nn.Identity(), nn.Sequential(net(**attributes)))


# --- one place of each kind: model, loss, hooks, its path, and what is there


class Counted(Net):
    total: ClassVar[int] = 3

    def forward(self, x: Tensor) -> Tensor:
        Counted.total += 1
        return x


class Inherited(Counted):
    pass


class ByProperty(Net):
    hidden: ClassVar[int] = 3

    @property
    def scale(self) -> int:
        return type(self).hidden

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ByStatic(Net):
    @staticmethod
    def scale() -> int:
        return CALLS

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale()


class OfAClass:
    def __init__(self) -> None:
        self.calls = 3

    def __call__(self, *_: Any) -> int:
        self.calls += 1
        return self.calls


class OfAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 3

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return plain_loss(output, target)


def with_global(output: Tensor, target: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return plain_loss(output, target)


def with_table(output: Tensor, target: Tensor) -> Tensor:
    TABLE["calls"] += 1
    return plain_loss(output, target)


def calls_another(output: Tensor, target: Tensor) -> Tensor:
    return with_global(output, target)


def with_attribute(output: Tensor, target: Tensor) -> Tensor:
    with_attribute.calls += 1  # type: ignore[attr-defined]
    return plain_loss(output, target)


with_attribute.calls = 3  # type: ignore[attr-defined]


def with_default(output: Tensor, target: Tensor, seen: Any = [3]) -> Tensor:  # noqa: B006  # it is what is tried
    seen[0] += 1
    return plain_loss(output, target)


def with_seen(seen: list[int], output: Tensor, target: Tensor) -> Tensor:
    seen[0] += 1
    return plain_loss(output, target)


def with_keyword(output: Tensor, target: Tensor, *, scale: float = 3) -> Tensor:
    return plain_loss(output, target) * scale


def closure() -> Callable[..., Tensor]:
    calls = 3

    def counting(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return plain_loss(output, target)

    return counting


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args)


def with_hook(hook: Callable[..., Any]) -> Any:
    model = nn.Linear(1, 1)
    model.register_forward_hook(hook)
    return model


def with_gradient_hook(hook: Callable[..., Any]) -> Any:
    model = nn.Linear(1, 1)
    model.weight.register_hook(hook)
    return model


Made = tuple[Any, Any, tuple[Any, ...]]

KINDS: dict[str, tuple[Callable[[], Made], str, Any]] = {
    "attribute": (lambda: (net(calls=3), None, ()), "calls", 3),
    "attribute deep inside": (lambda: (nested(calls=3), None, ()), "1.0.calls", 3),
    "list": (lambda: (net(seen=[1, [2]]), None, ()), "seen", [1, [2]]),
    "mode": (lambda: (net(), None, ()), "training", True),
    "class": (lambda: (Counted(), None, ()), "Counted.total", 3),
    "class above": (lambda: (Inherited(), None, ()), "Counted.total", 3),
    "class, by a property": (lambda: (ByProperty(), None, ()), "ByProperty.hidden", 3),
    "global, by a static method": (lambda: (ByStatic(), None, ()), f"{__name__}.CALLS", 0),
    "object that is the loss": (lambda: (net(), OfAClass(), ()), "loss.calls", 3),
    "module that is the loss": (lambda: (net(), OfAModule(), ()), "loss.calls", 3),
    "module in the loss": (lambda: (net(), nn.Sequential(OfAModule()), ()), "loss.0.calls", 3),
    "bound method": (lambda: (net(), OfAClass().__call__, ()), "loss.calls", 3),
    "global": (lambda: (net(), with_global, ()), f"{__name__}.CALLS", 0),
    "global, by another function": (lambda: (net(), calls_another, ()), f"{__name__}.CALLS", 0),
    "table": (lambda: (net(), with_table, ()), f"{__name__}.TABLE", {"calls": 0}),
    "attribute of a function": (lambda: (net(), with_attribute, ()), "with_attribute.calls", 3),
    "default": (lambda: (net(), with_default, ()), "with_default: default 0", [3]),
    "default of a keyword": (lambda: (net(), with_keyword, ()), "with_keyword: scale", 3),
    "closure": (lambda: (net(), closure(), ()), "closure.<locals>.counting: calls", 3),
    "closure that is decorated": (lambda: (net(), decorated(closure()), ()), "closure.<locals>.counting: calls", 3),
    "partial, keyword": (lambda: (net(), partial(with_keyword, scale=5), ()), "loss: scale", 5),
    "partial, argument": (lambda: (net(), partial(with_seen, [3]), ()), "loss: argument 0", [3]),
    "partial of a closure": (lambda: (net(), partial(closure(), None), ()), "closure.<locals>.counting: calls", 3),
    "hook": (lambda: (with_hook(OfAClass()), None, ()), "hook.calls", 3),
    "hook on a gradient": (lambda: (with_gradient_hook(OfAClass()), None, ()), "hook.calls", 3),
    "hook that was taken off": (lambda: (net(), None, (OfAClass(),)), "hook.calls", 3),
    "hook, a closure": (lambda: (with_hook(closure()), None, ()), "closure.<locals>.counting: calls", 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_place_of_each_kind_is_found(name: str) -> None:
    make, path, value = KINDS[name]
    assert places(*make())[path].get() == value


FIXED = ("default", "partial, argument")  # the object there is always the same, and may be changed itself


@pytest.mark.parametrize("name", [name for name in KINDS if name not in FIXED])
def test_and_can_be_written(name: str) -> None:
    make, path, value = KINDS[name]
    made = make()
    place = places(*made)[path]
    place.set("other")
    try:
        assert places(*made)[path].get() == "other"
    finally:
        place.set(value)


@pytest.mark.parametrize("name", FIXED)
def test_what_is_fixed_stays_the_same_object(name: str) -> None:
    make, path, _ = KINDS[name]
    place = places(*make())[path]
    before = place.get()
    place.set("other")
    assert place.get() is before


def test_places_of_the_model_and_the_loss_are_told_from_those_of_code_that_others_run() -> None:
    found = places(Counted(), OfAClass())
    assert found["loss.calls"].own
    assert found["training"].own
    assert not found["Counted.total"].own


CALLED = [
    "object that is the loss", "module that is the loss", "bound method", "attribute of a function", "closure",
    "closure that is decorated", "global", "global, by another function",
]  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_a_call_is_seen_in_the_place_and_can_be_undone(name: str) -> None:
    make, path, value = KINDS[name]
    model, loss, hooks = make()
    place, x = places(model, loss, hooks)[path], torch.ones(1)
    loss(x, x)
    assert place.get() == value + 1
    place.set(value)
    assert places(model, loss, hooks)[path].get() == value


# --- what there is not


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.LSTM(2, 2)], ids=repr)
def test_parameters_buffers_and_torchs_own_tables_are_no_variables(model: nn.Module) -> None:
    tensors = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert set(places(model)).isdisjoint([*tensors, "_parameters", "_buffers", "_modules", "_forward_hooks"])


def test_code_of_torch_is_not_looked_into() -> None:
    assert set(places(net(), nn.functional.mse_loss)) == {"training"}
    assert not any(path.startswith(("torch", "global")) for path in places(nn.Linear(1, 1), nn.MSELoss()))


def untouched(output: Tensor, target: Tensor) -> Tensor:
    return output - target


def test_variables_that_no_code_names_are_not_looked_at() -> None:
    assert set(places(net(), untouched)) == {"training"}


def test_class_attributes_that_no_code_names_are_not_either() -> None:
    class Silent(Net):
        total = 3

    assert not any("total" in path for path in places(Silent()))


# --- what changes


def test_an_attribute_that_is_made_later_is_found_then() -> None:
    model = net()
    assert "calls" not in places(model)
    model.calls = 1
    assert places(model)["calls"].get() == 1


def test_an_attribute_can_be_taken_away_again() -> None:
    model = net(calls=1)
    place = places(model)["calls"]
    place.set(ABSENT)
    assert not hasattr(model, "calls")
    assert place.get() is ABSENT
    place.set(ABSENT)  # once more does no harm
    place.set(2)
    assert model.calls == 2


def test_so_can_an_attribute_of_a_class() -> None:
    class Late(Net):
        total: ClassVar[int] = 1

        def forward(self, x: Tensor) -> Tensor:
            return x * self.total

    place = next(place for path, place in places(Late()).items() if path.endswith("Late.total"))
    place.set(ABSENT)
    assert "total" not in vars(Late)
    place.set(ABSENT)
    place.set(5)
    assert Late.total == 5


def test_a_cell_that_is_empty_has_nothing() -> None:
    def outer() -> Any:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return output * late

        if outer.__name__ == "":
            late = 1
        return loss

    (path,) = (path for path in places(net(), outer()) if path.endswith("late"))
    assert places(net(), outer())[path].get() is ABSENT


def test_nothing_says_so_and_stays_the_same_when_it_travels() -> None:
    assert repr(ABSENT) == "nothing"
    assert pickle.loads(pickle.dumps(ABSENT)) is ABSENT


# --- names


def test_paths_are_unique() -> None:
    found = [place.path for place in variables_of(with_hook(OfAClass()), None, [OfAClass()])]
    assert len(found) == len(set(found))
    assert {"hook.calls", "hook.calls (2)"} <= set(found)


def test_the_order_is_the_same_for_each_copy() -> None:
    value = nested(calls=1, seen=[2]), OfAClass()
    one, other = ([place.path for place in variables_of(*freeze(value).thaw())] for _ in range(2))
    assert one == other == [place.path for place in variables_of(*value)]


def test_a_value_in_two_places_of_one_dict_is_one_place() -> None:
    def twice(output: Tensor, target: Tensor) -> Tensor:
        return with_table(output, target) + len(TABLE)

    paths = [path for path in places(net(), twice) if "TABLE" in path]
    assert paths == [f"{__name__}.TABLE"]


def test_a_module_in_two_places_of_a_model_counts_once() -> None:
    layer = net(calls=3)
    assert [path for path in places(nn.Sequential(layer, layer)) if "calls" in path] == ["0.calls"]


# --- modules beside a script


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    (tmp_path / "counting_beside.py").write_text(
        "calls = 3\ntable = {}\ndef loss(o, t):\n    global calls\n    calls += 1\n    return o\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("counting_beside")
    del sys.modules["counting_beside"]


def test_variables_of_a_module_are_found_by_its_functions(beside: types.ModuleType) -> None:
    assert places(net(), beside.loss)["counting_beside.calls"].get() == 3


def test_and_by_whoever_names_the_module(beside: types.ModuleType) -> None:
    variables: dict[str, Any] = {"__name__": "__main__", "beside_here": beside}
    exec("def loss(o, t):\n    return beside_here.calls", variables)
    place = places(net(), variables["loss"])["counting_beside.calls"]
    place.set(7)
    assert beside.calls == 7


def test_variables_of_a_notebook_are_called_global() -> None:
    variables: dict[str, Any] = {"__name__": "__main__", "calls": 3}
    exec("def loss(o, t):\n    global calls\n    calls += 1\n    return o", variables)
    assert places(net(), variables["loss"])["global calls"].get() == 3


# --- places that are not there yet


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("calls", lambda model, loss: model),
        ("1.0.calls", lambda model, loss: model[1][0]),
        ("loss.calls", lambda model, loss: loss),
        ("loss.0.calls", lambda model, loss: loss[0]),
    ],
)
def test_a_place_to_be_is_in_the_module_of_its_path(path: str, owner: Callable[[Any, Any], Any]) -> None:
    model, loss = nested(), nn.Sequential(nn.MSELoss())
    place = variable_to_be(model, loss, path)
    assert place is not None
    place.set(4)
    assert owner(model, loss).calls == 4


def test_a_loss_that_is_no_module_has_places_to_be_too() -> None:
    loss = OfAClass()
    place = variable_to_be(net(), loss, "loss.later")
    assert place is not None
    place.set(4)
    assert loss.later == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["nobody.calls", "loss.nobody.calls", "global calls.x"])
def test_where_there_is_no_owner_there_is_no_place(path: str) -> None:
    assert variable_to_be(net(), nn.MSELoss(), path) is None


def test_a_loss_without_attributes_has_no_place_to_be() -> None:
    assert variable_to_be(net(), len, "loss.calls") is None
