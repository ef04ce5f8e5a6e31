"""Frozen copies: what a model and its code are is what each copy is, in this process and in any other."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import os
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, parametrize, prune

import parakit
from parakit.engines.recipe import Parts
from parakit.errors import ModelError
from parakit.model_state.hooks import ParameterHooks
from parakit.preflight.copies import frozen_parts
from parakit.serialization import Frozen, TooLarge, dumps, freeze
from parakit.serialization.local_code import by_value, is_local, is_own_code, local_modules
from parakit.system.shared_memory import CannotShare

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory without a name")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(model: nn.Module) -> Any:
    """A model with parameters that are the same each time."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=number))
    return model


def copied(value: Any) -> Any:
    """A copy as another process of the same code would have it."""
    return freeze(value).thaw()


def copied_here(value: Any, *models: nn.Module) -> Any:
    """A copy as it is made in the process of the original."""
    own = [thing for model in models for thing in (*model.modules(), *model.parameters(), *model.buffers())]
    return freeze(value, own=own).thaw()


WAYS: dict[str, Callable[[nn.Module], Any]] = {"here": lambda model: copied_here(model, model), "there": copied}
both_ways = pytest.mark.parametrize("copy", WAYS.values(), ids=WAYS)


class Tagged(nn.Module):
    """A class of a file of tests, with values of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.words, self.table = ("a", "b"), {"x": [1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - self.get_buffer("mean"))


def scaled_error(scale: Tensor, output: Tensor, target: Tensor) -> Tensor:
    return (scale * (output - target)).square().mean()


# --- what a copy is


@both_ways
def test_a_copy_has_equal_tensors_in_memory_of_its_own(copy: Callable[[nn.Module], Any]) -> None:
    model = filled(Tagged())
    made = copy(model)
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
        assert made.state_dict()[name].data_ptr() != value.data_ptr()


@both_ways
def test_a_copy_computes_the_same(copy: Callable[[nn.Module], Any]) -> None:
    model, x = filled(Tagged()), numbers(4, 3, seed=9)
    assert torch.equal(copy(model)(x), model(x))


@both_ways
def test_a_copy_knows_which_of_its_buffers_are_saved(copy: Callable[[nn.Module], Any]) -> None:
    made = copy(Tagged())
    assert "passing" in dict(made.named_buffers())
    assert "passing" not in made.state_dict()


@both_ways
def test_plain_attributes_go_along(copy: Callable[[nn.Module], Any]) -> None:
    model = Tagged()
    made = copy(model)
    assert (made.words, made.table) == (("a", "b"), {"x": [1, 2]})
    assert made.table is not model.table


@both_ways
def test_modes_are_kept_layer_by_layer(copy: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[1].eval()
    assert [layer.training for layer in copy(model)] == [True, False, True]


@both_ways
def test_frozen_parameters_stay_frozen(copy: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [p.requires_grad for p in copy(model).parameters()] == [True, False]


def test_two_copies_have_nothing_in_common() -> None:
    frozen = freeze(filled(nn.Linear(2, 2)))
    one, other = frozen.thaw(), frozen.thaw()
    with torch.no_grad():
        one.weight.zero_()
    assert torch.equal(other.weight, numbers(2, 2, seed=0))


def test_a_copy_can_be_trained() -> None:
    made = copied(filled(nn.Linear(2, 1)))
    before = made.weight.detach().clone()
    made(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        made.weight -= 0.5 * made.weight.grad
    assert torch.equal(made.weight, before - 0.5)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "float64": lambda: numbers(3, 2, dtype=torch.float64),
    "bfloat16": lambda: numbers(3, 2, dtype=torch.bfloat16),
    "float16": lambda: numbers(3, 2, dtype=torch.float16),
    "complex": lambda: torch.complex(numbers(3, 2), numbers(3, 2, seed=1)),
    "conjugate": lambda: torch.complex(numbers(3, 2), numbers(3, 2, seed=1)).conj(),
    "negative": lambda: torch.complex(numbers(3, 2), numbers(3, 2, seed=1)).conj().imag,
    "flags": lambda: numbers(3, 2) > 0,
    "bytes": lambda: torch.arange(7, dtype=torch.uint8),
    "one number": lambda: torch.tensor(2.5),
    "nothing": lambda: torch.zeros(0, 3),
    "not a number": lambda: torch.tensor([float("nan"), float("inf")]),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "on no device": lambda: torch.empty(2, 3, device="meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_every_kind_are_equal(name: str) -> None:
    tensor = TENSORS[name]()
    made = copied(tensor)
    assert (made.dtype, made.shape, made.layout, made.device) == (
        tensor.dtype, tensor.shape, tensor.layout, tensor.device,
    )  # fmt: skip
    if tensor.device.type != "meta":
        dense = [t.to_dense() if t.layout is not torch.strided else t for t in (made, tensor)]
        assert torch.equal(dense[0].isnan(), dense[1].isnan())
        assert torch.equal(dense[0].nan_to_num(), dense[1].nan_to_num())


STRIDES: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: numbers(3, 5).t(),
    "channels last": lambda: numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every second": lambda: numbers(8)[::2],
    "a column": lambda: numbers(4, 3)[:, 1],
    "expanded": lambda: numbers(3, 1).expand(3, 4),
    "from the middle": lambda: numbers(10)[3:7].view(2, 2),
    "one row, strided": lambda: torch.empty_strided((1, 3), (7, 1)).copy_(numbers(1, 3)),
}


@pytest.mark.parametrize("name", STRIDES)
def test_elements_lie_in_the_same_order(name: str) -> None:
    tensor = STRIDES[name]()
    made = copied(tensor)
    assert made.stride() == tensor.stride()
    assert torch.equal(made, tensor)


@pytest.mark.parametrize("name", STRIDES)
def test_parameters_too(name: str) -> None:
    parameter = nn.Parameter(STRIDES[name]())
    made = copied(parameter)
    assert type(made) is nn.Parameter
    assert made.stride() == parameter.stride()
    assert torch.equal(made, parameter)


def test_a_piece_of_a_large_tensor_takes_its_own_bytes_alone() -> None:
    whole = torch.zeros(1_000_000)
    frozen = freeze(whole[500_000:500_032])
    assert frozen.nbytes <= 32 * 4 + 64
    assert frozen.thaw().untyped_storage().nbytes() <= 32 * 4 + 64


def test_what_was_computed_with_a_graph_travels_as_its_values() -> None:
    computed = nn.Parameter(torch.ones(2)) * 3
    made = copied(computed)
    assert made.is_leaf
    assert not made.requires_grad
    assert made.tolist() == [3, 3]


def test_a_leaf_that_learns_still_does() -> None:
    made = copied(torch.ones(2, requires_grad=True))
    assert type(made) is Tensor
    assert made.requires_grad


# --- memory in common


def is_tied(one: Tensor, other: Tensor) -> bool:
    """Whether what is written to one is in the other."""
    with torch.no_grad():
        one.fill_(7.0)
    return bool((other == 7.0).all())


@both_ways
def test_one_parameter_in_two_places_is_one(copy: Callable[[nn.Module], Any]) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    made = copy(model)
    assert made[1].weight is made[0].weight
    assert made[1].weight is not model[0].weight


def two_in_one() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data = model[0].weight.data
    return model


def a_part_of_another() -> nn.Module:
    model: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight.data = model[0].weight.data[:2]
    return model


def transposed() -> nn.Module:
    model: Any = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    model[1].weight.data = model[0].weight.data.t()
    return model


@both_ways
@pytest.mark.parametrize("make", [two_in_one, a_part_of_another, transposed])
def test_two_parameters_in_one_memory_stay_there(make: Callable[[], Any], copy: Callable[[nn.Module], Any]) -> None:
    made = copy(make())
    assert made[1].weight is not made[0].weight
    assert is_tied(made[0].weight, made[1].weight)


@pytest.mark.parametrize("make", [two_in_one, a_part_of_another, transposed])
def test_that_parameters_have_memory_in_common_is_said(make: Callable[[], nn.Module]) -> None:
    assert freeze(make()).ties


def test_parameters_apart_have_no_ties() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight  # one parameter: whoever moves it moves both
    assert not freeze(model).ties


def test_a_buffer_that_looks_at_a_parameter_still_does() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("first", model.weight.detach()[0])
    frozen = freeze(model)
    made = frozen.thaw()
    assert frozen.ties
    assert is_tied(made.weight, made.first)


def test_buffers_alone_are_no_ties_of_parameters() -> None:
    model: Any = nn.Linear(3, 3)
    model.register_buffer("one", torch.zeros(4))
    model.register_buffer("two", model.one[1:3])
    frozen = freeze(model)
    made = frozen.thaw()
    assert not frozen.ties
    assert is_tied(made.one, made.two)


def test_views_that_lie_apart_in_one_memory_keep_their_distance() -> None:
    whole = torch.arange(100.0)
    one, other = copied((whole[10:20], whole[90:95]))
    assert one.tolist() == list(range(10, 20))
    assert other.tolist() == list(range(90, 95))
    assert other.data_ptr() - one.data_ptr() == 80 * 4


def test_views_as_other_types_share_bytes() -> None:
    whole = numbers(4)
    as_numbers, as_bytes = copied((whole, whole.view(torch.int32)))
    as_numbers.zero_()
    assert as_bytes.tolist() == [0, 0, 0, 0]


def test_a_model_and_its_loss_know_each_other() -> None:
    model = nn.Linear(2, 2)
    made, loss = copied((model, partial(scaled_error, model.bias)))
    assert loss.args[0] is made.bias


# --- what was put on modules and parameters


@both_ways
def test_hooks_on_parameters_go_along(copy: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.register_hook(lambda grad: grad * 10)
    made = copy(model)
    made(torch.ones(1, 2)).sum().backward()
    assert made.weight.grad.tolist() == [[10, 10]]


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad /= 2


@both_ways
def test_hooks_that_come_after_a_gradient_too(copy: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.register_post_accumulate_grad_hook(halve)
    made = copy(model)
    made(torch.ones(1, 2)).sum().backward()
    assert made.weight.grad.tolist() == [[0.5, 0.5]]


def test_a_frozen_parameter_keeps_its_hook_for_later() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda grad: grad * 10)
    parameter.requires_grad_(False)
    made = copied(parameter)
    assert not made.requires_grad
    (made.requires_grad_() * 1).sum().backward()
    assert made.grad.tolist() == [10, 10]


@both_ways
def test_attributes_of_parameters_go_along(copy: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(2, 2)
    model.weight.decays = "slowly"  # type: ignore[attr-defined]
    assert copy(model).weight.decays == "slowly"


@both_ways
def test_hooks_on_modules_go_along(copy: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, inputs, output: output * 0 + 5)
    assert copy(model)(torch.ones(1, 2)).tolist() == [[5, 5]]


def test_a_hook_and_a_loss_read_one_table() -> None:
    seen: dict[str, Tensor] = {}
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, inputs, output: seen.update(output=output))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return seen["output"].sum()

    made, of_copy = copied((model, loss))
    output = made(torch.ones(1, 2))
    assert torch.equal(of_copy(output, None), output.sum())
    assert seen == {}


def weight_norm() -> Any:
    return parametrizations.weight_norm(nn.Linear(3, 2))


def spectral_norm() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(3, 2))


def orthogonal() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(3, 3))


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def one_of_ones_own() -> nn.Module:
    model = nn.Linear(3, 2)
    parametrize.register_parametrization(model, "weight", Positive())
    parametrize.register_parametrization(model, "bias", Positive())
    return model


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=2)  # type: ignore[no-any-return]


PARAMETRIZED = [weight_norm, spectral_norm, orthogonal, one_of_ones_own, pruned]


@both_ways
@pytest.mark.parametrize("make", PARAMETRIZED)
def test_parametrized_layers_compute_the_same(make: Callable[[], nn.Module], copy: Callable[[nn.Module], Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().eval()
    made = copy(model)
    assert list(made.state_dict()) == list(model.state_dict())
    assert torch.equal(made(torch.ones(1, 3)), model(torch.ones(1, 3)))


@both_ways
@pytest.mark.parametrize("make", PARAMETRIZED)
def test_the_parameters_behind_them_are_the_copys_own(
    make: Callable[[], nn.Module], copy: Callable[[nn.Module], Any]
) -> None:
    made = copy(make().eval())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2).add_(1)
    before = made(torch.ones(1, 3))
    before.sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


@both_ways
def test_a_parametrization_can_be_taken_off_a_copy(copy: Callable[[nn.Module], Any]) -> None:
    model = weight_norm()
    made = copy(model)
    parametrize.remove_parametrizations(made, "weight")
    assert type(made) is nn.Linear
    assert torch.equal(made.weight, model.weight)
    assert parametrize.is_parametrized(model)


@both_ways
def test_lazy_layers_get_their_shapes_in_a_copy(copy: Callable[[nn.Module], Any]) -> None:
    model: Any = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    made = copy(model)
    assert made(numbers(4, 3)).shape == (4, 2)
    assert type(made[0]) is nn.Linear
    assert made[1].running_mean.shape == (2,)
    assert model[0].has_uninitialized_params()


def test_a_buffer_made_by_its_class_stays_one() -> None:
    model = nn.Module()
    model.table = nn.Buffer(torch.ones(2), persistent=False)
    made = copied(model)
    assert list(dict(made.named_buffers())) == ["table"]
    assert made.state_dict() == {}


# --- code


def test_a_lambda_travels() -> None:
    assert copied(lambda x: x + 1)(2) == 3


def test_a_class_of_a_function_travels_with_its_instance() -> None:
    factor = 3

    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return super().__call__(x) if x is None else x * factor

    assert copied(Local())(torch.ones(1)).tolist() == [3]


def test_here_a_copy_is_an_instance_of_the_same_class() -> None:
    class Local(nn.Module):
        pass

    for model in (Local(), Tagged()):
        assert type(copied_here(model, model)) is type(model)


def test_here_functions_are_the_same_and_see_variables_as_they_are() -> None:
    variables = {"scale": 2.0}
    loss = types.FunctionType(compile("def f(o, t): return o * scale", "<cell>", "exec").co_consts[0], variables)
    model = nn.Linear(1, 1)
    _, same = copied_here((model, loss), model)
    assert same is loss
    variables["scale"] = 5.0
    assert same(2.0, None) == 10.0


def test_there_functions_have_variables_of_their_own() -> None:
    variables = {"scale": 2.0}
    loss = types.FunctionType(compile("def f(o, t): return o * scale", "<cell>", "exec").co_consts[0], variables)
    made = copied(loss)
    variables["scale"] = 5.0
    assert made(2.0, None) == 4.0


def test_objects_left_out_are_replaced_by_others() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    made = freeze({"model": model, "scale": 2}, [model]).thaw([other])
    assert made["model"] is other
    assert freeze({"model": model}, [model]).nbytes == 0


# --- classes derived from those of tensors


class Scaled(nn.Parameter):
    pass


class Slotted(nn.Parameter):
    __slots__ = ("rate",)


class Marked(Tensor):
    pass


class Strict(Tensor):
    """One whose operations all go through its class."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


