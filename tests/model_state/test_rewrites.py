"""Rewrites: what forward writes into parameters reaches all workers; and hooks see the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parakit.errors import ModelError
from parakit.model_state.hooks import ParameterHooks
from parakit.model_state.rewrites import Rewrites


class Fellow:
    """A worker among others, of whom it is known what they will add."""

    def __init__(self, size: int, *others: Tensor) -> None:
        self.rank, self.size = 0, size
        self._others = others

    def sum(self, values: Tensor) -> None:
        for other in self._others:
            values += other


def zeroed(dtype: torch.dtype = torch.float32) -> Any:
    layer = nn.Linear(2, 3, bias=False, dtype=dtype)
    nn.init.zeros_(layer.weight)
    return layer


def write(model: Any, row: int, value: float) -> None:
    with torch.no_grad():
        model.weight[row] = value


def change_of(*rows: tuple[int, float]) -> Tensor:
    """What a worker adds that has written to some rows: its changes, and where there are any."""
    change = torch.zeros(3, 2, dtype=torch.float64)
    for row, value in rows:
        change[row] = value
    return torch.stack([change, (change != 0).double()])


def settled(model: Any, size: int, others: Sequence[Tensor], *written: tuple[int, float]) -> None:
    rewrites = Rewrites(model, ["weight"])
    rewrites.begin()
    for row, value in written:
        write(model, row, value)
    rewrites.settle(Fellow(size, *others))


# --- what several wrote


def test_what_one_worker_wrote_is_there_for_all() -> None:
    model = zeroed()
    settled(model, 2, [change_of((2, 5.0))])
    assert model.weight.tolist() == [[0, 0], [0, 0], [5, 5]]


def test_what_different_workers_wrote_to_different_places_comes_together() -> None:
    model = zeroed()
    settled(model, 3, [change_of((1, 4.0)), change_of((2, 5.0))], (0, 3.0))
    assert model.weight.tolist() == [[3, 3], [4, 4], [5, 5]]


def test_what_all_wrote_alike_is_not_added_up() -> None:
    model = zeroed()
    settled(model, 3, [change_of((1, 4.0)), change_of((1, 4.0))], (1, 4.0))
    assert model.weight.tolist() == [[0, 0], [4, 4], [0, 0]]


def test_rounding_apart_is_alike() -> None:
    model = zeroed()
    settled(model, 2, [change_of((1, 1.0 + 1e-7))], (1, 1.0))
    assert model.weight[1].tolist() == pytest.approx([1, 1], rel=1e-6)


def test_different_values_in_one_place_are_refused() -> None:
    with pytest.raises(ModelError, match="parameter weight by the rows it sees, and workers have come to different"):
        settled(zeroed(), 2, [change_of((1, 4.5))], (1, 4.0))


def test_a_worker_alone_keeps_what_it_wrote() -> None:
    model = zeroed()
    settled(model, 1, [], (1, 4.0))
    assert model.weight.tolist() == [[0, 0], [4, 4], [0, 0]]


def test_parameters_that_nobody_is_known_to_write_to_are_not_exchanged() -> None:
    model = zeroed()
    rewrites = Rewrites(model, [])
    rewrites.begin()
    rewrites.settle(Fellow(2, change_of((2, 5.0))))
    assert model.weight.abs().sum() == 0


def test_an_embedding_of_a_largest_norm_is_cut_down_alike() -> None:
    model = nn.Embedding(3, 2, max_norm=1.0, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(3.0)
    expected = model.weight.detach().clone()
    expected[:2] = 0.5**0.5
    rewrites = Rewrites(model, ["weight"])
    rewrites.begin()
    model(torch.tensor([0]))
    rewrites.settle(Fellow(2, change_of((1, 0.5**0.5 - 3.0))))
    assert torch.allclose(model.weight, expected, atol=1e-6)


# --- what nobody knew of


def test_a_change_that_nobody_knew_of_is_refused() -> None:
    model = zeroed()
    rewrites = Rewrites(model, [])
    rewrites.begin(look=True)
    write(model, 0, 1.0)
    with pytest.raises(ModelError, match="forward has changed parameter weight, and did not when the model was tried"):
        rewrites.check()


def test_a_change_of_another_memory_too() -> None:
    model = zeroed()
    rewrites = Rewrites(model, [])
    rewrites.begin(look=True)
    model.weight.data = model.weight.data.clone()
    with pytest.raises(ModelError, match="forward has changed parameter weight"):
        rewrites.check()


def test_what_is_known_may_change() -> None:
    model = zeroed()
    rewrites = Rewrites(model, ["weight"])
    rewrites.begin(look=True)
    write(model, 0, 1.0)
    rewrites.check()


def test_nothing_is_refused_while_nobody_looks() -> None:
    model = zeroed()
    rewrites = Rewrites(model, [])
    rewrites.begin(look=False)
    write(model, 0, 1.0)
    rewrites.check()


def test_one_look_is_good_for_one_check() -> None:
    model = zeroed()
    rewrites = Rewrites(model, [])
    rewrites.begin(look=True)
    rewrites.check()
    write(model, 0, 1.0)  # by the optimizer
    rewrites.check()


# --- hooks on parameters


def taken(model: nn.Module) -> ParameterHooks:
    return ParameterHooks(list(model.parameters()))


def with_gradient(parameter: Tensor, *values: float) -> None:
    parameter.grad = torch.tensor(values).view(parameter.shape)


def test_hooks_are_taken_off_and_called_when_asked() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.register_hook(lambda grad: grad * 10)
    hooks = ParameterHooks([parameter])
    (parameter * torch.tensor([1.0, 2.0])).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [1, 2]
    hooks.call()
    assert parameter.grad.tolist() == [10, 20]


def test_they_are_called_in_the_order_in_which_they_were_registered() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.register_hook(lambda grad: grad + 1)
    parameter.register_hook(lambda grad: grad * 10)
    hooks = ParameterHooks([parameter])
    with_gradient(parameter, 2.0)
    hooks.call()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [30]


def test_those_for_afterwards_see_what_the_first_ones_made() -> None:
    parameter, seen = nn.Parameter(torch.zeros(1)), []

    def look(there: Tensor) -> None:
        assert there.grad is not None
        seen.append(there.grad.item())

    parameter.register_post_accumulate_grad_hook(look)
    parameter.register_hook(lambda grad: grad * 10)
    hooks = ParameterHooks([parameter])
    with_gradient(parameter, 2.0)
    hooks.call()
    assert seen == [20.0]


def test_a_hook_that_returns_nothing_leaves_the_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.register_hook(lambda grad: None)
    hooks = ParameterHooks([parameter])
    with_gradient(parameter, 2.0)
    before = parameter.grad
    hooks.call()
    assert parameter.grad is before


def test_parameters_without_a_gradient_are_left_out() -> None:
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 10)
    hooks = taken(model)
    with_gradient(model.weight, 2.0)
    hooks.call()
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 20
    assert model.bias.grad is None


def test_hooks_of_one_parameter_can_be_called_alone() -> None:
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad * 10)
    hooks = taken(model)
    with_gradient(model.weight, 2.0)
    with_gradient(model.bias, 3.0)
    hooks.call(model.bias)
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    assert (model.weight.grad.item(), model.bias.grad.item()) == (2.0, 30.0)


@pytest.mark.parametrize(
    "change",
    [lambda grad: grad.contiguous() * 1, lambda grad: grad.double(), lambda grad: grad.flip(0)],
    ids=["rows", "doubles", "flipped"],
)
def test_a_new_gradient_is_laid_out_as_its_parameter(change: Callable[[Tensor], Tensor]) -> None:
    parameter = nn.Parameter(torch.zeros(3, 2).t())
    parameter.register_hook(change)
    hooks = ParameterHooks([parameter])
    grad = torch.arange(6.0).view(3, 2).t()
    parameter.grad = grad
    hooks.call()
    assert parameter.grad.stride() == parameter.stride()
    assert parameter.grad.dtype == parameter.dtype
    assert torch.equal(parameter.grad, change(grad).float())


def test_models_without_hooks_have_none() -> None:
    model = nn.Linear(1, 1)
    assert not taken(model)
    model.weight.register_hook(print)
    hooks = taken(model)
    assert hooks
    assert hooks.functions == [print]
    assert not taken(model)


def test_all_hooks_are_told() -> None:
    model = nn.Linear(1, 1)
    model.weight.register_post_accumulate_grad_hook(print)
    model.weight.register_hook(repr)
    model.bias.register_hook(len)
    assert taken(model).functions == [repr, print, len]
