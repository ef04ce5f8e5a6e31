"""Places: which lines of the user's own an error came by; and a failed run in words, with them."""

from __future__ import annotations

import importlib
import linecache
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parakit.data.samples import Samples
from parakit.errors import DataError, Diverged, LossError, ParakitError, RunFailed
from parakit.failures.run_failed import code_failure
from parakit.failures.source_lines import Place, describe_error, listing, places_of, raised_by_parakit, short
from parakit.workers.commands import Failure

HERE = Path(__file__).name


def raised(function: Callable[[], Any]) -> Exception:
    """The error that a call raises."""
    try:
        function()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


def inner() -> None:
    raise ValueError("within")


def outer() -> None:
    inner()


def in_torch() -> None:
    torch.ones(2, 3) @ torch.ones(2, 3)


def in_a_layer_of_torch() -> None:
    nn.Sequential(nn.Linear(3, 2))(torch.ones(1, 4))


def in_parakit() -> None:
    Samples.of((torch.ones(2), torch.ones(3)))


def in_python() -> None:
    importlib.import_module("there_is_no_such_module")


def deep(levels: int) -> None:
    if levels:
        deep(levels - 1)
    raise ValueError("deep")


def functions(error: BaseException) -> list[str]:
    return [place.function for place in places_of(error)]


# --- which lines


def test_the_users_lines_come_from_the_outside_in() -> None:
    error = raised(outer)
    assert functions(error) == ["raised", "outer", "inner"]
    assert {Path(place.file).name for place in places_of(error)} == {HERE}


def test_a_place_is_the_line_that_raised() -> None:
    last = places_of(raised(outer))[-1]
    assert linecache.getline(last.file, last.line).strip() == 'raise ValueError("within")'


@pytest.mark.parametrize("function", [in_torch, in_a_layer_of_torch, in_parakit, in_python])
def test_lines_of_torch_parakit_and_python_are_left_out(function: Callable[[], None]) -> None:
    error = raised(function)
    assert functions(error) == ["raised", function.__name__]
    assert len(traceback.extract_tb(error.__traceback__)) >= len(places_of(error))


def test_the_innermost_of_many_are_told() -> None:
    assert functions(raised(lambda: deep(20))) == ["deep"] * 4


def test_an_error_that_was_never_raised_has_no_place() -> None:
    assert places_of(ValueError("never")) == ()
    assert not raised_by_parakit(ValueError("never"))


def of_file(source: str, file: str, name: str = "function") -> Callable[[], None]:
    space: dict[str, Any] = {}
    exec(compile(source, file, "exec"), space)
    made: Callable[[], None] = space[name]
    return made


RAISES = "def function():\n    raise ValueError('there')\n"
INSTALLED = str(Path(torch.__file__).parent / "nn" / "made_up.py")


def without_own_frames(function: Callable[[], None]) -> Exception:
    """The error of a call, as if nobody of this file had made it."""
    error = raised(function)
    assert error.__traceback__ is not None
    return error.with_traceback(error.__traceback__.tb_next)


def test_where_no_line_is_the_users_the_one_that_raised_is_told() -> None:
    error = without_own_frames(of_file(RAISES, INSTALLED))
    assert places_of(error) == (Place(INSTALLED, 2, "function"),)


CELLS = ["/tmp/ipykernel_4711/1234567.py", "<stdin>", "<string>", "<ipython-input-3-abc>"]


@pytest.mark.parametrize("file", CELLS)
def test_cells_of_a_notebook_are_the_users(file: str) -> None:
    error = without_own_frames(of_file(RAISES, file))
    assert places_of(error) == (Place(file, 2, "function"),)


@pytest.mark.parametrize("file", ["<frozen importlib._bootstrap>", "<__array_function__ internals>"])
def test_what_has_no_file_is_not(file: str) -> None:
    inside = of_file(RAISES, file)
    assert functions(raised(inside)) == ["raised"]


# --- whose mistake


def test_an_error_with_the_users_code_on_the_way_is_not_parakits() -> None:
    assert not raised_by_parakit(raised(in_parakit))
    assert not raised_by_parakit(raised(outer))


def test_an_error_out_of_parakits_own_code_is_and_has_no_place() -> None:
    error = raised(in_parakit)
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_next is not None
    error = error.with_traceback(error.__traceback__.tb_next.tb_next)
    assert raised_by_parakit(error)
    assert places_of(error) == ()


def test_an_error_out_of_torch_is_not() -> None:
    assert not raised_by_parakit(without_own_frames(of_file(RAISES, INSTALLED)))


# --- in words


def test_an_error_is_told_in_one_line() -> None:
    assert describe_error(ValueError("two\n   lines")) == "ValueError: two lines"
    assert describe_error(KeyError("x")) == "KeyError: 'x'"


def test_a_long_one_is_cut() -> None:
    text = describe_error(ValueError("x" * 1000))
    assert text.endswith("x...")
    assert len(text) < 330


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/tmp/ipykernel_4711/1234567.py", "a cell of this notebook"),
        ("/srv/me/train.py", "train.py"),
        ("/usr/lib/python3/site-packages/torch/nn/modules/linear.py", "torch/nn/modules/linear.py"),
        ("/usr/lib/python3/dist-packages/numpy/core.py", "numpy/core.py"),
        ("<stdin>", "<stdin>"),
    ],
)
def test_files_are_called_as_people_do(file: str, name: str) -> None:
    assert short(file) == name


