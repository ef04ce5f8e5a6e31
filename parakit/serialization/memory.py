"""Where the bytes of a frozen copy's tensors lie: in this process, in memory that several map, or sent in one piece.

Owns which bytes of which storages are needed; refuses to know what the tensors are of.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from parakit.errors import ModelError
from parakit.serialization.arrays import ArrayPlace
from parakit.system.shared_memory import LINE, CannotShare, SharedMemory, SharedMemoryKey

__all__ = [
    "Living",
    "Mapped",
    "Memory",
    "Open",
    "Part",
    "Sent",
    "Storage",
    "Storages",
    "settle",
    "starts_of",
]

ALIGNED = 64  # bytes, to a multiple of which a storage begins


#: From the number of a storage to its bytes, which are the caller's own to write to.
Open = Callable[[int], Tensor]


class Part(NamedTuple):
    """What of a storage is needed, in bytes."""

    first: int
    nbytes: int


class Memory(Protocol):
    """Where the bytes of a frozen copy's tensors lie."""

    @property
    def key(self) -> SharedMemoryKey | None:
        """By what other processes of this machine reach it; None where they cannot."""

    def open(self) -> Open:
        """Begin to read it."""

    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes, one storage after the other, each at a multiple of 64; not to be changed."""


@dataclass(frozen=True)
class Storage:
    """Stands in a pickle for the bytes of a storage."""

    number: int


class Storages:
    """The storages that tensors of a pickle lie in, and what of each is needed."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int], int] = {}
        self._whole: list[Tensor] = []  # bytes, on the CPU
        self._needed: list[tuple[int, int]] = []
        self._held: list[Any] = []  # so that no address is given to another one meanwhile
        self._tenants: list[list[Any]] = []
        self.ties = False

    def of(self, tensor: Tensor) -> Storage:
        """The storage of a tensor, whose elements are noted to be needed."""
        number = self._number_of(tensor)
        if tensor.numel():
            first = int(tensor.storage_offset())
            last = first + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            self._need(number, first * tensor.itemsize, int(last + 1) * tensor.itemsize)
        return Storage(number)

    def of_array(self, place: ArrayPlace) -> Storage:
        """The storage of an array, whose elements are noted to be needed."""
        number = self._number_of(place.memory)
        self._need(number, place.first, place.last)
        return Storage(number)

    def _number_of(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = str(tensor.device), storage.data_ptr() if storage.nbytes() else 0
        if key not in self._numbers:
            self._numbers[key] = len(self._whole)
            self._whole.append(bytes_of(storage))
            self._needed.append((storage.nbytes(), 0))
            self._held.append(storage)
            self._tenants.append([])
        number = self._numbers[key]
        if storage.nbytes() > self._held[number].nbytes():  # an array, of which a tensor has only the beginning
            self._whole[number], self._held[number] = bytes_of(storage), storage
        return number

    def _need(self, number: int, first: int, last: int) -> None:
        begin, end = self._needed[number]
        self._needed[number] = min(begin, first), max(end, last)

    def let(self, storage: Storage, tenant: Any) -> None:
        """Note that a tensor or an array lies in a storage, with others perhaps."""
        tenants = self._tenants[storage.number]
        if any(each is tenant for each in tenants):  # it is pickled for this process, and for others
            return
        tenants.append(tenant)
        if len(tenants) > 1 and (isinstance(tenant, np.ndarray) or tenant.numel() > 0):
            mixed = len({isinstance(each, np.ndarray) for each in tenants}) > 1
            self.ties = self.ties or mixed or any(isinstance(each, nn.Parameter) for each in tenants)

    def found(self) -> tuple[tuple[Part, ...], Living]:
        """The parts of storages that are needed, and the storages themselves."""
        self._check_apart()
        aligned = [(begin // ALIGNED * ALIGNED, end) for begin, end in self._needed]
        parts = tuple(Part(min(begin, end), max(0, end - begin)) for begin, end in aligned)
        pieces = [whole[first : first + nbytes] for whole, (first, nbytes) in zip(self._whole, parts, strict=True)]
        return parts, Living(pieces)

    def _check_apart(self) -> None:
        """Refuse two storages over one memory, as torch.from_numpy makes them of two parts of an array."""
        spans = sorted(
            (storage.data_ptr() + begin, storage.data_ptr() + end, number)
            for number, (storage, (begin, end)) in enumerate(zip(self._held, self._needed, strict=True))
            if begin < end and storage.device.type == "cpu"
        )
        for (_, end, one), (begin, _, other) in pairwise(spans):
            if begin < end:
                shapes = " and ".join(str(tuple(self._tenants[number][0].shape)) for number in (one, other))
                raise ModelError(
                    f"Two tensors or arrays, of the shapes {shapes}, share memory in a way that no copy can keep.",
                    cause="torch.from_numpy of a part of an array that is held too",
                    remedy="hold the whole as a tensor, and make a part of it by torch.from_numpy(array)[begin:end]",
                )


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    on_cpu = storage if storage.device.type == "cpu" else storage.cpu()
    return torch.empty(0, dtype=torch.uint8).set_(on_cpu)


def starts_of(parts: Sequence[Part]) -> list[int]:
    """Where each storage begins, and the end of the last."""
    return list(accumulate((-(-part.nbytes // ALIGNED) * ALIGNED for part in parts), initial=0))


class Living:
    """The memory of the very tensors that were frozen."""

    key = None

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = tuple(pieces)

    def open(self) -> Open:
        """Each storage is copied."""
        return lambda number: self.pieces[number].clone()

    def array(self) -> npt.NDArray[np.uint8]:
        """A copy, end to end."""
        parts = [Part(0, piece.numel()) for piece in self.pieces]
        begins = starts_of(parts)
        whole = torch.zeros(begins[-1], dtype=torch.uint8)
        for piece, begin in zip(self.pieces, begins, strict=False):
            whole[begin : begin + piece.numel()].copy_(piece)
        return whole.numpy()


class Sent:
    """Bytes that came as an array."""

    key = None

    def __init__(self, whole: npt.NDArray[np.uint8], parts: Sequence[Part]) -> None:
        self._whole, self._parts, self._begins = whole, parts, starts_of(parts)

    def open(self) -> Open:
        """Views of what was sent."""

        def piece(number: int) -> Tensor:
            begin = self._begins[number]
            return torch.from_numpy(self._whole[begin : begin + self._parts[number].nbytes].copy())

        return piece

    def array(self) -> npt.NDArray[np.uint8]:
        """What was sent."""
        return self._whole


class Mapped:
    """Memory that several processes of a machine map; what one of them writes, only that one sees.

    Parameters
    ----------
    key : SharedMemoryKey
    parts : sequence of Part
    """

    def __init__(self, key: SharedMemoryKey, parts: Sequence[Part]) -> None:
        self.key = key
        self._parts, self._begins = parts, [LINE + begin for begin in starts_of(parts)]

    def open(self) -> Open:
        """Views of a mapping of one's own."""
        mapping = SharedMemory.attach(self.key, private=True)
        return lambda number: mapping.storage(self._begins[number], self._parts[number].nbytes)

    def array(self) -> npt.NDArray[np.uint8]:
        """A mapping of one's own."""
        whole = SharedMemory.attach(self.key, private=True)
        return whole.storage(LINE, self._begins[-1] - LINE).numpy()


def settle(parts: Sequence[Part], living: Living) -> Memory:
    """The same bytes in memory that others can map, or else in an array."""
    begins = starts_of(parts)
    if not hasattr(os, "memfd_create") or begins[-1] == 0:
        return Sent(living.array(), parts)
    try:
        segment = SharedMemory.create(LINE + begins[-1])
    except CannotShare:
        return Sent(living.array(), parts)
    for piece, begin in zip(living.pieces, begins, strict=False):
        segment.storage(LINE + begin, piece.numel()).copy_(piece)
    mapped = Mapped(segment.key, parts)
    weakref.finalize(mapped, os.close, segment.leave_open())  # as long as it is open, others can map it
    return mapped
