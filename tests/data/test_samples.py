"""Samples: what a user may give as data, and what becomes of it."""

from __future__ import annotations

import pickle
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, StackDataset, Subset, TensorDataset

from parakit.data.samples import Samples
from parakit.errors import DataError
from parakit.trees import leaves, map_tree, pack, unpack

ROWS = 7
X = torch.arange(ROWS * 3, dtype=torch.float32).view(ROWS, 3)
Y = torch.arange(ROWS)


class Items(Dataset[Any]):
    """A map-style Dataset over a list of items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


class Duck:
    """Map-style, but no torch Dataset."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> Any:
        return X[row], int(Y[row])


class Doubling(TensorDataset):
    """A TensorDataset whose items are not its tensors' rows."""

    def __getitem__(self, row: int) -> Any:
        inputs, target = super().__getitem__(row)
        return 2 * inputs, target


class Unsized(Dataset[Any]):
    def __getitem__(self, row: int) -> Any:
        return X[row], Y[row]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


def read_only(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy().copy()
    array.setflags(write=False)
    return array


PAIRS = list(zip(X, Y, strict=True))
SAME: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "list of two": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "read-only arrays": lambda: (read_only(X), read_only(Y)),
    "arrays laid out otherwise": lambda: (np.asfortranarray(X.numpy()), Y.numpy()[::-1][::-1]),
    "tensors with a gradient": lambda: (X.clone().requires_grad_(), Y),
    "data frame and series": lambda: (pandas.DataFrame(X.numpy()), pandas.Series(Y.numpy())),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset of tensors": lambda: Items(PAIRS),
    "Dataset of arrays and numbers": lambda: Items([(x.numpy(), int(y)) for x, y in PAIRS]),
    "Dataset of lists": lambda: Items([[x, y] for x, y in PAIRS]),
    "Subset": lambda: Subset(TensorDataset(X.flip(0), Y.flip(0)), list(range(ROWS))[::-1]),
    "StackDataset": lambda: StackDataset(X, Y),
    "something like a Dataset": Duck,
    "samples": lambda: Samples(X, Y),
}


@pytest.mark.parametrize("form", SAME)
def test_one_and_the_same_data_may_have_many_forms(form: str) -> None:
    samples = Samples.of(SAME[form]())
    assert len(samples) == ROWS
    assert torch.equal(samples.inputs, X)
    assert torch.equal(samples.targets, Y)
    assert (samples.inputs.dtype, samples.targets.dtype) == (torch.float32, torch.int64)
    assert not samples.inputs.requires_grad


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int8", "bool", "complex64"])
def test_arrays_keep_their_type(dtype: str) -> None:
    samples = Samples.of((np.ones((3, 2), dtype), np.zeros(3)))
    assert str(samples.inputs.dtype) == f"torch.{dtype}"
    assert samples.targets.dtype == torch.float64


@pytest.mark.parametrize("several", [(X, X + 1), [X, X + 1], (X.numpy(), X + 1)])
def test_inputs_may_be_a_tuple(several: Any) -> None:
    samples = Samples.of((several, Y))
    assert isinstance(samples.inputs, tuple)
    assert torch.equal(samples.inputs[0] + 1, samples.inputs[1])


def test_inputs_may_be_a_dict_within_a_tuple() -> None:
    samples = Samples.of(((X, {"more": X + 1}), Y))
    assert len(samples) == ROWS
    assert torch.equal(samples.inputs[1]["more"], X + 1)


def test_targets_may_be_several() -> None:
    samples = Samples.of((X, {"label": Y, "box": X}))
    assert torch.equal(samples.targets["label"], Y)


def test_the_items_of_a_dataset_may_hold_tuples_and_dicts() -> None:
    samples = Samples.of(Items([({"a": x, "b": (x, x + 1)}, (y, y)) for x, y in PAIRS]))
    assert torch.equal(samples.inputs["a"], X)
    assert torch.equal(samples.inputs["b"][1], X + 1)
    assert torch.equal(samples.targets[1], Y)


