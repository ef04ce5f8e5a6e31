"""Outputs of models: tensors in tuples, dicts, named tuples, dataclasses, and the objects that libraries return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from parakit.errors import LossError

__all__ = ["check_rows", "replace_tensors", "tensors_in"]


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of an output, in order; what is neither a tensor nor a container is left alone."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(note, output)
    return found


def replace_tensors(output: Any, tensors: Iterator[Tensor]) -> Any:
    """The same output with other tensors in the places of its own."""
    return _mapped(lambda _: next(tensors), output)


def _mapped(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, Mapping):
        items = {key: _mapped(function, value) for key, value in output.items()}
        # What is derived from a dict is made as such objects are: from its entries.
        return items if type(output) is dict else type(output)(**items)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_mapped(function, value) for value in output))
    if isinstance(output, tuple | list):
        return type(output)(_mapped(function, value) for value in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {field.name: _mapped(function, getattr(output, field.name)) for field in dataclasses.fields(output)}
        return dataclasses.replace(output, **fields)
    return output


def check_rows(leaf: Tensor, rows: int) -> Tensor:
    """A tensor of an output that is to be gathered.

    Raises
    ------
    LossError
        If it has no row for each sample.
    """
    if leaf.dim() == 0 or len(leaf) != rows:
        raise LossError(
            f"With gather=True, every tensor of a model's output has a row for each sample; of {rows} samples came one "
            f"of shape {tuple(leaf.shape)}.",
            cause="an output that is a mean or a loss already, or whose first dimension is not that of samples",
            remedy="return what is to be compared, one row a sample, and reduce it in the loss",
        )
    return leaf
