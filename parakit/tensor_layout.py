"""How elements lie in memory: which order they have there, and flat views in that order.

A tensor without gaps can be seen as a vector of its elements as they lie, whatever its strides: channels_last or
transposed weights too. A gradient is laid out as its parameter is, as in torch's own backward passes: then updates that
go by memory, and those that go by index, do the same.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["in_order_of", "is_dense", "shaped_like"]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor lie side by side, in some order, each once."""
    expected = 1
    for step, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length == 1:
            continue
        if step != expected:
            return False
        expected *= length
    return True


def shaped_like(flat: Tensor, like: Tensor) -> Tensor:
    """A vector seen in the shape of a tensor: in its order of elements where that is dense, else row by row."""
    if like.is_contiguous() or not is_dense(like):
        return flat.view(like.shape)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of a tensor as a vector, in the order in which those of another of its shape lie.

    A view where both lie alike, else a copy.
    """
    if like.is_contiguous() or not is_dense(like):
        return tensor.reshape(-1)
    if tensor.stride() != like.stride():
        copied = tensor.new_empty(like.numel())
        shaped_like(copied, like).copy_(tensor)
        return copied
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
