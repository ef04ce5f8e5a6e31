"""Arrays of numpy's: the memory that one lies in, so that it stays in the memory of a tensor that it is a view of."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ArrayPlace", "make_array", "place_of"]


class ArrayPlace(NamedTuple):
    """Where an array lies.

    Attributes
    ----------
    memory : Tensor
        That it is a view of, or that is a view of it.
    offset : int
        Bytes from where that storage begins to the array's first element.
    first, last : int
        Bytes from there to where the array begins and ends.
    """

    memory: Tensor
    offset: int
    first: int
    last: int


def place_of(array: npt.NDArray[Any]) -> ArrayPlace | None:
    """Where the memory of an array belongs to another array, or to a tensor; None where that is not known."""
    if array.dtype.hasobject or array.dtype.metadata or array.nbytes == 0:
        return None
    memory = _memory_of(array)
    if memory is None:
        return None
    offset = array.ctypes.data - memory.untyped_storage().data_ptr()
    spans = [(length - 1) * step for length, step in zip(array.shape, array.strides, strict=True)]
    first, last = offset + sum(min(0, span) for span in spans), offset + sum(max(0, span) for span in spans)
    return ArrayPlace(memory, offset, first, last + array.itemsize)


def _memory_of(array: npt.NDArray[Any]) -> Tensor | None:
    owner: Any = array
    while type(owner) is np.ndarray and owner.base is not None:
        owner = owner.base
    if isinstance(owner, Tensor):
        return owner
    if type(owner) is not np.ndarray or not owner.flags.writeable or owner.dtype.hasobject:
        return None
    rows = owner if owner.flags.c_contiguous else owner.T
    if not rows.flags.c_contiguous or rows.nbytes == 0:
        return None
    return torch.from_numpy(rows.reshape(-1).view(np.uint8))


def make_array(
    storage: tuple[Tensor, int], dtype: np.dtype[Any], offset: int, shape: Any, strides: Any, writeable: bool
) -> npt.NDArray[Any]:
    """An array in the bytes of a storage, which begin at some place of the original one."""
    held, first = storage
    made: npt.NDArray[Any] = np.ndarray(shape, dtype, held.numpy(), offset - first, strides)
    made.flags.writeable = writeable
    return made
