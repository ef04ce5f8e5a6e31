"""Structure: what a model consists of stays as it is; values may change, and nothing else, and it says what did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from parakit.errors import ModelError
from parakit.model_state.structure import Structure


def plain_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return plain_loss(output, target)


def made() -> Any:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    model.register_buffer("seen", torch.zeros(2))
    return model


def add_a_parameter(model: Any, loss: Any) -> None:
    model.late = nn.Parameter(torch.ones(1))


def take_a_parameter_away(model: Any, loss: Any) -> None:
    del model[1].bias


def rename_a_parameter(model: Any, loss: Any) -> None:
    model[1].other = model[1].weight
    del model[1].weight


def put_another_parameter(model: Any, loss: Any) -> None:
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


def share_a_parameter(model: Any, loss: Any) -> None:
    model[1].bias = model[2].bias


def share_memory(model: Any, loss: Any) -> None:
    model[2].bias.data = model[1].bias.data


def freeze_a_layer(model: Any, loss: Any) -> None:
    model[0].weight.requires_grad_(False)


def thaw_a_layer(model: Any, loss: Any) -> None:
    model[2].weight.requires_grad_(True)


def add_a_buffer(model: Any, loss: Any) -> None:
    model.register_buffer("late", torch.ones(1))


def add_a_buffer_to_the_loss(model: Any, loss: Any) -> None:
    loss.register_buffer("late", torch.ones(1))


def take_a_buffer_away(model: Any, loss: Any) -> None:
    del model.seen


def let_a_buffer_grow(model: Any, loss: Any) -> None:
    model.seen = torch.zeros(3)


def give_a_buffer_another_type(model: Any, loss: Any) -> None:
    model.seen = model.seen.double()


def let_a_buffer_of_the_loss_grow(model: Any, loss: Any) -> None:
    loss.scale = torch.ones(3)


REFUSED: dict[Callable[[Any, Any], None], str] = {
    add_a_parameter: "makes parameters: late",
    take_a_parameter_away: "takes parameters away: 1.bias",
    rename_a_parameter: "takes parameters away: 1.weight",
    put_another_parameter: "another parameter in the place of 1.weight",
    # named_parameters tells of a parameter in two places once
    share_a_parameter: "takes parameters away: 2.bias",
    share_memory: "puts parameter 2.bias into the memory of parameter 1.bias",
    freeze_a_layer: "requires_grad of parameter 0.weight to False",
    thaw_a_layer: "requires_grad of parameter 2.weight to True",
    add_a_buffer: "buffers that forward makes: late",
    add_a_buffer_to_the_loss: "buffers that forward makes: loss.late",
    take_a_buffer_away: "buffers that forward takes away: seen",
    let_a_buffer_grow: r"seen from float32 of shape \(2,\) to float32 of shape \(3,\)",
    give_a_buffer_another_type: "seen from float32 of .* to float64",
    let_a_buffer_of_the_loss_grow: r"loss.scale from float32 of shape \(2,\)",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_as_it_was_is_refused_by_name(change: Callable[[Any, Any], None]) -> None:
    model, loss = made(), Loss()
    structure = Structure(model, loss)
    structure.check()
    change(model, loss)
    with pytest.raises(ModelError, match=REFUSED[change]):
        structure.check()


@pytest.mark.parametrize("change", REFUSED)
def test_what_was_so_from_the_beginning_is_not(change: Callable[[Any, Any], None]) -> None:
    model, loss = made(), Loss()
    change(model, loss)
    Structure(model, loss).check()


def scale_weights(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def point_weights_elsewhere(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def put_a_buffer_of_its_form(model: Any) -> None:
    model.seen = torch.ones(2)


def change_a_buffer(model: Any) -> None:
    model.seen += 1


def set_a_mode(model: Any) -> None:
    model.eval()


def keep_a_tensor(model: Any) -> None:
    model.cache = torch.ones(7)


@pytest.mark.parametrize(
    "change",
    [scale_weights, point_weights_elsewhere, put_a_buffer_of_its_form, change_a_buffer, set_a_mode, keep_a_tensor],
)
def test_values_may_change(change: Callable[[Any], None]) -> None:
    model = made()
    structure = Structure(model, plain_loss)
    change(model)
    structure.check()


def test_a_parametrized_model_is_as_it_was_after_its_forward() -> None:
    model = parametrizations.spectral_norm(nn.Linear(2, 2))
    structure = Structure(model, plain_loss)
    model(torch.ones(1, 2))
    structure.check()


def test_flags_alone_can_be_checked() -> None:
    model = made()
    structure = Structure(model, plain_loss)
    add_a_parameter(model, None)
    structure.check_flags()
    freeze_a_layer(model, None)
    with pytest.raises(ModelError, match=r"requires_grad of parameter 0\.weight"):
        structure.check_flags()


def test_new_buffers_are_named() -> None:
    model = made()
    structure = Structure(model, plain_loss)
    assert structure.new_buffers == []
    add_a_buffer(model, None)
    assert structure.new_buffers == ["late"]


def test_many_names_are_told_in_short() -> None:
    model = made()
    structure = Structure(model, plain_loss)
    for number in range(8):
        model.register_parameter(f"late{number}", nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelError, match="late0, late1, late2, late3, late4, late5 and 2 more"):
        structure.check()


def test_parameters_without_elements_share_no_memory() -> None:
    model = nn.Module()
    model.one, model.two = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    Structure(model, plain_loss).check()
