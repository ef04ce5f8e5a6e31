"""Frozen copies: one pickle for all that belongs together, with the memory of its tensors beside it.

A model, its loss, its optimizer and its hooks may know each other: a penalty over the model in a loss, a table that a
hook fills and a loss reads, weights that two layers share. `freeze` copies them in one go, so that each copy has the
same ties. Unlike Python's own copies, these keep

- memory that several tensors share, also as views of each other;
- the order of elements in memory (channels_last, transposed weights);
- arrays of numpy's that are views of tensors, or that tensors are views of;
- hooks on parameters, and attributes that somebody gave them; classes derived from those of tensors;
- caches of functions, which are empty in a copy;
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
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import cloudpickle
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from parakit.errors import ModelError
from parakit.serialization.arrays import ArrayPlace, make_array, place_of
from parakit.serialization.local_code import by_value
from parakit.serialization.ties import Ties
from parakit.serialization.wrappers import is_own_cache, reduced_wrapper
from parakit.system.shared_memory import LINE, CannotShare, SharedMemory, SharedMemoryKey

__all__ = ["Frozen", "Memory", "TooLarge", "freeze"]

_SCRIPTS: Any = (torch.jit.ScriptModule, torch.jit.ScriptFunction, torch._C.ScriptModule)
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
    def key(self) -> SharedMemoryKey | None:
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

    def within(self, memory: SharedMemoryKey | npt.NDArray[np.uint8]) -> Frozen:
        """The same, whose bytes came from elsewhere: by a key, or as what `Memory.array` gave.

        Raises
        ------
        CannotShare
            If memory of that key is out of reach.
        """
        if isinstance(memory, SharedMemoryKey):
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
        self._numbers: dict[tuple[str, int], int] = {}
        self._whole: list[Tensor] = []  # bytes, on the CPU
        self._needed: list[tuple[int, int]] = []
        self._held: list[Any] = []  # so that no address is given to another one meanwhile
        self._tenants: list[list[Any]] = []
        self.ties = False

    def of(self, tensor: Tensor) -> _Storage:
        """The storage of a tensor, whose elements are noted to be needed."""
        number = self._number_of(tensor)
        if tensor.numel():
            first = int(tensor.storage_offset())
            last = first + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            self._need(number, first * tensor.itemsize, int(last + 1) * tensor.itemsize)
        return _Storage(number)

    def of_array(self, place: ArrayPlace) -> _Storage:
        """The storage of an array, whose elements are noted to be needed."""
        number = self._number_of(place.memory)
        self._need(number, place.first, place.last)
        return _Storage(number)

    def _number_of(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = str(tensor.device), storage.data_ptr() if storage.nbytes() else 0
        if key not in self._numbers:
            self._numbers[key] = len(self._whole)
            self._whole.append(_bytes_of(storage))
            self._needed.append((storage.nbytes(), 0))
            self._held.append(storage)
            self._tenants.append([])
        number = self._numbers[key]
        if storage.nbytes() > self._held[number].nbytes():  # an array, of which a tensor has only the beginning
            self._whole[number], self._held[number] = _bytes_of(storage), storage
        return number

    def _need(self, number: int, first: int, last: int) -> None:
        begin, end = self._needed[number]
        self._needed[number] = min(begin, first), max(end, last)

    def let(self, storage: _Storage, tenant: Any) -> None:
        """Note that a tensor or an array lies in a storage, with others perhaps."""
        tenants = self._tenants[storage.number]
        if any(each is tenant for each in tenants):  # it is pickled for this process, and for others
            return
        tenants.append(tenant)
        if len(tenants) > 1 and (isinstance(tenant, np.ndarray) or tenant.numel() > 0):
            mixed = len({isinstance(each, np.ndarray) for each in tenants}) > 1
            self.ties = self.ties or mixed or any(isinstance(each, nn.Parameter) for each in tenants)

    def found(self) -> tuple[tuple[Part, ...], _Living]:
        self._check_apart()
        aligned = [(begin // _ALIGNED * _ALIGNED, end) for begin, end in self._needed]
        parts = tuple(Part(min(begin, end), max(0, end - begin)) for begin, end in aligned)
        pieces = [whole[first : first + nbytes] for whole, (first, nbytes) in zip(self._whole, parts, strict=True)]
        return parts, _Living(pieces)

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


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    on_cpu = storage if storage.device.type == "cpu" else storage.cpu()
    return torch.empty(0, dtype=torch.uint8).set_(on_cpu)


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
            with torch._C.DisableTorchFunctionSubclass():
                reduced = self._reduced(thing)
            if reduced is not NotImplemented:
                return reduced
        elif isinstance(thing, _SCRIPTS):
            raise _no_copy_of_a_script(thing)
        elif isinstance(thing, nn.Module) and _has_parametrized_class(thing):
            plain = parametrize.type_before_parametrizations(thing)
            return plain.__new__, (plain,), thing.__dict__, None, None, _revive
        elif isinstance(thing, types.FunctionType):
            self.functions.append(thing)
        elif _is_special_module(thing):
            return importlib.import_module, (thing.__name__,)
        elif type(thing) is np.ndarray:
            return self._reduced_array(thing)
        elif (reduced := reduced_wrapper(thing)) is not NotImplemented:
            return reduced
        reduced = super().reducer_override(thing)
        if isinstance(thing, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            self.classes.append(thing)
            made_of = _with_slots(thing, reduced[1])
            return (reduced[0], made_of, *reduced[2:5], functools.partial(_set_class, _origin(), reduced[5]))
        return reduced

    def _reduced(self, tensor: Tensor) -> Any:
        kind = type(tensor)
        if kind in (UninitializedParameter, UninitializedBuffer):
            return kind, (tensor.requires_grad, None, tensor.dtype), tensor.__dict__, None, None, _set_attributes
        if not _travels_as_its_memory(tensor):
            return NotImplemented
        plain = tensor.detach().resolve_conj().resolve_neg()
        form = isinstance(tensor, nn.Parameter), tensor.is_leaf and tensor.requires_grad
        where = plain.dtype, plain.storage_offset(), tuple(plain.shape), plain.stride()
        storage = self.storages.of(plain)
        self.storages.let(storage, tensor)
        derived = () if kind in (Tensor, nn.Parameter) else (kind,)
        made = _make_tensor, (storage, *form, *where, *derived)
        dress = _Dress(*_attributes_of(tensor), *_hooks_of(tensor))
        return (*made, dress, None, None, _put_on) if any(dress) else made

    def _reduced_array(self, array: npt.NDArray[Any]) -> Any:
        place = place_of(array)
        if place is None:
            return NotImplemented
        storage = self.storages.of_array(place)
        self.storages.let(storage, array)
        return make_array, (storage, array.dtype, place.offset, array.shape, array.strides, array.flags.writeable)


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
        same = (isinstance(thing, types.FunctionType) or is_own_cache(thing)) and not self._bound
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
            return (function, (*_with_slots(thing, made_of)[:-2], None, made_of[-1]), *rest)
        return super().reducer_override(thing)


def _with_slots(kind: type, made_of: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a class is made of anew, with its slots: without them, as cloudpickle has it, objects have dictionaries."""
    slots = vars(kind).get("__slots__")
    if not isinstance(slots, str | tuple | list):
        return made_of
    return tuple(part | {"__slots__": slots} if isinstance(part, dict) else part for part in made_of)


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


