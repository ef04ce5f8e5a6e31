"""The options of training are the same everywhere."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest

import parakit as pk
from parakit.runs.options import DEFAULTS, TrainOptions, with_defaults

SPELLED_OUT = {
    name: parameter
    for name, parameter in inspect.signature(pk.train).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "on"
}


def test_train_spells_out_every_option_with_its_type() -> None:
    types = get_type_hints(pk.train)
    assert get_type_hints(TrainOptions) == {name: types[name] for name in SPELLED_OUT}


def test_train_spells_out_every_default() -> None:
    assert {name: parameter.default for name, parameter in SPELLED_OUT.items()} == with_defaults({}, "train")
    assert None not in DEFAULTS.values()


def test_an_option_that_is_given_counts() -> None:
    assert with_defaults({"seed": 7, "epochs": 2}, "train") == with_defaults({}, "train") | {"seed": 7, "epochs": 2}


def test_an_option_that_there_is_not_is_refused_as_python_does() -> None:
    with pytest.raises(TypeError, match=r"^plan\(\) got an unexpected keyword argument 'epoch'$"):
        with_defaults({"epoch": 2}, "plan")  # type: ignore[typeddict-unknown-key]