def test_a_dataset_of_thousands_is_read_whole_and_in_order() -> None:
    count = 2500
    samples = Samples.of(Items([((torch.tensor([float(row)]), {"a": row}), row) for row in range(count)]))
    assert torch.equal(samples.targets, torch.arange(count))
    assert torch.equal(samples.inputs[0][:, 0], torch.arange(count, dtype=torch.float32))
    assert torch.equal(samples.inputs[1]["a"], torch.arange(count))


def test_the_items_of_a_dataset_count_not_the_tensors_it_is_made_of() -> None:
    assert torch.equal(Samples.of(Doubling(X, Y)).inputs, 2 * X)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "empty tensors": (lambda: (X[:0], Y[:0]), "0 samples"),
    "empty TensorDataset": (lambda: TensorDataset(X[:0], Y[:0]), "0 samples"),
    "empty Dataset": (lambda: Items([]), "0 samples"),
    "no inputs": (lambda: ((), Y), "no tensor in its inputs or its targets"),
    "no targets": (lambda: (X, {}), "no tensor in its inputs or its targets"),
    "unequal lengths": (lambda: (X, Y[:3]), "7 rows of inputs but 3 rows of targets"),
    "inputs of unequal lengths": (lambda: ((X, X[:2]), Y), "2 and 7 rows of inputs"),
    "three tensors": (lambda: (X, X, Y), "3 parts where 2 are needed"),
    "one tensor in a TensorDataset": (lambda: TensorDataset(X), "1 tensors where 2 are needed"),
    "three tensors in a TensorDataset": (lambda: TensorDataset(X, X, Y), "3 tensors where 2 are needed"),
    "Dataset of threes": (lambda: Items([(x, x, y) for x, y in PAIRS]), "not a pair"),
    "Dataset of dicts": (lambda: Items([{"x": x, "y": y} for x, y in PAIRS]), "An item of data is a dict"),
    "Dataset of numbers": (lambda: Items([1, 2]), "An item of data is an int"),
    "ragged items": (lambda: Items([(torch.zeros(n + 1), n) for n in range(3)]), "could not be read into tensors"),
    "items of text": (lambda: Items([("one", 1), ("two", 2)]), "could not be read into tensors"),
    "Dataset that fails": (lambda: Subset(Items(PAIRS), [0, 99]), "IndexError"),
    "Dataset without a length": (Unsized, "len"),
    "IterableDataset": (Stream, "a Stream, which has no rows"),
    "DataLoader": (lambda: DataLoader(TensorDataset(X, Y)), "loader.dataset"),
    "a tensor alone": (lambda: X, "a Tensor, which parakit cannot read"),
    "an array alone": (lambda: X.numpy(), "a ndarray, which parakit cannot read"),
    "a dict": (lambda: {"x": X, "y": Y}, "a dict, which parakit cannot read"),
    "nothing": (lambda: None, "a NoneType, which parakit cannot read"),
    "a number": (lambda: 5, "an int, which parakit cannot read"),
    "a text": (lambda: "digits", "a str, which parakit cannot read"),
    "an iterator": (lambda: iter(PAIRS), "which parakit cannot read"),
    "two texts": (lambda: ("inputs", "targets"), "cannot be a tensor"),
    "array of text": (lambda: (np.array(["a", "b"]), Y[:2]), "cannot be a tensor"),
    "array of objects": (lambda: (np.array([[1], [2, 3]], dtype=object), Y[:2]), "cannot be a tensor"),
    "array of dates": (lambda: (np.array(["2025-01-01"], "datetime64[D]"), Y[:1]), "cannot be a tensor"),
    "no target": (lambda: (X, None), "a NoneType that cannot be a tensor"),
    "a data frame alone": (lambda: pandas.DataFrame(X.numpy()), "An item of data is a Series, not a pair"),
    "a data frame of text": (lambda: (pandas.DataFrame({"a": ["b"]}), Y[:1]), "cannot be a tensor"),
    "two numbers": (lambda: (5, 6), "single number"),
    "a scalar tensor": (lambda: (torch.tensor(1.0), Y), "single number"),
    "a nested tensor": (lambda: (torch.nested.nested_tensor([X[0], X[1][:2]]), Y[:2]), "a nested tensor"),
    "a nested tensor in a dict": (lambda: ({"a": torch.nested.nested_tensor([X[0], X[0]])}, Y[:2]), "a nested tensor"),
    "a tensor without values": (lambda: (X.to("meta"), Y), "meta"),
    "an array without dimensions": (lambda: (np.array(1.0), np.array(2)), "single number"),
    "lists of numbers": (lambda: ([[1.0, 2.0], [3.0, 4.0]], [0, 1]), "single number"),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_data_is_refused_with_its_reason(form: str) -> None:
    make, reason = REFUSED[form]
    with pytest.raises(DataError, match=reason):
        Samples.of(make())