DERIVED: dict[str, Callable[[], Any]] = {
    "parameter": lambda: Scaled(torch.zeros(2)),
    "parameter with slots": lambda: Slotted(torch.zeros(2)),
    "tensor": lambda: torch.zeros(2).as_subclass(Marked),
    "parameter of a tensor's class": lambda: nn.Parameter(torch.zeros(2).as_subclass(Marked)),
    "tensor that takes no operation": lambda: torch.zeros(2).as_subclass(Strict),
}


@both_ways
@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_class_is_kept_with_its_attributes(name: str, copy: Callable[[Any], Any]) -> None:
    model: Any = nn.Module()
    model.w = DERIVED[name]()
    with torch._C.DisableTorchFunctionSubclass():
        model.w.rate = 3
        made = copy(model)
        assert (type(made.w), made.w.rate, made.w.requires_grad) == (type(model.w), 3, model.w.requires_grad)
        assert isinstance(made.w, nn.Parameter) == isinstance(model.w, nn.Parameter)


@pytest.mark.parametrize("kind", [Scaled, Slotted])
def test_so_are_the_hooks_of_such_parameters(kind: Any) -> None:
    parameter = kind(torch.zeros(2))
    parameter.register_hook(lambda grad: grad * 10)
    made = copied(parameter)
    (made * 1).sum().backward()
    assert made.grad.tolist() == [10, 10]