def _travels_as_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor is its bytes and what was put on it, and its class does not say otherwise."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        return False
    kind: Any = type(tensor)
    plain = nn.Parameter if issubclass(kind, nn.Parameter) else Tensor
    return all(getattr(kind, name) is getattr(plain, name) for name in _SAYS_OTHERWISE)


_SAYS_OTHERWISE = (
    "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__torch_dispatch__",
)  # fmt: skip


class _Dress(NamedTuple):
    """What was put on a tensor."""

    attributes: dict[str, Any]
    slots: dict[str, Any]
    hooks: dict[int, Callable[..., Any]]
    hooks_after: dict[int, Callable[..., Any]]


def _attributes_of(tensor: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of its dictionary, and those of the slots of its class."""
    state = object.__getstate__(tensor)
    slots = state[1] if isinstance(state, tuple) else {}
    return dict(tensor.__dict__), slots


def _hooks_of(tensor: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """What is called with a leaf's gradient, and with the leaf once it has one: the very tables that handles know."""
    if not tensor.is_leaf:
        return {}, {}
    return tensor._backward_hooks or {}, getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def _no_copy_of_a_script(thing: Any) -> ModelError:
    name = getattr(thing, "original_name", None) or getattr(thing, "name", type(thing).__name__)
    return ModelError(
        f"{name} was compiled by torch.jit, which has no way to copy what it made together with what belongs to it.",
        cause="torch.jit.script or torch.jit.trace",
        remedy="train the module or the function that it was made of, and compile that once it is trained",
    )


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
    storage: tuple[Tensor, int],
    parameter: bool,
    learns: bool,
    dtype: torch.dtype,
    offset: int,
    shape: Any,
    stride: Any,
    derived: type[Tensor] | None = None,
) -> Tensor:
    held, first = storage
    place = offset - first // dtype.itemsize if held.numel() else 0
    made = torch.empty(0, dtype=dtype).set_(held.untyped_storage(), place, shape, stride)
    if derived is not None:
        return derived._make_subclass(derived, made, learns)
    return nn.Parameter(made, requires_grad=learns) if parameter else made.requires_grad_(learns)


def _put_on(tensor: Tensor, dress: _Dress) -> None:
    _set_attributes(tensor, dress.attributes)
    for name, value in dress.slots.items():
        setattr(tensor, name, value)
    if dress.hooks:
        tensor._backward_hooks = dress.hooks
    if dress.hooks_after:
        tensor._post_accumulate_grad_hooks = dress.hooks_after
    # A hook that is registered later must not take the place of one of these.
    RemovableHandle.next_id = max(RemovableHandle.next_id, 1 + max((*dress.hooks, *dress.hooks_after), default=-1))


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
    key : SharedMemoryKey
    parts : sequence of Part
    """

    def __init__(self, key: SharedMemoryKey, parts: Sequence[Part]) -> None:
        self.key = key
        self._parts, self._begins = parts, [LINE + begin for begin in _begins(parts)]

    def open(self) -> Open:
        mapping = SharedMemory.attach(self.key, private=True)
        return lambda number: mapping.storage(self._begins[number], self._parts[number].nbytes)

    def array(self) -> npt.NDArray[np.uint8]:
        whole = SharedMemory.attach(self.key, private=True)
        return whole.storage(LINE, self._begins[-1] - LINE).numpy()


def _settled(parts: Sequence[Part], living: _Living) -> Memory:
    """The same bytes in memory that others can map, or else in an array."""
    begins = _begins(parts)
    if not hasattr(os, "memfd_create") or begins[-1] == 0:
        return _Sent(living.array(), parts)
    try:
        segment = SharedMemory.create(LINE + begins[-1])
    except CannotShare:
        return _Sent(living.array(), parts)
    for piece, begin in zip(living.pieces, begins, strict=False):
        segment.storage(LINE + begin, piece.numel()).copy_(piece)
    mapped = _Mapped(segment.key, parts)
    weakref.finalize(mapped, os.close, segment.leave_open())  # as long as it is open, others can map it
    return mapped
