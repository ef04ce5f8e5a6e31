"""What can be copied: a model that can be trained, and code that can travel; anything else is named and refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from parakit.engines.recipe import Parts
from parakit.errors import ModelError
from parakit.failures.source_lines import describe_error
from parakit.serialization import Frozen, freeze
from parakit.validation import brief

__all__ = ["check_model", "frozen_parts", "is_lazy"]


def frozen_parts(parts: Parts) -> Frozen:
    """A copy of parts that are to travel, at rest.

    Raises
    ------
    ModelError
        If one of them cannot be copied; it names what.
    """
    model = parts.model
    try:
        return freeze(parts, own=[*model.modules(), *model.parameters(), *model.buffers()]).at_rest()
    except ModelError:
        raise
    except Exception as error:
        what, culprit = _culprit(parts) or ("model, the loss or the optimizer", "")
        raise ModelError(
            f"The {what} cannot be pickled, so it cannot travel to the workers: {culprit}{describe_error(error)}",
            cause="it holds something that lives in this process only, such as a lock, a file or a generator",
            remedy="create such things in forward, or leave them out in __getstate__"
            if what == "model"
            else f"create such things inside the {what}, where they are used",
        ) from error


def _culprit(parts: Parts) -> tuple[str, str] | None:
    """Which part cannot be frozen, and in the model which attribute."""
    known = [*parts.model.modules(), *parts.model.parameters(), *parts.model.buffers()]
    for name, module in parts.model.named_modules():
        for key, value in vars(module).items():
            if not _freezes(value, known):
                path = ".".join(part for part in (name, key) if part)
                return "model", f"its attribute {path}, a {type(value).__name__}: "
        if not _freezes(type(module), known):
            return "model", f"the class {type(module).__name__}: "
    for what in ("loss", "optimizer", "scheduler", "strategy"):
        part = getattr(parts, what)
        if not _freezes(part, known):
            return what, ""
    return None


def _freezes(value: Any, known: Any) -> bool:
    try:
        freeze(value, known)
    except Exception:
        return False
    return True


def check_model(model: Any, *, training: bool = True) -> nn.Module:
    """Refuse what is no model, or none that can be trained.

    Raises
    ------
    ModelError
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model is {brief(model)}, which is no torch.nn.Module.",
            remedy=_remedy_for_no_model(model),
        )
    kind = type(model).__name__
    elsewhere = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if elsewhere:
        raise ModelError(
            f"Parameter {elsewhere[0]} of the model {kind} is on the device 'meta', which holds no values.",
            remedy='model.to_empty(device="cpu"), and give the parameters values',
        )
    if not training:
        return model
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ModelError(
            f"The model {kind} has no trainable parameters.",
            cause="every parameter has requires_grad=False, or layers are held in a plain list",
            remedy="hold layers in nn.ModuleList, and leave requires_grad=True where the model is to learn",
        )
    if any(p.is_complex() for p in trained):
        raise ModelError(
            f"The model {kind} has complex parameters, which cannot be trained here.",
            remedy="hold the real and imaginary parts as two real parameters (torch.view_as_complex in forward)",
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_lazy(parameter) and 0 in parameter.stride() and parameter.numel() > 1:
            raise ModelError(
                f"Parameter {name} of the model {kind} has several elements in one place of memory: its strides are "
                f"{parameter.stride()}.",
                cause="a parameter that was made of an expanded tensor",
                remedy="nn.Parameter(tensor.clone())",
            )
    return model


def _remedy_for_no_model(given: Any) -> str:
    if isinstance(given, type):
        return "give an instance, not a class: Model(), not Model"
    if isinstance(getattr(given, "model", None), nn.Module):
        return "give the model that it holds: run.model"
    if callable(given):
        return "write a class Model(torch.nn.Module) whose forward does this, and give Model()"
    return "give a model such as torch.nn.Linear(64, 10)"


def is_lazy(tensor: Any) -> bool:
    """Whether a tensor has no shape yet."""
    return isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
