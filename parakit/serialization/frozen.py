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

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.serialization.local_code import by_value
from parakit.serialization.memory import (
    Living,
    Mapped,
    Memory,
    Part,
    Sent,
    settle,
)
from parakit.serialization.pickler import (
    Limited,
    LocalPickler,
    Pickler,
    TooLarge,
    Unpickler,
)
from parakit.serialization.ties import Ties
from parakit.system.shared_memory import SharedMemoryKey

__all__ = ["Frozen", "Memory", "TooLarge", "freeze"]


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
        return Unpickler(code, self.parts, self.memory.open(), known, live).load()

    def at_rest(self) -> Frozen:
        """The same in memory of its own; where the system has such, in memory that others of this machine can map."""
        assert self.memory is not None
        if not isinstance(self.memory, Living):
            return self
        return Frozen(self.code, self.parts, settle(self.parts, self.memory), self.ties, self.here)

    def within(self, memory: SharedMemoryKey | npt.NDArray[np.uint8]) -> Frozen:
        """The same, whose bytes came from elsewhere: by a key, or as what `Memory.array` gave.

        Raises
        ------
        CannotShare
            If memory of that key is out of reach.
        """
        if isinstance(memory, SharedMemoryKey):
            return Frozen(self.code, self.parts, Mapped(memory, self.parts), self.ties)
        return Frozen(self.code, self.parts, Sent(memory, self.parts), self.ties)

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
    file = io.BytesIO() if most is None else Limited(most)
    pickler = Pickler(file, known)
    with by_value():
        pickler.dump(value)
        here = None if own is None else _local(value, known, own, pickler)
    parts, living = pickler.storages.found()
    if most is not None and sum(part.nbytes for part in parts) > most:
        raise TooLarge
    return Frozen(file.getvalue(), parts, living, pickler.storages.ties, here)


def _local(value: Any, known: Sequence[Any], own: Sequence[Any], travelled: Pickler) -> Local:
    ties = Ties(own)
    knowing = {kind for kind in travelled.classes if ties.known_to(kind)}
    bound = bool(knowing) or any(map(ties.known_to, travelled.functions))
    file = io.BytesIO()
    pickler = LocalPickler(file, known, travelled.storages, bound=bound, knowing=knowing)
    pickler.dump(value)
    return Local(file.getvalue(), tuple(pickler.live))
