"""Ties: functions and classes that know a model by a variable; with a copy of the model, they know the copy."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parakit.serialization import freeze
from parakit.serialization.code_names import names_in
from parakit.serialization.ties import Ties

MODEL: Any = nn.Linear(2, 2)  # the one that functions of this file know
OTHER: Any = nn.Linear(2, 2)
HELD = {"layers": [MODEL]}


def own(model: nn.Module) -> list[Any]:
    return [*model.modules(), *model.parameters(), *model.buffers()]


def ties() -> Ties:
    return Ties(own(MODEL))


# --- who knows the model


def by_name(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean() + MODEL.weight.square().sum()


def by_calling(output: Tensor, target: Tensor) -> Tensor:
    return by_name(output, target) * 2


def by_a_function_inside(output: Tensor, target: Tensor) -> Tensor:
    def penalty() -> Tensor:
        return MODEL.weight.square().sum()

    return penalty()


def by_a_table(output: Tensor, target: Tensor) -> Tensor:
    return HELD["layers"][0].weight.sum()


def in_a_circle(output: Tensor, target: Tensor) -> Tensor:
    return around(output, target) if len(output) else MODEL.weight.sum()


def around(output: Tensor, target: Tensor) -> Tensor:
    return in_a_circle(output, target)


def by_default(output: Tensor, target: Tensor, model: Any = MODEL) -> Tensor:
    return model.weight.sum()


def by_closure(model: Any) -> Callable[..., Tensor]:
    return lambda output, target: model.weight.sum()


class Knowing:
    """A loss of a class that names the model."""

    def __call__(self, *_: Any) -> Tensor:
        return MODEL.weight.sum()


class KnowingByProperty:
    @property
    def penalty(self) -> Tensor:
        return MODEL.weight.sum()


class KnowingByCachedProperty:
    @functools.cached_property
    def penalty(self) -> Tensor:
        return MODEL.weight.sum()


class KnowingByStatic:
    @staticmethod
    def penalty() -> Tensor:
        return MODEL.weight.sum()


class KnowingByClassMethod:
    @classmethod
    def penalty(cls) -> Tensor:
        return MODEL.weight.sum()


class Heir(Knowing):
    pass


@dataclass
class Holding:
    model: Any


KNOWING: dict[str, Any] = {
    "by name": by_name,
    "by calling": by_calling,
    "by a function inside": by_a_function_inside,
    "by a table": by_a_table,
    "in a circle": in_a_circle,
    "by default": by_default,
    "by closure": by_closure(MODEL),
    "by a parameter": by_closure(MODEL.weight),
    "lambda": lambda o, t: MODEL.weight.sum(),
    "class": Knowing,
    "class with a property": KnowingByProperty,
    "class with a cached property": KnowingByCachedProperty,
    "class with a static method": KnowingByStatic,
    "class with a class method": KnowingByClassMethod,
    "heir": Heir,
    "partial": partial(by_default, model=MODEL),
    "object": Holding(MODEL),
    "list": [1, [MODEL.weight]],
    "bound method": Holding(MODEL).__repr__,
    "model": MODEL,
    "a model around it": nn.Sequential(MODEL),
}


@pytest.mark.parametrize("name", KNOWING)
def test_what_knows_the_model_is_known(name: str) -> None:
    assert ties().known_to(KNOWING[name])


def knows_another(output: Tensor, target: Tensor) -> Tensor:
    return OTHER.weight.sum()


def names_it_as_an_attribute(output: Any, target: Tensor) -> Tensor:
    return output.MODEL.sum()  # type: ignore[no-any-return]


class Stranger:
    MODEL = "a word"


STRANGERS: dict[str, Any] = {
    "another model": knows_another,
    "an attribute of that name": names_it_as_an_attribute,
    "a function of torch's": nn.functional.mse_loss,
    "a class of torch's": nn.MSELoss,
    "an object of torch's": nn.MSELoss(),
    "a class with such a word": Stranger,
    "closure over another": by_closure(OTHER),
    "an equal tensor": MODEL.weight.detach().clone(),
    "a number": 3,
    "a word": "MODEL",
    "nothing": None,
    "a module": torch,
    "what cannot be pickled": (number for number in range(3)),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_does_not_know_it_is_not(name: str) -> None:
    assert not ties().known_to(STRANGERS[name])


def test_an_empty_cell_knows_nothing() -> None:
    def outer() -> Callable[[], Any]:
        def inner() -> Any:
            return late

        if outer.__name__ == "":
            late = MODEL
        return inner

    assert not ties().known_to(outer())


def test_a_tied_parameter_is_known_in_either_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert Ties(own(model[0])).known_to(by_closure(model[1].weight))


# --- what copies know


def copied_here(value: Any, model: nn.Module) -> Any:
    return freeze(value, own=own(model)).thaw()


def doubled(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)


CALLED = ["by name", "by calling", "by a function inside", "by a table", "by default", "by closure", "lambda"]


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("here", [True, False], ids=["here", "there"])
def test_a_copy_of_a_function_knows_the_copy_of_the_model(name: str, here: bool) -> None:
    value = (MODEL, KNOWING[name])
    made, loss = copied_here(value, MODEL) if here else freeze(value).thaw()
    x = torch.zeros(1, 2)
    doubled(made)
    loss(x, x).backward()
    assert made.weight.grad is not None
    assert MODEL.weight.grad is None


@pytest.mark.parametrize("kind", [Knowing, Heir])
def test_so_does_a_copy_of_an_object_whose_class_names_it(kind: Any) -> None:
    made, loss = copied_here((MODEL, kind()), MODEL)
    doubled(made)
    assert float(loss(None, None).detach()) == 8.0


def test_a_class_that_names_the_model_is_made_anew() -> None:
    _, loss = copied_here((MODEL, Knowing()), MODEL)
    assert type(loss) is not Knowing
    assert type(loss).__name__ == "Knowing"


def test_functions_are_the_same_where_none_knows_the_model() -> None:
    _, loss = copied_here((MODEL, knows_another), MODEL)
    assert loss is knows_another


def test_two_functions_that_name_a_model_know_one_copy() -> None:
    made, (one, other) = copied_here((MODEL, [by_name, by_calling]), MODEL)
    x = torch.zeros(1, 2)
    doubled(made)
    assert float(other(x, x).detach()) == 2 * float(one(x, x).detach()) == 32.0


def test_a_model_that_knows_itself_by_name_knows_its_copy() -> None:
    space: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec("class Net(nn.Linear):\n    def forward(self, x):\n        return x @ net.weight", space)
    net = space["net"] = space["Net"](2, 2)
    made = copied_here(net, net)
    doubled(made)
    assert made(torch.ones(1, 2)).tolist() == [[4.0, 4.0]]


# --- names in code


def test_names_of_variables_and_of_attributes_are_told_apart() -> None:
    def function(x: Any) -> Any:
        return HELD.get(x.size) or OTHER

    names = names_in(function.__code__)
    assert names.variables == ("HELD", "OTHER")
    assert names.attributes == ("get", "size")


def test_names_in_functions_inside_count_too() -> None:
    def function() -> Any:
        return [lambda: MODEL.bias for _ in HELD]

    names = names_in(function.__code__)
    assert {"MODEL", "HELD"} <= set(names.variables)
    assert "bias" in names.attributes


def test_a_variable_that_is_set_is_one() -> None:
    code = compile("def f():\n    global count\n    count = 1", "<cell>", "exec")
    (inner,) = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    assert names_in(inner).variables == ("count",)