@pytest.mark.parametrize("kind", [Scaled, Marked])
def test_views_of_them_stay_in_one_memory(kind: Any) -> None:
    whole = torch.zeros(4).as_subclass(kind)
    one, part = copied((whole, whole.detach()[1:3]))
    assert is_tied(one, part)


class Choosing(Tensor):
    """One that says itself how it travels."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.ones, (3,)


def test_a_class_that_says_how_it_travels_travels_so() -> None:
    assert copied(torch.zeros(2).as_subclass(Choosing)).tolist() == [1, 1, 1]


# --- arrays


def a_view(make: Callable[[Any], Any]) -> Callable[[], tuple[Tensor, Any]]:
    def pair() -> tuple[Tensor, Any]:
        parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        return parameter, make(parameter.detach().numpy())

    return pair


def a_tensor(make: Callable[[Any], Any]) -> Callable[[], tuple[Tensor, Any]]:
    def pair() -> tuple[Tensor, Any]:
        array = np.arange(6.0)
        return torch.from_numpy(array), make(array)

    return pair


def the_beginning() -> tuple[Tensor, Any]:
    array = np.arange(6.0)
    return torch.from_numpy(array[:2]), array


PAIRS: dict[str, Callable[[], tuple[Tensor, Any]]] = {
    "parameter": a_view(lambda array: array),
    "row of a parameter": a_view(lambda array: array[1]),
    "parameter turned round": a_view(lambda array: array[::-1, ::2]),
    "parameter transposed": a_view(lambda array: array.T),
    "parameter, not to be written": a_view(lambda array: np.broadcast_to(array, (4, 2, 3))),
    "bytes of a parameter": a_view(lambda array: array.view(np.uint32)),
    "array": a_tensor(lambda array: array),
    "part of an array": a_tensor(lambda array: array[2:4]),
    "tensor of the beginning": the_beginning,
}


@pytest.mark.parametrize("turned", [False, True], ids=["tensor first", "array first"])
@pytest.mark.parametrize("name", PAIRS)
def test_an_array_stays_in_the_memory_of_its_tensor(name: str, turned: bool) -> None:
    tensor, array = PAIRS[name]()
    frozen = freeze((array, tensor) if turned else (tensor, array))
    for again in range(2):  # a copy of a copy is as tied
        one, other = frozen.thaw()
        made, of_copy = (other, one) if turned else (one, other)
        assert (of_copy.dtype, of_copy.flags.writeable) == (array.dtype, array.flags.writeable), again
        assert np.array_equal(of_copy, array)
        assert torch.equal(made, tensor)
        frozen = freeze((one, other))
    assert frozen.ties
    with torch.no_grad():
        made.fill_(-1.0)
    assert not np.isin(of_copy[:1], array[:1]).any()
    assert (tensor >= 0).all()


def test_arrays_alone_are_no_ties_of_parameters() -> None:
    whole = np.arange(6.0)
    frozen = freeze((nn.Linear(2, 2), whole, whole[2:4]))
    _, array, part = frozen.thaw()
    array[:] = 7
    assert part.tolist() == [7, 7]
    assert not frozen.ties


ARRAYS: dict[str, Any] = {
    "objects": np.array([{"a": 1}, None]),
    "words": np.array(["a", "bcd"]),
    "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "fields": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "empty": np.zeros((0, 3)),
    "one number": np.array(2.5),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "other byte order": np.arange(3, dtype=">i4"),
    "of bytes": np.frombuffer(b"abcd", dtype=np.uint8),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_kind_are_equal(name: str) -> None:
    made = copied(ARRAYS[name])
    assert (type(made), made.dtype, made.shape) == (np.ndarray, ARRAYS[name].dtype, ARRAYS[name].shape)
    assert np.array_equal(made, ARRAYS[name])


def test_memory_in_common_that_no_copy_can_keep_is_refused() -> None:
    array = np.arange(6.0)
    with pytest.raises(ModelError, match=r"shapes \(6,\) and \(2,\), share memory in a way that no copy can keep"):
        freeze((array, torch.from_numpy(array[2:4])))
    apart = freeze((array[:2], torch.from_numpy(array[2:4]))).thaw()
    assert [values.tolist() for values in apart] == [[0, 1], [2, 3]]


# --- handles of hooks


class Once(nn.Module):
    """A hook that takes itself off."""

    def __init__(self, register: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

        def once(given: Any) -> Any:
            self.handle.remove()
            grad = given if given is not self.weight else given.grad
            grad.mul_(10)

        self.handle = getattr(self.weight, register)(once)

    def gradients(self, hooks: ParameterHooks | None) -> list[Any]:
        found = []
        for _ in range(3):
            self.weight.grad = None
            (self.weight * 1).sum().backward()
            if hooks is not None:
                hooks.call()
            found.append(self.weight.grad.tolist()[0])  # type: ignore[attr-defined]
        return found


@both_ways
@pytest.mark.parametrize("taken_off", [False, True], ids=["on", "taken off"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_handle_takes_its_hook_off_the_copy(register: str, taken_off: bool, copy: Callable[[Any], Any]) -> None:
    model = Once(register)
    made = copy(model)
    assert made.gradients(ParameterHooks([made.weight]) if taken_off else None) == [10, 1, 1]
    assert model.gradients(None) == [10, 1, 1]


def test_a_later_hook_does_not_take_the_place_of_one_that_came_along(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda grad: grad * 10)
    frozen = freeze(parameter)
    monkeypatch.setattr("torch.utils.hooks.RemovableHandle.next_id", min(parameter._backward_hooks))  # type: ignore[type-var,arg-type]
    made = frozen.thaw()
    made.register_hook(lambda grad: grad * 2)
    (made * 1).sum().backward()
    assert made.grad.tolist() == [20, 20]


# --- wrappers of functions


class Remembering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift(1)

    @functools.cached_property
    def scale(self) -> float:
        return 3.0

    @functools.lru_cache(maxsize=7)  # noqa: B019
    def shift(self, by: int) -> int:
        return by + 1


def remembering() -> Any:
    class Local(Remembering):
        @functools.cached_property
        def scale(self) -> float:
            "Doubled."
            return 6.0

        @functools.lru_cache(maxsize=7)  # noqa: B019
        def shift(self, by: int) -> int:
            return by + 2

    return Local()


@both_ways
@pytest.mark.parametrize(("make", "expected"), [(Remembering, 5.0), (remembering, 9.0)])
def test_caches_of_a_class_travel(make: Any, expected: float, copy: Callable[[Any], Any]) -> None:
    model = make()
    model(torch.ones(1))
    made = copy(model)
    assert made(torch.ones(1)).tolist() == [expected]
    assert type(made).shift.cache_parameters() == {"maxsize": 7, "typed": False}


def test_a_cached_function_travels_by_value_and_empty() -> None:
    @functools.lru_cache(maxsize=9)
    def power(of: int) -> int:
        "Of two."
        return 2 * power(of - 1) if of else 1

    assert power(5) == 32
    made = copied(power)
    assert made.cache_info().currsize == 0
    assert (made(5), made.__name__, made.__doc__, made.cache_info().currsize) == (32, "power", "Of two.", 6)


@pytest.mark.parametrize("name", ["script", "trace", "loss"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_torch_compiled_is_refused_by_its_name(name: str) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    loss: Any = nn.MSELoss()
    if name == "loss":
        loss = torch.jit.script(nn.functional.mse_loss)
    else:
        model = nn.Sequential(torch.jit.script(model) if name == "script" else torch.jit.trace(model, torch.ones(1, 2)))
    with pytest.raises(ModelError, match="mse_loss was compiled" if name == "loss" else "Sequential was compiled") as e:
        frozen_parts(Parts(model, loss, partial(optim.SGD, lr=0.1)))
    assert "Remedy: train the module or the function that it was made of" in str(e.value)


# --- limits


def test_what_is_larger_than_allowed_is_refused() -> None:
    with pytest.raises(TooLarge):
        freeze(torch.zeros(1000), most=3999)
    with pytest.raises(TooLarge):
        freeze("x" * 5000, most=4000)


def test_a_limit_leaves_alone_what_is_within() -> None:
    tensor = torch.ones(1000)
    assert torch.equal(freeze(tensor, most=4000).thaw(), tensor)


# --- at rest


def test_a_copy_at_rest_is_as_it_was_whatever_becomes_of_the_original() -> None:
    model = filled(nn.Linear(2, 2))
    expected = model.weight.detach().clone()
    frozen = freeze(model).at_rest()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(frozen.thaw().weight, expected)


def test_it_rests_once() -> None:
    frozen = freeze(nn.Linear(2, 2)).at_rest()
    assert frozen.at_rest() is frozen


def test_whoever_writes_to_a_copy_changes_no_other() -> None:
    frozen = freeze(filled(nn.Linear(2, 2))).at_rest()
    one = frozen.thaw()
    with torch.no_grad():
        one.weight.zero_()
    assert torch.equal(frozen.thaw().weight, numbers(2, 2, seed=0))


def test_a_pickled_one_is_given_memory_again() -> None:
    frozen = freeze(filled(nn.Linear(2, 2))).at_rest()
    assert frozen.memory is not None
    sent = pickle.loads(pickle.dumps(frozen))
    assert sent.memory is None
    assert torch.equal(sent.within(frozen.memory.array()).thaw().weight, numbers(2, 2, seed=0))


@linux
def test_others_of_the_machine_reach_its_memory_by_a_key() -> None:
    frozen = freeze(filled(nn.Linear(2, 2))).at_rest()
    assert frozen.memory is not None
    assert frozen.memory.key is not None
    again = pickle.loads(pickle.dumps(frozen)).within(frozen.memory.key)
    assert torch.equal(again.thaw().weight, numbers(2, 2, seed=0))


@linux
def test_memory_goes_with_the_last_that_holds_it() -> None:
    frozen = freeze(nn.Linear(2, 2)).at_rest()
    assert frozen.memory is not None
    key = frozen.memory.key
    assert key is not None
    sent: Frozen = pickle.loads(pickle.dumps(frozen))
    del frozen
    gc.collect()
    with pytest.raises(CannotShare):
        sent.within(key).thaw()


def test_one_without_tensors_rests_too() -> None:
    assert freeze({"a": 1}).at_rest().thaw() == {"a": 1}


def test_one_is_made_of_plain_values() -> None:
    frozen = freeze((numbers(3), numbers(5, seed=1)))
    assert frozen.memory is not None
    again = Frozen.of_parts(frozen.code, [list(part) for part in frozen.parts]).within(frozen.memory.array())
    assert torch.equal(again.thaw()[1], numbers(5, seed=1))


# --- what cannot travel


def an_open_file() -> Any:
    return Path(os.devnull).open("w")  # one that is only read travels as what is in it


def with_attribute(value: Any) -> Parts:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].kept = value
    return Parts(model, nn.MSELoss(), partial(optim.SGD, lr=0.1))


UNABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "lock": (threading.Lock, "lock"),
    "lock in a list": (lambda: [{"a": threading.Lock()}], "list"),
    "file": (an_open_file, "TextIOWrapper"),
    "generator": (lambda: (n for n in range(3)), "generator"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_an_attribute_that_cannot_travel_is_named(name: str) -> None:
    make, kind = UNABLE[name]
    value = make()
    with contextlib.closing(value) if isinstance(value, io.IOBase) else contextlib.nullcontext():
        parts = with_attribute(value)
        with pytest.raises(ModelError, match=f"attribute 1.kept, a {kind}"):
            frozen_parts(parts)


def test_so_is_a_loss_or_an_optimizer_that_cannot() -> None:
    lock = threading.Lock()
    model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="The loss cannot be pickled"):
        frozen_parts(Parts(model, lambda o, t: (lock, o), partial(optim.SGD, lr=0.1)))
    with pytest.raises(ModelError, match="The optimizer cannot be pickled"):
        frozen_parts(Parts(model, nn.MSELoss(), lambda given: (lock, given)))  # type: ignore[arg-type,return-value]


# --- another process

ELSEWHERE = """
import pickle, sys
answers = {}
for name, (frozen, array) in pickle.load(sys.stdin.buffer).items():
    value, question = frozen.within(array).thaw()
    answers[name] = question(value)
