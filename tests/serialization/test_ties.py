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
class LocalChunks:
    model: Any


def by_keyword(output: Any, target: Any, *, model: Any = MODEL) -> Tensor:
    return model.weight.sum()  # type: ignore[no-any-return]


def by_attribute(output: Any, target: Any) -> Tensor:
    return by_attribute.model.weight.sum()  # type: ignore[attr-defined,no-any-return]


by_attribute.model = MODEL  # type: ignore[attr-defined]


@functools.lru_cache
def by_cache(output: Any, target: Any) -> Tensor:
    return MODEL.weight.sum()


def by_the_cache_of_another(output: Any, target: Any) -> Tensor:
    return by_cache(None, None)


@functools.wraps(by_name)
def by_wrapping(*given: Any) -> Tensor:
    return by_wrapping.__wrapped__(*given)  # type: ignore[no-any-return]


SEEN = MODEL.weight.detach()
AS_ARRAY = SEEN.numpy()


def by_its_memory(output: Any, target: Any) -> Tensor:
    return SEEN.sum()


def by_an_array(output: Any, target: Any) -> Tensor:
    return torch.tensor(AS_ARRAY[1:].sum() + AS_ARRAY[:1].sum())


class KnowingByAttribute:
    model = MODEL

    def __call__(self, *_: Any) -> Tensor:
        return self.model.weight.sum()  # type: ignore[no-any-return]


class KnowingByList:
    held: Any = ({"models": [MODEL]},)

    def __call__(self, *_: Any) -> Tensor:
        return self.held[0]["models"][0].weight.sum()  # type: ignore[no-any-return]


class KnowingByNested:
    class Inner:
        def penalty(self) -> Tensor:
            return MODEL.weight.sum()

    def __call__(self, *_: Any) -> Tensor:
        return self.Inner().penalty()


class KnowingByPartialMethod:
    def weigh(self, model: Any) -> Tensor:
        return model.weight.sum()  # type: ignore[no-any-return]

    penalty = functools.partialmethod(weigh, MODEL)

    def __call__(self, *_: Any) -> Tensor:
        return self.penalty()


class KnowingByCachedMethod:
    @staticmethod
    @functools.lru_cache
    def penalty() -> Tensor:
        return MODEL.weight.sum()

    def __call__(self, *_: Any) -> Tensor:
        return self.penalty()


class Descriptor:
    def __get__(self, *_: Any) -> Tensor:
        return MODEL.weight.sum()


class KnowingByDescriptor:
    penalty = Descriptor()

    def __call__(self, *_: Any) -> Tensor:
        return self.penalty


class KnowingByDeleter:
    @property
    def penalty(self) -> Tensor:
        return self.__dict__.pop("kept", None) or OTHER.weight.sum()  # type: ignore[no-any-return]

    @penalty.deleter
    def penalty(self) -> None:
        self.__dict__["kept"] = MODEL.weight.sum()

    def __call__(self, *_: Any) -> Tensor:
        del self.penalty
        return self.penalty


class Meta(type):
    @property
    def penalty(cls) -> Tensor:
        return MODEL.weight.sum()


class KnowingByMeta(metaclass=Meta):
    def __call__(self, *_: Any) -> Tensor:
        return type(self).penalty  # type: ignore[no-any-return,attr-defined]


class Here:
    """Of two classes that name each other, the one that names the model."""

    def __call__(self, *_: Any) -> Tensor:
        return MODEL.weight.sum() if _ else Beside()(0)


class Beside:
    def __call__(self, *_: Any) -> Tensor:
        return Here()(0)


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
    "by keyword": by_keyword,
    "by attribute": by_attribute,
    "by cache": by_cache,
    "by the cache of another": by_the_cache_of_another,
    "by wrapping": by_wrapping,
    "by its memory": by_its_memory,
    "by an array": by_an_array,
    "class with an attribute": KnowingByAttribute,
    "class with a list": KnowingByList,
    "class with a class": KnowingByNested,
    "class with a partial method": KnowingByPartialMethod,
    "class with a cached method": KnowingByCachedMethod,
    "class with a descriptor": KnowingByDescriptor,
    "class with a deleter": KnowingByDeleter,
    "class of a class": KnowingByMeta,
    "class that names another": Beside,
    "object of such a class": KnowingByNested(),
    "partial": partial(by_default, model=MODEL),
    "object": LocalChunks(MODEL),
    "list": [1, [MODEL.weight]],
    "bound method": LocalChunks(MODEL).__repr__,
    "model": MODEL,
    "a model around it": nn.Sequential(MODEL),
}


@pytest.mark.parametrize("name", KNOWING)
def test_what_knows_the_model_is_known(name: str) -> None:
    assert ties().known_to(KNOWING[name])


def test_in_a_circle_all_are_known_in_whatever_order() -> None:
    for order in ((Here, Beside), (Beside, Here), (in_a_circle, around), (around, in_a_circle)):
        found = list(map(ties().known_to, order))
        assert found == [True, True]


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


INDIRECT = ["by keyword", "by attribute", "by cache", "by the cache of another", "by wrapping", "by its memory"]
INDIRECT += ["by an array", *(name for name in KNOWING if name.startswith(("class with a", "class of", "class that")))]
SILENT = {"class with a property", "class with a static method", "class with a class method"}
SILENT.add("class with a cached property")  # they are not called


@pytest.mark.parametrize("name", [name for name in INDIRECT if name not in SILENT])
def test_a_copy_here_reads_the_copy_of_the_model_by_whatever_way(name: str) -> None:
    thing = KNOWING[name]
    made, loss = copied_here((MODEL, thing() if isinstance(thing, type) else thing), MODEL)
    x = torch.zeros(1, 2)
    doubled(made)
    assert float(loss(x, x).detach()) == (16.0 if name == "by wrapping" else 8.0)


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
