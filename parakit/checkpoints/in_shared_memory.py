"""Snapshots in shared memory: commits that outlive the process that makes them.

The memory has no name: it is a file that nothing but open descriptors keeps (memfd_create(2)). So nothing of it is left
when the last process that holds it has gone, and nothing in it is lost while one is left. The owner alone writes.
Linux only: elsewhere `SharedMemorySnapshots` raises, and commits are private.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from parakit.checkpoints.state import State, copy_state

__all__ = ["Room", "SharedMemorySnapshots", "SnapshotsKey", "SnapshotsReader", "open_snapshots"]

_LINE = 64  # bytes; tensors begin at a multiple
_PLAIN_BYTES = 1 << 16  # room for what is not tensors, beyond what there is of it at first
_TITLE = struct.Struct("16sqqq")  # the name of the snapshots; places, bytes of one, and of its room for plain values
_HEAD = struct.Struct("qqq")  # of a place: number of the state in it (0 while it is written), its step, plain bytes
_MACHINE = Path("/proc/sys/kernel/random/boot_id")
_TRIES = 5  # to read a state that is written over meanwhile
_STATES = 4  # tensors that an optimizer may come to keep for each parameter, for which there is room from the beginning

T = TypeVar("T")


class Room(NamedTuple):
    """Bytes for one state; what is not written to takes no memory.

    Attributes
    ----------
    plain, tensors : int
        For plain values, and for tensors.
    """

    plain: int
    tensors: int

    @classmethod
    def of(cls, state: State) -> Room:
        """What a state takes."""
        tensors: list[tuple[int, Tensor]] = []
        return cls(len(pickle.dumps(_with_holes(state, tensors))), _end(tensors))

    @classmethod
    def foreseen(cls, tensors: Iterable[Tensor], trained: Iterable[Tensor]) -> Room:
        """What the states of a run will take: what a model has, and what an optimizer may come to keep."""
        sizes = [_rounded(tensor.nbytes) for tensor in tensors]
        grown = [_rounded(tensor.nbytes) for tensor in trained]
        return cls(_PLAIN_BYTES, sum(sizes) + _STATES * sum(grown))

    def holds(self, needed: Room) -> bool:
        """Whether a state that needs so much fits."""
        return needed.plain <= self.plain and needed.tensors <= self.tensors

    def grown(self) -> Room:
        """Somewhat more, for plain values: most of them only grow."""
        return Room(self.plain + _PLAIN_BYTES, self.tensors)


class SnapshotsKey(NamedTuple):
    """By what another process of the same machine and user opens these snapshots.

    The name is unique and stands in their memory too: the numbers of a process and of a descriptor may have been given
    to another one since.
    """

    machine: str
    pid: int
    descriptor: int
    name: bytes
    nbytes: int


class SharedMemorySnapshots:
    """The newest states of this process, in memory that others can hold on to.

    A state is written in place of the oldest, and counts from the moment when its number is set: whoever dies in
    between leaves the newer ones as they were.

    Parameters
    ----------
    state : State
        The first to keep. A later one that needs more room gets new memory.
    places : int
        How many states to keep, at least two.
    room : Room, optional
        For each of them; by default what the first one needs, and somewhat more.

    Raises
    ------
    OSError
        If this system has no such memory, or not enough.
    """

    def __init__(self, state: State, places: int = 2, room: Room | None = None) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("This system has no shared memory without a name.")
        self._machine = _MACHINE.read_text()
        self.places = places
        self._number = 0
        self._descriptor = -1
        self._room = Room(0, 0)
        needed = Room.of(state)
        self._move(room if room is not None and room.holds(needed) else needed.grown())
        self.keep(state)

    @property
    def key(self) -> SnapshotsKey:
        """Changes when a state needs more room than there was."""
        return SnapshotsKey(self._machine, os.getpid(), self._descriptor, self._name, len(self._memory))

    @property
    def step(self) -> int:
        """Steps of the newest state."""
        return self._step

    def keep(self, state: State) -> None:
        """Keep a copy of a state, in place of the oldest; those of the same step and of later ones count no more."""
        tensors: list[tuple[int, Tensor]] = []
        plain = pickle.dumps(_with_holes(state, tensors))
        needed = Room(len(plain), _end(tensors))
        if not self._room.holds(needed):
            self._move(needed.grown())
        self._number += 1
        at = _LINE + self._number % self.places * _place_size(*self._room)
        struct.pack_into("q", self._memory, at, 0)
        self._memory[at + _LINE : at + _LINE + len(plain)] = plain
        first = _first_tensor(at, self._room[0])
        for offset, tensor in tensors:
            if tensor.numel():
                place = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=first + offset)
                place.view(tensor.shape).copy_(tensor)
        self._step = int(state["step"])
        _HEAD.pack_into(self._memory, at, 0, self._step, len(plain))
        struct.pack_into("q", self._memory, at, self._number)

    def _move(self, room: Room) -> None:
        """Go on in new memory; whoever has opened the old one still holds that."""
        self.close()
        self._room = room
        nbytes = _LINE + self.places * _place_size(*room)
        self._name = uuid.uuid4().bytes
        self._descriptor = os.memfd_create("parakit-snapshots", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, nbytes)
        self._memory = mmap.mmap(self._descriptor, nbytes)
        _TITLE.pack_into(self._memory, 0, self._name, self.places, _place_size(*room), room.plain)

    def of_step(self, step: int) -> State | None:
        """A copy of the state of a step, if it is kept."""
        return _newest(self._memory, lambda kept: kept == step)

    def close(self) -> None:
        """Let others open it no more; those who have hold it still."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class SnapshotsReader:
    """Another process's snapshots, which stay when that process has gone.

    Parameters
    ----------
    key : SnapshotsKey

    Raises
    ------
    OSError
        If it is on another machine, or gone.
    """

    def __init__(self, key: SnapshotsKey) -> None:
        if _MACHINE.read_text() != key.machine:
            raise OSError("These snapshots are on another machine.")
        descriptor = os.open(f"/proc/{key.pid}/fd/{key.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != key.nbytes:
                raise OSError("These snapshots are gone.")
            self._memory = mmap.mmap(descriptor, key.nbytes)
        finally:
            os.close(descriptor)
        if _TITLE.unpack_from(self._memory)[0] != key.name:
            raise OSError("These snapshots are gone.")
        self.key = key

    def newest(self, step: int) -> State | None:
        """A copy of the newest state of at most a step; None if there is none."""
        return self.visit(step, copy_state)

    def newest_step(self, step: int) -> int:
        """Of which step that is; -1 if there is none."""
        found = _find(self._memory, lambda kept: kept <= step)
        return -1 if found is None else found.step

    def visit(self, step: int, look: Callable[[State], T]) -> T | None:
        """Look at the newest state of at most a step, where it lies; None if there is none.

        Parameters
        ----------
        step : int
        look : callable
            Is given the state, and may hold on to nothing of it. Called once more if somebody wrote over it meanwhile.
        """
        for _ in range(_TRIES):
            found = _find(self._memory, lambda kept: kept <= step)
            if found is None:
                return None
            try:
                seen = look(_state_at(self._memory, found))
            except Exception:
                if found.holds(self._memory):
                    raise
                continue
            if found.holds(self._memory):
                return seen
        return None

    def keep_only(self, step: int) -> None:
        """Give the memory of all states but the newest of at most a step back; its owner writes no more."""
        found = _find(self._memory, lambda kept: kept <= step)
        _, places, size, _ = _TITLE.unpack_from(self._memory)
        if found is None or not hasattr(mmap, "MADV_REMOVE"):
            return
        for at in range(_LINE, _LINE + places * size, size):
            first, last = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE, (at + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if at != found.at and first < last:
                with suppress(OSError):  # a kernel that cannot
                    struct.pack_into("q", self._memory, at, 0)
                    self._memory.madvise(mmap.MADV_REMOVE, first, last - first)


def open_snapshots(key: SnapshotsKey | None, known: SnapshotsReader | None) -> SnapshotsReader | None:
    """The snapshots of a key: the one that is known, if it is that; None where it cannot be reached."""
    if known is not None and known.key == key:
        return known
    with suppress(OSError):
        return None if key is None else SnapshotsReader(key)
    return None


@dataclass(frozen=True)
class _Hole:
    """Stands for a tensor among plain values."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _with_holes(tree: Any, tensors: list[tuple[int, Tensor]]) -> Any:
    """A state with holes in it; the tensors, and where they go, are added to a list."""
    if isinstance(tree, Tensor):
        offset = _end(tensors)
        tensors.append((offset, tree))
        return _Hole(offset, tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {key: _with_holes(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_with_holes(value, tensors) for value in tree])
    return tree


def _filled(tree: Any, tensor_of: Callable[[_Hole], Tensor]) -> Any:
    """A state again."""
    if isinstance(tree, _Hole):
        return tensor_of(tree)
    if isinstance(tree, dict):
        return {key: _filled(value, tensor_of) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_filled(value, tensor_of) for value in tree])
    return tree


class _Found(NamedTuple):
    """A state in the memory of shared snapshots.

    Attributes
    ----------
    number, step, nbytes : int
        Which of all that were kept, of which step, and the bytes of its plain values.
    at : int
        Where it lies.
    """

    number: int
    step: int
    nbytes: int
    at: int

    def holds(self, memory: mmap.mmap) -> bool:
        """Whether it still lies there."""
        return bool(_HEAD.unpack_from(memory, self.at)[0] == self.number)


def _find(memory: mmap.mmap, fits: Callable[[int], bool]) -> _Found | None:
    """The newest state in a memory whose step fits."""
    _, places, size, _ = _TITLE.unpack_from(memory)
    written = [_Found._make((*_HEAD.unpack_from(memory, at), at)) for at in range(_LINE, _LINE + places * size, size)]
    heads = sorted((head for head in written if head.number), reverse=True)
    # What was kept before, of the same step or a later one, was undone.
    counting = [head for place, head in enumerate(heads) if all(head.step < newer.step for newer in heads[:place])]
    return next((head for head in counting if fits(head.step)), None)


def _state_at(memory: mmap.mmap, found: _Found) -> State:
    """A state as it lies in a memory, uncopied."""
    plain_room = _TITLE.unpack_from(memory)[3]

    def tensor_of(hole: _Hole) -> Tensor:
        count = torch.Size(hole.shape).numel()
        if not count:
            return torch.empty(hole.shape, dtype=hole.dtype)
        start = _first_tensor(found.at, plain_room) + hole.offset
        return torch.frombuffer(memory, dtype=hole.dtype, count=count, offset=start).view(hole.shape)

    plain = memory[found.at + _LINE : found.at + _LINE + found.nbytes]
    state: State = _filled(pickle.loads(plain), tensor_of)
    return state


def _newest(memory: mmap.mmap, fits: Callable[[int], bool]) -> State | None:
    """A copy of the newest state in a memory whose step fits; only while nobody writes."""
    found = _find(memory, fits)
    return None if found is None else copy_state(_state_at(memory, found))


def _end(tensors: list[tuple[int, Tensor]]) -> int:
    if not tensors:
        return 0
    offset, last = tensors[-1]
    return _rounded(offset + last.numel() * last.element_size())


def _place_size(plain: int, tensors: int) -> int:
    return _first_tensor(0, plain) + tensors


def _first_tensor(at: int, plain: int) -> int:
    return at + _rounded(_LINE + plain)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE
