"""Samples: what a user gave as data, seen as rows that can be taken, packed and sent.

Owns the forms that data may have; refuses to know about workers. A *tree* is a tensor, or a tuple or dict of trees.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from parakit.errors import DataError
from parakit.model_state.generators import OwnGenerators
from parakit.system.process_settings import drawing
from parakit.trees import Tree, _owned, leaves, map_tree, pack, unpack

__all__ = ["Samples"]
_READ_AT_ONCE = 1024
_READ_AGAIN = 16  # items, to see whether they are drawn anew each time


@dataclass(frozen=True)
class Samples:
    """Rows of inputs and targets.

    Parameters
    ----------
    inputs, targets : tree of tensors
        All leaves have the same number of rows.
    """

    inputs: Tree
    targets: Tree

    def __len__(self) -> int:
        return len(self.inputs if isinstance(self.inputs, Tensor) else leaves(self.inputs)[0])

    @classmethod
    def of(cls, data: Any, *, what: str = "data") -> Samples:
        """See whatever a user gave as samples.

        Parameters
        ----------
        data : (inputs, targets), TensorDataset or map-style Dataset
            Inputs may be a tensor or array, or a tuple or dict of them. The items of a Dataset are pairs (input,
            target); they are read once, here.
        what : str
            The argument's name, for messages.

        Returns
        -------
        Samples

        Raises
        ------
        DataError
            If it is empty, ragged, or in none of these forms.
        """
        if isinstance(data, cls):
            return data
        if isinstance(data, DataLoader | IterableDataset):
            raise DataError(
                f"{what} is {_article(data)}, which has no rows that could be cut into chunks.",
                remedy="give the map-style Dataset itself (loader.dataset), or tensors; parakit makes the batches",
            )
        if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
            inputs, targets = _pair(data.tensors, what, "tensors")
        elif isinstance(data, Dataset) or (hasattr(data, "__getitem__") and _is_sized_object(data)):
            inputs, targets = _read(data, what)
        elif isinstance(data, tuple | list):
            inputs, targets = _pair(data, what, "parts")
        else:
            raise DataError(
                f"{what} is {_article(data)}, which parakit cannot read.",
                remedy="give (inputs, targets) as tensors or numpy arrays, or a map-style torch Dataset",
            )
        return cls(_tensors(inputs, f"the inputs of {what}"), _tensors(targets, f"the targets of {what}"))._checked(
            what
        )

    def take(self, rows: Any) -> Samples:
        """The rows of the given numbers, copied."""
        index = torch.as_tensor(rows)
        return self.map(lambda leaf: leaf.index_select(0, index))

    def slice(self, first: int, end: int) -> Samples:
        """The rows from first to end, as views."""
        return self.map(lambda leaf: leaf[first:end])

    def map(self, function: Callable[[Any], Any]) -> Samples:
        """Apply a function to every tensor."""
        return Samples(map_tree(function, self.inputs), map_tree(function, self.targets))

    def copy_rows(self) -> Samples:
        """The same in memory of their own: code may write to what it is given."""
        return self.map(lambda leaf: leaf.clone())

    def on(self, device: torch.device) -> Samples:
        """The rows on a device; copied only if they are elsewhere."""
        return self if device.type == "cpu" else self.map(lambda leaf: leaf.to(device))

    def pack(self) -> Samples:
        """The rows as numpy arrays, which travel between processes without a copy."""
        return Samples(pack(self.inputs), pack(self.targets))

    def unpack(self) -> Samples:
        """The rows as tensors again."""
        return Samples(unpack(self.inputs), unpack(self.targets))

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        """Parts laid end to end, in one piece of memory."""
        whole = Samples(_join([p.inputs for p in parts]), _join([p.targets for p in parts]))
        return whole.map(torch.clone) if len(parts) == 1 else whole

    def _checked(self, what: str) -> Samples:
        for leaf in leaves(self.inputs) + leaves(self.targets):
            if leaf.ndim == 0:
                raise DataError(f"{what} holds a single number where rows are needed.")
        rows_in, rows_out = ({len(leaf) for leaf in leaves(tree)} for tree in (self.inputs, self.targets))
        if not rows_in or not rows_out:
            raise DataError(f"{what} holds no tensor in its inputs or its targets.")
        if len(rows_in | rows_out) > 1:
            raise DataError(
                f"{what} has {_numbers(rows_in)} rows of inputs but {_numbers(rows_out)} rows of targets.",
                cause="inputs and targets come from different splits, or one of them is transposed",
                remedy="the first dimension of every tensor counts the samples; make them equal",
            )
        if rows_in == {0}:
            raise DataError(f"{what} is empty: 0 samples.", remedy="give at least one sample")
        return self


def _numbers(values: set[int]) -> str:
    return " and ".join(map(str, sorted(values)))


def _check_plain(leaf: Tensor, what: str) -> None:
    """Refuse tensors whose rows cannot be taken by their numbers."""
    if leaf.is_nested:
        raise DataError(
            f"A part of {what} is a nested tensor, whose rows have several shapes.",
            cause="sequences of several lengths",
            remedy="pad them: tensor.to_padded_tensor(0.0), and leave the padding out in the loss",
        )
    if leaf.is_meta:
        raise DataError(
            f"A part of {what} is on the device 'meta', which holds no values.", remedy="give tensors with values"
        )


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def _is_sized_object(data: Any) -> bool:
    """A map-style dataset that does not derive from torch's class, but no plain container or array."""
    return hasattr(data, "__len__") and not isinstance(data, tuple | list | dict | str | bytes | Tensor | np.ndarray)


