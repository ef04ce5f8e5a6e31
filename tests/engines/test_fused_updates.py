"""Layouts in memory, seen as vectors and back; and fused updates, which are taken only where they do the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from parakit.engines.fused_updates import prefer_fused, shown_equal
from parakit.tensor_layout import in_order_of, is_dense, shaped_like


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


DENSE: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: numbers(6),
    "rows": lambda: numbers(3, 4),
    "transposed": lambda: numbers(4, 3).t(),
    "channels last": lambda: numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last, three": lambda: numbers(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "permuted": lambda: numbers(4, 2, 3).permute(1, 2, 0),
    "from the middle": lambda: numbers(20)[4:16].view(3, 4),
    "transposed, from the middle": lambda: numbers(20)[4:16].view(3, 4).t(),
    "one column": lambda: numbers(4, 1),
    "one number": lambda: numbers(),
    "nothing": lambda: numbers(0, 3),
    "length one, any stride": lambda: torch.empty_strided((1, 3), (77, 1), dtype=torch.float64).copy_(numbers(1, 3)),
}
GAPPED: dict[str, Callable[[], Tensor]] = {
    "every second": lambda: numbers(8)[::2],
    "a column": lambda: numbers(4, 3)[:, :2],
    "expanded": lambda: numbers(3, 1).expand(3, 4),
    "diagonal": lambda: numbers(4, 4).diagonal(),
    "overlapping": lambda: numbers(6).unfold(0, 3, 1),
}


# --- layouts


@pytest.mark.parametrize("name", DENSE)
def test_a_tensor_without_gaps_is_dense(name: str) -> None:
    assert is_dense(DENSE[name]())


@pytest.mark.parametrize("name", GAPPED)
def test_one_with_gaps_or_overlaps_is_not(name: str) -> None:
    assert not is_dense(GAPPED[name]())


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_any_order_of_dimensions_is_dense(order: tuple[int, ...]) -> None:
    assert is_dense(numbers(2, 3, 4).permute(order))


@pytest.mark.parametrize("name", DENSE)
def test_a_vector_in_the_order_of_a_tensor_is_a_view_of_it(name: str) -> None:
    tensor = DENSE[name]()
    flat = in_order_of(tensor, tensor)
    assert flat.shape == (tensor.numel(),)
    flat += 1
    assert torch.equal(tensor, DENSE[name]() + 1)


@pytest.mark.parametrize("name", [*DENSE, *GAPPED])
def test_there_and_back_it_is_the_same(name: str) -> None:
    tensor = (DENSE | GAPPED)[name]()
    flat = in_order_of(tensor, tensor).clone()
    assert torch.equal(shaped_like(flat, tensor), tensor)


@pytest.mark.parametrize("name", [name for name in DENSE if "any stride" not in name])
def test_a_vector_gets_the_strides_of_a_dense_tensor(name: str) -> None:
    tensor = DENSE[name]()
    flat = torch.zeros(tensor.numel(), dtype=torch.float64)
    shaped = shaped_like(flat, tensor)
    assert shaped.stride() == tensor.stride()
    shaped.copy_(tensor)
    assert torch.equal(flat, in_order_of(tensor, tensor))


@pytest.mark.parametrize("name", GAPPED)
def test_for_one_with_gaps_a_vector_is_seen_row_by_row(name: str) -> None:
    tensor = GAPPED[name]()
    assert shaped_like(torch.zeros(tensor.numel()), tensor).is_contiguous()


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("other", ["rows", "its own"])
def test_another_tensor_goes_by_the_order_of_the_first(name: str, other: str) -> None:
    like = DENSE[name]()
    tensor = like.contiguous() if other == "rows" else like
    assert torch.equal(in_order_of(tensor, like), in_order_of(like, like))


def test_a_piece_of_a_vector_can_be_shaped_where_it_lies() -> None:
    like, whole = numbers(4, 3).t(), torch.zeros(30, dtype=torch.float64)
    shaped_like(whole[10:22], like).copy_(like)
    assert torch.equal(whole[10:22], in_order_of(like, like))
    assert float(whole[:10].abs().sum() + whole[22:].abs().sum()) == 0


# --- fused updates

Make = Callable[[list[nn.Parameter]], optim.Optimizer]

FUSED: dict[str, Make] = {
    "Adam": partial(optim.Adam, lr=0.1),
    "Adam, the largest kept": partial(optim.Adam, lr=0.1, amsgrad=True),
    "Adam, decaying": partial(optim.Adam, lr=0.1, weight_decay=0.1),
    "Adam, upwards": partial(optim.Adam, lr=0.1, maximize=True),
    "AdamW": partial(optim.AdamW, lr=0.1, betas=(0.8, 0.99)),
    "Adagrad": partial(optim.Adagrad, lr=0.1, lr_decay=0.1),
    "SGD": partial(optim.SGD, lr=0.1, weight_decay=0.1),
}
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    name: DENSE[name] for name in ("vector", "rows", "transposed", "channels last", "permuted", "one number")
}


def stepped(make: Make, start: Tensor, *, fused: bool, steps: int = 4) -> Tensor:
    """A parameter after some steps, with or without a fused update where that is taken."""
    parameter = nn.Parameter(start.clone())  # which keeps the layout
    optimizer = make([parameter])
    for step in range(steps):
        parameter.grad = torch.empty_like(parameter).copy_(numbers(*start.shape, seed=step + 1))
        if fused:
            prefer_fused(optimizer)
        optimizer.step()
    assert not fused or optimizer.param_groups[0]["fused"] is True
    return parameter.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_a_fused_update_is_taken_it_does_the_same(dtype: torch.dtype, name: str, layout: str) -> None:
    start = LAYOUTS[layout]().to(dtype)
    plain, fused = (stepped(FUSED[name], start, fused=chosen) for chosen in (False, True))
    assert torch.allclose(fused, plain, rtol=0, atol=16 * torch.finfo(dtype).eps * float(plain.abs().max().clamp(1)))


def taken(optimizer: optim.Optimizer) -> list[Any]:
    prefer_fused(optimizer)
    return [group.get("fused") for group in optimizer.param_groups]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_in_half_precision_none_is_taken(name: str, dtype: torch.dtype) -> None:
    assert taken(FUSED[name]([nn.Parameter(numbers(3, dtype=dtype))])) == [None]


@pytest.mark.parametrize("gapped", [name for name in GAPPED if name not in ("expanded", "overlapping")])
@pytest.mark.parametrize("name", FUSED)
def test_for_parameters_with_gaps_none_is_taken(name: str, gapped: str) -> None:
    assert taken(FUSED[name]([nn.Parameter(GAPPED[gapped]())])) == [None]


def test_one_parameter_that_does_not_allow_it_is_enough() -> None:
    given = [nn.Parameter(numbers(3)), nn.Parameter(numbers(8)[::2])]
    assert taken(optim.Adam(given)) == [None]


def test_unless_it_is_not_trained() -> None:
    given = [nn.Parameter(numbers(3)), nn.Parameter(numbers(8)[::2], requires_grad=False)]
    assert taken(optim.Adam(given)) == [True]


def test_groups_are_looked_at_one_by_one() -> None:
    groups = [{"params": [nn.Parameter(numbers(3))]}, {"params": [nn.Parameter(numbers(3, dtype=torch.bfloat16))]}]
    assert taken(optim.Adam(groups)) == [True, None]


CHOSEN: dict[str, dict[str, Any]] = {
    "not fused": {"fused": False},
    "for each": {"foreach": True},
    "not for each": {"foreach": False},
    "differentiable": {"differentiable": True},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_users_choice_stays(name: str) -> None:
    optimizer = optim.Adam([nn.Parameter(numbers(3))], **CHOSEN[name])
    before = optimizer.param_groups[0]["fused"]
    assert taken(optimizer) == [before]


def test_a_state_that_lies_otherwise_than_its_parameter_takes_none() -> None:
    parameter = nn.Parameter(numbers(4, 3).t())
    optimizer = optim.Adam([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg"] = state["exp_avg"].contiguous()  # as loaded from elsewhere
    assert taken(optimizer) == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.Adagrad, optim.SGD])
@pytest.mark.parametrize("order", [(), (0,), (0, 1), (1, 0), (0, 2, 3, 1), (2, 0, 1)], ids=str)
def test_torchs_fused_updates_are_shown_equal(kind: Any, dtype: torch.dtype, order: tuple[int, ...]) -> None:
    assert shown_equal(kind, dtype, order, ())


class Wrong(optim.SGD):
    """One whose fused update goes the other way."""

    def step(self, *_: Any) -> Any:
        for group in self.param_groups:
            sign = 1 if group["fused"] else -1
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=sign * group["lr"])


class Unable(optim.SGD):
    """One that has none."""

    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["fused"]:
            raise RuntimeError("no fused update here")
        return super().step(closure)


@pytest.mark.parametrize("kind", [Wrong, Unable])
def test_one_that_does_otherwise_is_not(kind: Any) -> None:
    assert not shown_equal(kind, torch.float64, (0,), ())


def test_neither_is_one_in_half_precision() -> None:
    assert not shown_equal(optim.Adam, torch.bfloat16, (0,), ())


def test_options_that_an_optimizer_does_not_know_are_left_out() -> None:
    assert shown_equal(optim.SGD, torch.float64, (0,), (("amsgrad", True), ("weight_decay", 0.1)))
