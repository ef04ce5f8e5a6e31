"""Frozen copies: one pickle for all that belongs together, with the memory of its tensors beside it.

A model, its loss, its optimizer and its hooks may know each other: a penalty over the model in a loss, a table that a
hook fills and a loss reads, weights that two layers share. `freeze` copies them in one go, so that each copy has the
same ties. Unlike Python's own copies, these keep

- memory that several tensors share, also as views of each other;
- the order of elements in memory (channels_last, transposed weights);
- hooks on parameters, and attributes that somebody gave them;
- modules with parametrizations, by their class and state; and lazy ones.

A tensor that was computed with a graph travels as its values. The bytes of tensors stay beside the pickle, so that
they can lie in memory that several processes map, and nobody copies them twice.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import sys
import types
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from parakit.serialization.local_code import by_value
from parakit.serialization.ties import Ties
from parakit.shared_memory import LINE, CannotShare, Segment, SegmentKey

__all__ = ["Frozen", "Memory", "TooLarge", "freeze"]

_ALIGNED = 64  # bytes, to a multiple of which a storage begins

#: From the number of a storage to its bytes, which are the caller's own to write to.
Open = Callable[[int], Tensor]


class Part(NamedTuple):
    """What of a storage is needed, in bytes."""

    first: int
    nbytes: int


class Memory(Protocol):
    """Where the bytes of a frozen copy's tensors lie."""

    @property
    def key(self) -> SegmentKey | None:
        """By what other processes of this machine reach it; None where they cannot."""

    def open(self) -> Open:
        """Begin to read it."""

    def array(self) -> npt.NDArray[np.uint8]:
        """All bytes, one storage after the other, each at a multiple of 64; not to be changed."""


@dataclass(frozen=True)
class Frozen:
    """A copy at rest, from which any number of living ones can be made.

    Parameters
    ----------
    code : bytes
        The pickle, without the bytes of tensors.
    parts : tuple of Part
        Of each storage that tensors lie in.
    memory : Memory or None
        None in one that was pickled itself: `within` gives it memory again.
    ties : bool
        Whether a parameter lies in the memory of another tensor: who moves one of them must move both.
    here : Local or None
        How copies are made in the process that it comes from.
    """

    code: bytes
    parts: tuple[Part, ...]
    memory: Memory | None = None
    ties: bool = False
    here: Local | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in self.parts)

    def thaw(self, known: Sequence[Any] = ()) -> Any:
        """A living copy, in memory of its own.

        Parameters
        ----------
        known : sequence
            What to put in the places of the objects that `freeze` was told to leave out, in the same order.
        """
        assert self.memory is not None, "a frozen copy came without its memory"
        code, live = (self.code, ()) if self.here is None else (self.here.code, self.here.live)
        return _Unpickler(code, self.parts, self.memory.open(), known, live).load()

    def at_rest(self) -> Frozen:
        """The same in memory of its own; where the system has such, in memory that others of this machine can map."""
        assert self.memory is not None
        if not isinstance(self.memory, _Living):
            return self
        return Frozen(self.code, self.parts, _settled(self.parts, self.memory), self.ties, self.here)

    def within(self, memory: SegmentKey | npt.NDArray[np.uint8]) -> Frozen:
        """The same, whose bytes came from elsewhere: by a key, or as what `Memory.array` gave.

        Raises
        ------
        CannotShare
            If memory of that key is out of reach.
        """
        if isinstance(memory, SegmentKey):
            return Frozen(self.code, self.parts, _Mapped(memory, self.parts), self.ties)
        return Frozen(self.code, self.parts, _Sent(memory, self.parts), self.ties)

    @classmethod
    def of_parts(cls, code: bytes, parts: Sequence[Sequence[int]]) -> Frozen:
        """One without memory, of plain values."""
        return cls(code, tuple(Part(*part) for part in parts))

    def __getstate__(self) -> dict[str, Any]:
        return {"code": self.code, "parts": self.parts, "memory": None, "ties": self.ties}


@dataclass(frozen=True)
class Local:
    """How copies are made in the process that holds the original.

    Classes are the very same there, so that a copy of a model is an instance of its class; and so are functions, which
    see the variables of the notebook as they are, unless one of them knows a part of what is copied.

    Parameters
    ----------
    code : bytes
        The pickle.
    live : tuple
        What it holds by number.
    """

    code: bytes
    live: tuple[Any, ...]


class TooLarge(Exception):
    """A pickle grew beyond what was allowed."""