def _pair(parts: Sequence[Any], what: str, noun: str) -> tuple[Any, Any]:
    if len(parts) != 2:
        raise DataError(
            f"{what} has {len(parts)} {noun} where 2 are needed: inputs and targets.",
            remedy="group several inputs in a tuple or dict: ((first, second), targets)",
        )
    return parts[0], parts[1]


def _read(dataset: Any, what: str) -> tuple[Any, Any]:
    """All items of a map-style Dataset, in one tree of tensors."""
    try:
        count = len(dataset)
    except TypeError as error:
        raise DataError(
            f"{what} is {_article(dataset)} without a length, so it cannot be cut into chunks.",
            remedy="give it a __len__",
        ) from error
    if count == 0:
        raise DataError(f"{what} is empty: 0 samples.", remedy="give at least one sample")
    try:
        first = dataset[0]
        if not isinstance(first, tuple | list) or len(first) != 2:
            raise DataError(
                f"An item of {what} is {_article(first)}, not a pair (input, target).",
                remedy="wrap the Dataset so that each item is (input, target); the input may be a tuple or dict",
            )
        watch, own, blocks = drawing(), OwnGenerators(dataset), []
        for start in range(0, count, _READ_AT_ONCE):
            items = [dataset[row] for row in range(start, min(start + _READ_AT_ONCE, count))]
            blocks.append(default_collate(items))
        drew = watch.draws
        inputs, targets = (_join([block[side] for block in blocks]) for side in (0, 1))
        unlike = _unlike_again(dataset, inputs, targets, count)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"The {count} items of {what} could not be read into tensors: {type(error).__name__}: {error}",
            cause="items of different shapes or types",
            remedy="pad or crop the items to one shape, or give tensors",
        ) from error
    if unlike is not None or drew.torch or drew.others or own.drew():
        seen = (
            f"Reading item {unlike} of {what} twice gave different values"
            if unlike is not None
            else f"Reading the items of {what} drew random numbers, so reading them twice may give different values"
        )
        warnings.warn(
            f"{seen}. The items are read once, when the run starts, so random augmentation is frozen; put it into the "
            "model's forward to have it fresh in every epoch.",
            UserWarning,
            stacklevel=4,
        )
    return inputs, targets


def _unlike_again(dataset: Any, inputs: Tree, targets: Tree, count: int) -> int | None:
    """The first of some items, from everywhere, that is read otherwise a second time; None if there is none."""
    for row in sorted(set(np.linspace(0, count - 1, _READ_AGAIN).astype(int).tolist())):
        again = dataset[row]
        for known, side in ((inputs, again[0]), (targets, again[1])):
            mine = leaves(map_tree(lambda leaf, row=row: leaf[row : row + 1], known))  # type: ignore[misc]
            theirs = leaves(map_tree(torch.as_tensor, default_collate([side])))
            if not all(_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
                return int(row)
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN is like NaN."""
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.equal(one.nan_to_num(0), other.nan_to_num(0))


def _join(trees: Sequence[Tree]) -> Tree:
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: _join([tree[key] for tree in trees]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_join([tree[place] for tree in trees]) for place in range(len(first)))
    return first if len(trees) == 1 else torch.cat(list(trees))


def _tensors(tree: Tree, what: str) -> Tree:
    def convert(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            _check_plain(leaf, what)
            return leaf.detach().cpu()
        try:
            return _owned(np.asarray(leaf, order="C"))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"A part of {what} is {_article(leaf)} that cannot be a tensor: {error}",
                remedy="give tensors or numpy arrays of numbers",
            ) from error

    return map_tree(convert, tree)