def test_a_refusal_names_the_argument() -> None:
    with pytest.raises(DataError, match=r"^validation has 7 rows of inputs"):
        Samples.of((X, Y[:3]), what="validation")


# --- augmentation, which is frozen: seldom, and from whatever generator

RARE = 0.001
SHARED = np.random.default_rng(3)


def flipped(inputs: Tensor, number: float) -> Tensor:
    return inputs.flip(-1) if number < RARE else inputs


class WithAGenerator:
    """A transform that draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, inputs: Tensor) -> Tensor:
        return flipped(inputs, float(torch.rand((), generator=self.generator)))


def in_a_closure() -> Callable[[Tensor], Tensor]:
    generator = random.Random(2)
    return lambda inputs: flipped(inputs, generator.random())


AUGMENTED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "torch's generator": lambda: lambda inputs: flipped(inputs, float(torch.rand(()))),
    "numpy's generator": lambda: lambda inputs: flipped(inputs, float(np.random.rand())),  # noqa: NPY002
    "Python's generator": lambda: lambda inputs: flipped(inputs, random.random()),
    "a global generator": lambda: lambda inputs: flipped(inputs, SHARED.random()),
    "a generator in a closure": in_a_closure,
    "a generator in an attribute": WithAGenerator,
    "time": lambda: lambda inputs: inputs + time.perf_counter_ns() % 1000,
}


class Augmented(Items):
    """Items with a transform, as datasets have one."""

    def __init__(self, pairs: Any, transforms: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__(pairs)
        self.transforms = transforms

    def __getitem__(self, row: int) -> Any:
        inputs, target = super().__getitem__(row)
        for transform in self.transforms:
            inputs = transform(inputs)
        return inputs, target


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a subset"])
@pytest.mark.parametrize("name", AUGMENTED)
def test_frozen_augmentation_is_told_each_time(name: str, wrapped: bool) -> None:
    for _ in range(100):
        dataset: Any = Augmented(PAIRS, [AUGMENTED[name]()])
        with pytest.warns(UserWarning, match="random augmentation is frozen"):
            samples = Samples.of(Subset(dataset, range(len(PAIRS))) if wrapped else dataset)
        assert len(samples) == ROWS


def test_a_transform_that_draws_nothing_is_no_augmentation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Samples.of(Augmented(PAIRS, [lambda inputs: inputs * 2, nn.Flatten(0)]))


def test_an_item_with_missing_values_is_not_taken_for_random() -> None:
    samples = Samples.of(Items([(torch.tensor([float("nan"), 1.0]), 0), (torch.ones(2), 1)]))  # warnings are errors
    assert torch.equal(samples.inputs.isnan(), torch.tensor([[True, False], [False, False]]))


def test_the_users_arrays_stay_as_they_are() -> None:
    x, y = X.numpy().copy(), Y.numpy().copy()
    tensor = X.clone().requires_grad_()
    Samples.of((x, y)).take([0, 1]).inputs.zero_()
    Samples.of((tensor, Y)).take([0, 1]).inputs.zero_()
    frozen = Samples.of((read_only(X), read_only(Y)))
    frozen.inputs.zero_()  # torch cannot express "read-only", so this is a copy
    assert np.array_equal(x, X.numpy())
    assert np.array_equal(y, Y.numpy())
    assert torch.equal(tensor.detach(), X)
    assert tensor.requires_grad


def test_tensors_and_arrays_are_not_copied() -> None:
    array = X.numpy().copy()
    samples = Samples.of((array, Y))
    assert np.shares_memory(samples.inputs.numpy(), array)
    assert samples.targets.data_ptr() == Y.data_ptr()


@pytest.mark.parametrize("rows", [[4, 0, 4], (4, 0, 4), np.array([4, 0, 4]), torch.tensor([4, 0, 4])])
def test_rows_are_taken_by_number_as_copies(rows: Any) -> None:
    samples = Samples((X.clone(), {"a": X.clone()}), Y)
    taken = samples.take(rows)
    assert torch.equal(taken.inputs[0], X[[4, 0, 4]])
    assert torch.equal(taken.targets, torch.tensor([4, 0, 4]))
    taken.inputs[1]["a"].zero_()
    assert torch.equal(samples.inputs[1]["a"], X)


def test_a_slice_is_a_view() -> None:
    samples = Samples(X.clone(), Y)
    samples.slice(2, 5).inputs.zero_()
    assert len(samples.slice(2, 5)) == 3
    assert samples.inputs[2:5].abs().sum() == 0
    assert torch.equal(samples.inputs[5:], X[5:])


def test_slices_join_to_the_whole() -> None:
    samples = Samples((X, {"a": X + 1}), Y)
    whole = Samples.join([samples.slice(0, 2), samples.slice(2, 3), samples.slice(3, ROWS)])
    assert torch.equal(whole.inputs[0], X)
    assert torch.equal(whole.inputs[1]["a"], X + 1)
    assert torch.equal(whole.targets, Y)


def test_map_reaches_every_tensor_and_leaves_come_in_order() -> None:
    samples = Samples((X, {"a": X + 1}), Y).map(lambda leaf: leaf * 2)
    assert [leaf.sum().item() for leaf in leaves(samples.inputs)] == [2 * X.sum(), 2 * (X + 1).sum()]
    assert map_tree(len, {"a": [X, (Y,)]}) == {"a": (ROWS, (ROWS,))}


TYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
    torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
def test_a_tensor_of_any_type_and_shape_survives_the_journey(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 9).to(dtype)
    again = unpack(pickle.loads(pickle.dumps(pack(tensor))))
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert torch.equal(again, tensor)


def test_a_tensor_that_is_not_in_one_piece_survives_the_journey() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.rand(4, 6).to(dtype).t()[::2]
        assert torch.equal(unpack(pack(tensor)), tensor)


def test_nested_values_survive_the_journey_and_plain_ones_are_let_alone() -> None:
    value = {"a": [X, (Y.to(torch.bfloat16), {0: None})], "b": 3, "c": "text", "d": (), 5: [1.5, True]}
    again = unpack(pack(value))
    assert torch.equal(again["a"][0], X)
    assert torch.equal(again["a"][1][0], Y.to(torch.bfloat16))
    assert again["a"][1][1] == {0: None}
    assert isinstance(again["a"], list)
    assert isinstance(again["a"][1], tuple)
    assert {key: again[key] for key in ("b", "c", "d", 5)} == {"b": 3, "c": "text", "d": (), 5: [1.5, True]}


def test_packed_values_hold_no_tensor() -> None:
    packed = pack({"a": [X, (torch.ones(2, dtype=torch.bfloat16),)]})
    assert not any(isinstance(leaf, Tensor) for leaf in leaves(packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_read_only_can_be_written_to(dtype: torch.dtype) -> None:
    packed = pack({"w": torch.ones(3, dtype=dtype)})
    array = packed["w"] if isinstance(packed["w"], np.ndarray) else packed["w"].array
    array.setflags(write=False)
    arrived = unpack(packed)["w"]
    arrived.add_(1)
    assert arrived.tolist() == [2, 2, 2]
    assert array.flags.writeable is False


def test_packing_leaves_gradients_behind() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not unpack(pack(parameter)).requires_grad
    assert parameter.requires_grad