sys.stdout.buffer.write(pickle.dumps(answers))
"""

BESIDE = """
import torch
class Doubling(torch.nn.Module):
    def forward(self, x):
        return factor() * x
def factor():
    return {factor}
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """A module beside a script: it was edited and loaded again, and edited once more since."""
    folder = tmp_path_factory.mktemp("beside")
    file = folder / "module_beside_a_script.py"
    sys.path.insert(0, str(folder))
    file.write_text(BESIDE.format(factor=2))
    module = importlib.import_module(file.stem)
    file.write_text(BESIDE.format(factor="3.0"))
    module = importlib.reload(module)
    file.write_text(BESIDE.format(factor="55.0"))
    yield module
    sys.path.remove(str(folder))
    del sys.modules[file.stem]


def local_model() -> Any:
    bias = 4.0

    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + bias

    return Local()


def hooked() -> Any:
    model = filled(nn.Linear(2, 1, bias=False))
    model.weight.register_hook(lambda grad: grad * 10)
    return model


def tied_there(model: Any) -> bool:
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    return bool((model[1].weight == 7.0).all())


def gradient_there(model: Any) -> list[Any]:
    model(torch.ones(1, 2)).sum().backward()
    return model.weight.grad.tolist()  # type: ignore[no-any-return]


