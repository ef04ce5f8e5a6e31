"""What the gradient of a loss reaches: parameters of the copy that is trained, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from parakit.errors import LossError, ModelError
from parakit.failures.source_lines import describe_error, listing, places_of
from parakit.model_state.hooks import ParameterHooks

__all__ = ["backward_once", "check_reach", "computed_attributes"]


def backward_once(value: Tensor, parameters: Iterable[nn.Parameter], hooks: ParameterHooks) -> None:
    """A backward pass of which no gradient is left.

    Parameters
    ----------
    value : scalar tensor
    parameters : iterable of Parameter
    hooks : ParameterHooks
        Theirs, which are called.

    Raises
    ------
    LossError
        If there is no gradient.
    """

    def drop(parameter: Tensor) -> None:
        hooks.call(parameter)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in parameters if p.requires_grad]
    try:
        value.backward()
    except Exception as error:
        raise LossError(
            f"The loss has no gradient: {describe_error(error)}",
            where=listing(places_of(error)),
            cause="the loss or the model detaches its result, or uses .item() or numpy",
            remedy="compute the loss with torch operations on the model's output only",
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def computed_attributes(original: nn.Module, copy: nn.Module) -> list[tuple[str, Tensor]]:
    """Attributes of a copy that were computed with a graph in the original: a copy has their values alone."""
    copies = dict(copy.named_modules())
    found = []
    for name, module in original.named_modules():
        for key, value in vars(module).items():
            theirs = vars(copies[name]).get(key) if name in copies else None
            if isinstance(value, Tensor) and value.grad_fn is not None and isinstance(theirs, Tensor):
                theirs.requires_grad_()
                found.append((".".join(part for part in (name, key) if part), theirs))
    return found


def check_reach(value: Tensor, original: nn.Module, computed: list[tuple[str, Tensor]]) -> None:
    """Refuse a loss whose gradient goes where no copy can follow.

    Raises
    ------
    ModelError, LossError
    """
    reached = _leaves_of(value)
    for path, tensor in computed:
        if id(tensor) in reached:
            raise ModelError(
                f"The attribute {path} was computed from parameters when the model was made, and forward uses it as it "
                "was: a copy of the model has its values, and none of its ties.",
                cause="weights that are tied or derived in __init__",
                remedy="compute it in forward; or share the parameter itself; or use torch.nn.utils.parametrize",
            )
    theirs = {id(p): name for name, p in original.named_parameters()}
    foreign = [theirs[leaf] for leaf in reached if leaf in theirs]
    if foreign:
        raise LossError(
            f"The loss depends on parameter {foreign[0]} of the notebook's own model, and not on that of the model "
            "that is trained, which is a copy.",
            cause="a function or a class of an installed module that knows the model by a global name",
            remedy="define the loss in the notebook, or in a file beside it; or return the penalty as a part of the "
            "model's output",
        )


def _leaves_of(value: Tensor) -> set[int]:
    """Ids of all tensors that a gradient comes to."""
    seen: set[Any] = set()
    found: set[int] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found