def test_a_listing_shows_lines() -> None:
    last = places_of(raised(outer))[-1]
    assert listing([last]) == f'  File "{HERE}", line {last.line}, in inner\n    raise ValueError("within")'


def test_a_line_that_cannot_be_read_is_left_out() -> None:
    assert listing([Place("/nowhere/else.py", 3, "f")]) == '  File "else.py", line 3, in f'
    assert listing([]) == ""


@pytest.fixture
def cell() -> Iterator[str]:
    """A cell, whose lines the notebook's own process knows."""
    file, source = "/tmp/ipykernel_4711/42.py", "def forward(x):\n    return x + y\n"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    yield file
    del linecache.cache[file]


def test_lines_of_a_cell_are_read_where_they_are_shown(cell: str) -> None:
    assert listing([Place(cell, 2, "forward")]) == (
        '  File "a cell of this notebook", line 2, in forward\n    return x + y'
    )


def test_a_module_beside_a_notebook_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_beside.py").write_text(RAISES)
    monkeypatch.syspath_prepend(tmp_path)
    module: types.ModuleType = importlib.import_module("raising_beside")
    try:
        last = places_of(raised(module.function))[-1]
    finally:
        del sys.modules["raising_beside"]
    assert (Path(last.file).name, last.line, last.function) == ("raising_beside.py", 2, "function")


# --- failed runs


@dataclass(frozen=True)
class Told:
    error: str = "ValueError"
    text: str = "too wide"
    places: tuple[Place, ...] = ()
    ours: bool = False
    in_parts: bool = False


def lines(failed: RunFailed) -> list[str]:
    return str(failed).splitlines()


def test_a_failure_of_the_users_code_says_what_where_and_what_to_do(cell: str) -> None:
    failed = code_failure("Step 3 failed", Told(places=(Place(cell, 2, "forward"),)), (), remedy="look there")
    assert lines(failed) == [
        "Step 3 failed: ValueError: too wide",
        '  File "a cell of this notebook", line 2, in forward',
        "    return x + y",
        "Likely cause: the model, the loss or the optimizer raised this error in its own code",
        "Remedy: look there",
    ]


@pytest.mark.parametrize(
    ("rows", "words"), [((4,), "(rows 4 of the data)"), (range(6), "(rows 0, 1, 2, 3, 4, 5 of the data)")]
)
def test_the_rows_are_told(rows: Any, words: str) -> None:
    assert lines(code_failure("Step 3 failed", Told(), rows, remedy=""))[0].endswith(f"too wide {words}")


def test_of_many_rows_the_first_are() -> None:
    assert "(rows 0, 1, 2, 3, 4, 5 and 94 others of the data" in str(code_failure("", Told(), range(100), remedy=""))


def test_a_mistake_of_parakits_is_admitted() -> None:
    text = str(code_failure("Step 3 failed", Told(ours=True), (), remedy="look there"))
    assert "a mistake in parakit itself: no code of yours was on the way" in text
    assert "look there" not in text


@pytest.mark.parametrize("kind", [LossError, Diverged])
def test_an_error_in_parakits_words_keeps_its_parts(kind: Any) -> None:
    error = kind("the loss is no number", where='  File "x.py", line 1, in f', cause="a rate", remedy="a smaller one")
    failed = code_failure("Step 3 failed", Failure.of("code", 3, error), (), remedy="look there")
    assert lines(failed) == [
        "Step 3 failed: the loss is no number",
        '  File "x.py", line 1, in f',
        "Likely cause: a rate",
        "Remedy: a smaller one",
    ]


def test_one_without_a_remedy_gets_one() -> None:
    failed = code_failure("Step 3 failed", Failure.of("code", 3, LossError("no number")), (), remedy="look there")
    assert lines(failed) == ["Step 3 failed: no number", "Remedy: look there"]


def test_a_users_error_of_such_a_name_is_still_the_users() -> None:
    assert "ParakitErrorOfMine: too wide" in str(code_failure("", Told("ParakitErrorOfMine"), (), remedy=""))


@pytest.mark.parametrize("name", ["DataError", "RunFailed", "ParakitError", "ModelError"])
def test_also_one_of_the_very_same_name(name: str) -> None:
    def fail() -> None:
        raise type(name, (ValueError,), {})("column x is missing")

    failure = pickle.loads(pickle.dumps(Failure.of("code", 3, raised(fail))))  # as from another process
    failed = code_failure("Step 3 failed", failure, (1, 2), remedy="look there")
    assert lines(failed)[0] == f"Step 3 failed: {name}: column x is missing (rows 1, 2 of the data)"
    assert ", in fail" in lines(failed)[3]
    assert lines(failed)[-2].startswith("Likely cause: the model, the loss or the optimizer raised this error")
    assert failed.rows == (1, 2)


class OfMine(LossError):
    """Derived from one of parakit's, and so in its words."""


@pytest.mark.parametrize("error", [ParakitError("too wide"), DataError("too wide"), OfMine("too wide")], ids=repr)
def test_parakits_own_are_told_by_their_class(error: Exception) -> None:
    failure = pickle.loads(pickle.dumps(Failure.of("code", 3, error)))
    assert lines(code_failure("Step 3 failed", failure, (1, 2), remedy="look there")) == [
        "Step 3 failed: too wide", "Remedy: look there",
    ]  # fmt: skip