class _Limited(io.BytesIO):
    """Bytes up to a limit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self._most:
            raise TooLarge
        return super().write(data)


def freeze(
    value: Any, known: Sequence[Any] = (), *, own: Sequence[Any] | None = None, most: int | None = None
) -> Frozen:
    """A copy of a value; it shares memory with the value until `Frozen.at_rest` is called.

    Parameters
    ----------
    value : object
        Classes and functions of a notebook, and of modules beside it, travel by value.
    known : sequence
        Objects to leave out: `Frozen.thaw` puts others in their places.
    own : sequence, optional
        The modules and tensors of the value. If they are given, copies that are made in this process are `Local`.
    most : int, optional
        Bytes that it may have.

    Raises
    ------
    TooLarge
        If it has more.
    Exception
        Whatever a part of it raises that cannot be pickled.
    """
    file = io.BytesIO() if most is None else _Limited(most)
    pickler = _Pickler(file, known)
    with by_value():
        pickler.dump(value)
        here = None if own is None else _local(value, known, own, pickler)
    parts, living = pickler.storages.found()
    if most is not None and sum(part.nbytes for part in parts) > most:
        raise TooLarge
    return Frozen(file.getvalue(), parts, living, pickler.storages.ties, here)


def _local(value: Any, known: Sequence[Any], own: Sequence[Any], travelled: _Pickler) -> Local:
    ties = Ties(own)
    knowing = {kind for kind in travelled.classes if ties.known_to(kind)}
    bound = bool(knowing) or any(map(ties.known_to, travelled.functions))
    file = io.BytesIO()
    pickler = _LocalPickler(file, known, travelled.storages, bound=bound, knowing=knowing)
    pickler.dump(value)
    return Local(file.getvalue(), tuple(pickler.live))


# --- writing


@dataclass(frozen=True)
class _Storage:
    """Stands in a pickle for the bytes of a storage."""

    number: int


class _Storages:
    """The storages that tensors of a pickle lie in, and what of each is needed."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, int], _Storage] = {}
        self._whole: list[Tensor] = []  # bytes, on the CPU
        self._needed: list[tuple[int, int]] = []
        self._held: list[Any] = []  # so that no address is given to another one meanwhile
        self._tenants: list[list[Tensor]] = []
        self.ties = False

    def of(self, tensor: Tensor) -> _Storage:
        """The storage of a tensor, whose elements are noted to be needed."""
        storage = tensor.untyped_storage()
        key = str(tensor.device), storage.data_ptr() if storage.nbytes() else 0
        if key not in self._numbers:
            self._numbers[key] = _Storage(len(self._whole))
            on_cpu = storage if tensor.device.type == "cpu" else storage.cpu()
            self._whole.append(torch.empty(0, dtype=torch.uint8).set_(on_cpu))
            self._needed.append((storage.nbytes(), 0))
            self._held.append(storage)
            self._tenants.append([])
        number = self._numbers[key].number
        if tensor.numel():
            first = tensor.storage_offset()
            last = first + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            begin, end = self._needed[number]
            size = tensor.itemsize
            begin, end = min(begin, first * size // _ALIGNED * _ALIGNED), max(end, int(last + 1) * size)
            self._needed[number] = begin, end
        return self._numbers[key]

    def let(self, storage: _Storage, tensor: Tensor) -> None:
        """Note that a tensor lies in a storage, with others perhaps."""
        tenants = self._tenants[storage.number]
        tenants.append(tensor)
        shared = len(tenants) > 1 and tensor.numel() > 0
        self.ties = self.ties or (shared and any(isinstance(tenant, nn.Parameter) for tenant in tenants))

    def found(self) -> tuple[tuple[Part, ...], _Living]:
        parts = tuple(Part(min(begin, end), max(0, end - begin)) for begin, end in self._needed)
        pieces = [whole[first : first + nbytes] for whole, (first, nbytes) in zip(self._whole, parts, strict=True)]
        return parts, _Living(pieces)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it carries no annotations
    """cloudpickle's, with the bytes of tensors left beside the pickle."""

    def __init__(self, file: io.BytesIO, known: Sequence[Any], storages: _Storages | None = None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.storages = storages or _Storages()
        self.functions: list[types.FunctionType] = []
        self.classes: list[type] = []  # that go by value
        self._known = {id(thing): place for place, thing in enumerate(known)}

    def persistent_id(self, thing: Any) -> tuple[str, int] | None:
        if type(thing) is _Storage:
            return "storage", thing.number
        place = self._known.get(id(thing))
        return None if place is None else ("known", place)

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            reduced = self._reduced(thing)
            if reduced is not NotImplemented:
                return reduced
        elif isinstance(thing, nn.Module) and _has_parametrized_class(thing):
            plain = parametrize.type_before_parametrizations(thing)
            return plain.__new__, (plain,), thing.__dict__, None, None, _revive
        elif isinstance(thing, types.FunctionType):
            self.functions.append(thing)
        elif _is_special_module(thing):
            return importlib.import_module, (thing.__name__,)
        reduced = super().reducer_override(thing)
        if isinstance(thing, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            self.classes.append(thing)
            return (*reduced[:5], functools.partial(_set_class, _origin(), reduced[5]))
        return reduced

    def _reduced(self, tensor: Tensor) -> Any:
        kind = type(tensor)
        if kind in (UninitializedParameter, UninitializedBuffer):
            return kind, (tensor.requires_grad, None, tensor.dtype), tensor.__dict__, None, None, _set_attributes
        if kind not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
            return NotImplemented
        if tensor.device.type == "meta" or tensor.is_nested:
            return NotImplemented
        plain = tensor.detach().resolve_conj().resolve_neg()
        form = kind is nn.Parameter, tensor.is_leaf and tensor.requires_grad
        where = plain.dtype, plain.storage_offset(), tuple(plain.shape), plain.stride()
        storage = self.storages.of(plain)
        self.storages.let(storage, tensor)
        made = _make_tensor, (storage, *form, *where)
        dress = _Dress(dict(tensor.__dict__), *_hooks_of(tensor))
        return (*made, dress, None, None, _put_on) if any(dress) else made


class _LocalPickler(_Pickler):
    """For copies in this very process.

    Parameters
    ----------
    file, known, storages
        As above.
    bound : bool
        Whether a function knows a part of what is copied: then functions are copied too.
    knowing : set of type
        Classes of which this is true: they are copied too.
    """

    def __init__(
        self, file: io.BytesIO, known: Sequence[Any], storages: _Storages, *, bound: bool, knowing: set[type]
    ) -> None:
        super().__init__(file, known, storages)
        self._bound, self._knowing = bound, knowing
        self.live: list[Any] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> tuple[str, int] | None:
        found = super().persistent_id(thing)
        if found is not None:
            return found
        same = isinstance(thing, types.FunctionType) and not self._bound
        same = same or (isinstance(thing, type) and thing not in self._knowing)
        if not same or _has_parametrized_name(thing):
            return None
        if id(thing) not in self._places:
            self._places[id(thing)] = len(self.live)
            self.live.append(thing)
        return "live", self._places[id(thing)]

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type) and thing in self._knowing:
            function, made_of, *rest = cloudpickle.Pickler.reducer_override(self, thing)
            # Without the name by which it is known here, a class is made anew.
            return (function, (*made_of[:4], None, *made_of[5:]), *rest)
        return super().reducer_override(thing)


def _is_special_module(thing: Any) -> bool:
    """Whether it is a module of a class of its own, as in torch.backends, which cloudpickle does not take for one."""
    if not isinstance(thing, types.ModuleType) or type(thing) is types.ModuleType:
        return False
    return sys.modules.get(thing.__name__) is thing


def _has_parametrized_name(thing: Any) -> bool:
    ours = isinstance(thing, type) and thing.__module__ == parametrize.__name__
    return ours and thing.__name__ not in vars(parametrize)


_own_origin: tuple[int, str] = 0, ""


def _origin() -> str:
    """A name of this process."""
    global _own_origin
    if _own_origin[0] != os.getpid():
        _own_origin = os.getpid(), uuid.uuid4().hex
    return _own_origin[1]


def _set_class(origin: str, setter: Callable[[Any, Any], Any], kind: type, state: Any) -> None:
    """Give a class what it had where it was pickled; in that very process it is there, and as it is now."""
    attributes = state[0]
    if origin != _origin() or any(name not in vars(kind) for name in attributes if not name.startswith("_abc")):
        setter(kind, state)


class _Dress(NamedTuple):
    """What was put on a tensor."""

    attributes: dict[str, Any]
    hooks: tuple[Callable[..., Any], ...]
    hooks_after: tuple[Callable[..., Any], ...]


def _hooks_of(tensor: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What is called with a leaf's gradient, and with the leaf once it has one."""
    if not tensor.is_leaf:
        return (), ()
    after = getattr(tensor, "_post_accumulate_grad_hooks", None)
    return tuple((tensor._backward_hooks or {}).values()), tuple((after or {}).values())


def _has_parametrized_class(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and type(module) is not parametrize.type_before_parametrizations(module)


# --- reading


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, code: bytes, parts: Sequence[Part], storage: Open, known: Sequence[Any], live: Sequence[Any]
    ) -> None:
        super().__init__(io.BytesIO(code))
        self._parts, self._open, self._known, self._live = parts, storage, known, live
        self._storages: dict[int, tuple[Tensor, int]] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, number = pid
        if kind == "known":
            return self._known[number]
        if kind == "live":
            return self._live[number]
        if number not in self._storages:
            self._storages[number] = self._open(number), self._parts[number].first
        return self._storages[number]


def _make_tensor(
    storage: tuple[Tensor, int], parameter: bool, learns: bool, dtype: torch.dtype, offset: int, shape: Any, stride: Any
) -> Tensor:
    held, first = storage
    place = offset - first // dtype.itemsize if held.numel() else 0
    made = torch.empty(0, dtype=dtype).set_(held.untyped_storage(), place, shape, stride)
    return nn.Parameter(made, requires_grad=learns) if parameter else made.requires_grad_(learns)


def _put_on(tensor: Tensor, dress: _Dress) -> None:
    _set_attributes(tensor, dress.attributes)
    learns = tensor.requires_grad
    if dress.hooks or dress.hooks_after:
        tensor.requires_grad_()  # torch takes hooks for nothing else
        for hook in dress.hooks:
            tensor.register_hook(hook)
        for hook in dress.hooks_after:
            tensor.register_post_accumulate_grad_hook(hook)
        tensor.requires_grad_(learns)


def _set_attributes(thing: Any, attributes: dict[str, Any]) -> None:
    thing.__dict__.update(attributes)


def _revive(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Give a module its attributes, and the class that parametrizations make of its own."""
    module.__dict__.update(attributes)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict by now
        parametrize._inject_property(module, name)


# --- memory


def _begins(parts: Sequence[Part]) -> list[int]:
    """Where each storage begins, and the end of the last."""
    return list(accumulate((-(-part.nbytes // _ALIGNED) * _ALIGNED for part in parts), initial=0))


class _Living:
    """The memory of the very tensors that were frozen."""

    key = None

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = tuple(pieces)

    def open(self) -> Open:
        return lambda number: self.pieces[number].clone()

    def array(self) -> npt.NDArray[np.uint8]:
        parts = [Part(0, piece.numel()) for piece in self.pieces]
        begins = _begins(parts)
        whole = torch.zeros(begins[-1], dtype=torch.uint8)
        for piece, begin in zip(self.pieces, begins, strict=False):
            whole[begin : begin + piece.numel()].copy_(piece)
        return whole.numpy()


class _Sent:
    """Bytes that came as an array."""

    key = None

    def __init__(self, whole: npt.NDArray[np.uint8], parts: Sequence[Part]) -> None:
        self._whole, self._parts, self._begins = whole, parts, _begins(parts)

    def open(self) -> Open:
        def piece(number: int) -> Tensor:
            begin = self._begins[number]
            return torch.from_numpy(self._whole[begin : begin + self._parts[number].nbytes].copy())

        return piece

    def array(self) -> npt.NDArray[np.uint8]:
        return self._whole


class _Mapped:
    """Memory that several processes of a machine map; what one of them writes, only that one sees.

    Parameters
    ----------
    key : SegmentKey
    parts : sequence of Part
    """

    def __init__(self, key: SegmentKey, parts: Sequence[Part]) -> None:
        self.key = key
        self._parts, self._begins = parts, [LINE + begin for begin in _begins(parts)]

    def open(self) -> Open:
        mapping = Segment.attach(self.key, private=True)
        return lambda number: mapping.storage(self._begins[number], self._parts[number].nbytes)

    def array(self) -> npt.NDArray[np.uint8]:
        whole = Segment.attach(self.key, private=True)
        return whole.storage(LINE, self._begins[-1] - LINE).numpy()


def _settled(parts: Sequence[Part], living: _Living) -> Memory:
    """The same bytes in memory that others can map, or else in an array."""
    begins = _begins(parts)
    if not hasattr(os, "memfd_create") or begins[-1] == 0:
        return _Sent(living.array(), parts)
    try:
        segment = Segment.create(LINE + begins[-1])
    except CannotShare:
        return _Sent(living.array(), parts)
    for piece, begin in zip(living.pieces, begins, strict=False):
        segment.storage(LINE + begin, piece.numel()).copy_(piece)
    mapped = _Mapped(segment.key, parts)
    weakref.finalize(mapped, os.close, segment.leave_open())  # as long as it is open, others can map it
    return mapped