def of_ones(model: Any) -> list[Any]:
    return model(torch.ones(1, 3)).tolist()  # type: ignore[no-any-return]


#: A value, what is asked of it in the other process, and the answer.
ASKED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "local class": (local_model, of_ones, [[5.0] * 3]),
    "tied": (two_in_one, tied_there, True),
    "hooks": (hooked, gradient_there, [[10.0, 10.0]]),
    "weight norm": (lambda: filled(weight_norm()), of_ones, of_ones(filled(weight_norm()))),
    "lazy": (lambda: nn.LazyLinear(2), lambda model: model(torch.ones(1, 3)).shape[1], 2),
    "lambda": (lambda: lambda x: x + 1, lambda function: function(2), 3),
    "strides": (STRIDES["channels last"], lambda tensor: tensor.stride(), STRIDES["channels last"]().stride()),
    "modes": (lambda: nn.Linear(1, 1).eval(), lambda model: model.training, False),
}


@pytest.fixture(scope="module")
def answers(beside: types.ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that knows nothing of this one answers, all in one go."""
    asked = {name: (make(), question) for name, (make, question, _) in ASKED.items()}
    asked["reloaded"] = beside.Doubling(), of_ones
    frozen = {name: freeze(pair) for name, pair in asked.items()}
    sent = {name: (one, one.memory.array()) for name, one in frozen.items() if one.memory is not None}
    environment = os.environ | {"PYTHONPATH": str(Path(parakit.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=pickle.dumps(sent), capture_output=True, timeout=60, check=False,
        cwd=tmp_path_factory.mktemp("elsewhere"), env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = pickle.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ASKED)
def test_another_process_has_the_same(name: str, answers: dict[str, Any]) -> None:
    assert answers[name] == ASKED[name][2]


def test_another_process_runs_what_was_loaded_here_last(answers: dict[str, Any]) -> None:
    assert answers["reloaded"] == [[3.0] * 3]


# --- which code is the user's own


def test_code_beside_a_script_goes_by_value(beside: types.ModuleType) -> None:
    code = dumps(beside.factor)
    assert is_own_code(beside.factor)
    kept = sys.modules.pop(beside.__name__)
    try:
        assert pickle.loads(code)() == 3.0
    finally:
        sys.modules[beside.__name__] = kept


@pytest.mark.parametrize("file", [torch.__file__, os.__file__, parakit.__file__, pickle.__file__, "<stdin>", ""])
def test_installed_files_and_no_files_are_not_the_users_own(file: str) -> None:
    assert not is_local(file)


def test_installed_code_is_not_the_users_own() -> None:
    installed: list[Any] = [nn.Linear, nn.Linear.forward, Parts, partial]
    assert not any(map(is_own_code, installed))


def test_what_is_registered_by_value_is_so_for_a_moment(beside: types.ModuleType) -> None:
    def registered() -> set[str]:
        return set(cloudpickle.list_registry_pickle_by_value())

    before = registered()
    with by_value():
        assert beside.__name__ in registered()
    assert registered() == before


class Leaving:
    """What adds a module when it is collected."""

    def __init__(self) -> None:
        self.circle = self

    def __del__(self) -> None:
        sys.modules[f"late_{len(sys.modules)}"] = types.ModuleType("late")


def test_modules_may_come_while_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what else this process holds need not be looked at fifty times
    try:
        for attempt in range(50):
            gc.collect()
            Leaving()
            gc.set_threshold(100 + attempt, 10, 10)
            local_modules()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
        gc.collect()


def test_also_when_pickling_fails(beside: types.ModuleType) -> None:
    before = set(cloudpickle.list_registry_pickle_by_value())
    with pytest.raises(TypeError):
        freeze(threading.Lock())
    assert set(cloudpickle.list_registry_pickle_by_value()) == before


def test_what_a_user_registered_stays_registered(beside: types.ModuleType) -> None:
    cloudpickle.register_pickle_by_value(beside)
    try:
        freeze(beside.factor)
        assert beside.__name__ in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(beside)


# --- classes with slots


class WithSlots:
    __slots__ = ("calls", "name")

    def __init__(self) -> None:
        self.calls, self.name = 3, "a"


class WithMoreSlots(WithSlots):
    __slots__ = "more"

    def __init__(self) -> None:
        super().__init__()
        self.more = [1]


@pytest.mark.parametrize("kind", [WithSlots, WithMoreSlots])
def test_a_class_with_slots_has_them_in_another_process(kind: type, tmp_path: Path) -> None:
    frozen = freeze(kind())
    place = tmp_path / "frozen"
    place.write_bytes(pickle.dumps((frozen.code, frozen.parts, frozen.memory.array().tobytes())))  # type: ignore[union-attr]
    script = (
        "import pickle, sys, numpy as np; from parakit.serialization import Frozen\n"
        f"code, parts, data = pickle.loads(open({str(place)!r}, 'rb').read())\n"
        "thing = Frozen.of_parts(code, parts).within(np.frombuffer(data, np.uint8)).thaw()\n"
        "print(hasattr(thing, '__dict__'), thing.calls, getattr(thing, 'more', None))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split(None, 2)[:2] == ["False", "3"], done.stderr


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda o, t: o.sum()], ids=["torch's", "a function"])
def test_a_plain_model_has_no_ties(loss: Any) -> None:
    # Else workers would not divide the update among them.
    parts = Parts(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), loss, lambda p: optim.SGD(p, lr=0.1), None, None)
    assert not frozen_parts(parts).ties
