"""Where rows come from: memory of the notebook's process, or anything that a worker reads by itself.

A source is a small recipe. Any of its rows can be had again at any time and anywhere, bit for bit: a worker that dies
takes nothing along that another one could not load anew. How rows make up chunks is not its affair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from parakit.data.samples import Samples
from parakit.trees import leaves

__all__ = ["ChunkLoader", "InMemory", "Source", "Unread", "fingerprint_of", "probe", "probed_rows"]

Rows = npt.NDArray[np.int64]
Check = Callable[[Samples, Rows], None]
_PROBED_ROWS = 1024
_SEEN_ROWS = 64


@runtime_checkable
class Source(Protocol):
    """Rows that can be had again at any time; picklable where workers load them.

    Attributes
    ----------
    loaded_by : {"notebook", "worker"}
        Who reads the rows of a chunk: the notebook's process, which sends them, or the worker that owns the chunk.
    """

    @property
    def loaded_by(self) -> Literal["notebook", "worker"]:
        """Who reads the rows of a chunk."""

    def fingerprint(self) -> str:
        """A short mark that differs whenever the rows do: a run is resumed only on data with the same one."""

    def __len__(self) -> int:
        """How many rows there are."""

    def take(self, rows: Any) -> Samples:
        """The rows of the given numbers (int64 array or tensor), in memory of their own."""


@dataclass(frozen=True)
class InMemory:
    """Samples in the memory of the notebook's process."""

    samples: Samples
    loaded_by: Literal["notebook", "worker"] = "notebook"

    def fingerprint(self) -> str:
        """Of forms, and of values of some rows spread over all of them."""
        return fingerprint_of(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: Any) -> Samples:
        """The rows of the given numbers, copied."""
        return self.samples.take(rows)


def fingerprint_of(samples: Samples) -> str:
    """A short mark of samples: forms, and values of some rows spread over all of them."""
    some = samples.take(_spread(len(samples), _SEEN_ROWS))
    mark = hashlib.sha256()
    for leaf in leaves((some.inputs, some.targets)):
        mark.update(f"{list(leaf.shape)} {leaf.dtype}".encode())
        mark.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()[:16]


def probe(source: Source) -> Samples:
    """Rows to try a model on: all that are in memory, else `probed_rows`."""
    return source.samples if isinstance(source, InMemory) else source.take(probed_rows(source))


def probed_rows(source: Source) -> torch.Tensor:
    """Numbers of some rows from everywhere, ascending; int64."""
    return _spread(len(source), _PROBED_ROWS)


def _spread(count: int, most: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, most)).long()


@dataclass(frozen=True)
class Unread:
    """A chunk on its way to the worker that will load it.

    Parameters
    ----------
    source : Source
    rows : int64 array
        That make up the chunk.
    check : callable or None
        Given samples and the numbers of their rows, raises where they cannot be trained on.
    """

    source: Source
    rows: Rows
    check: Check | None = None

    def unpack(self) -> Samples:
        """The rows, loaded here and now."""
        samples = self.source.take(self.rows)
        if self.check is not None:
            self.check(samples, self.rows)
        return samples


@dataclass(frozen=True)
class ChunkLoader:
    """The chunks of some data, each to be had as often as it is lost.

    Parameters
    ----------
    source : Source
    pieces : sequence of int64 arrays or tensors
        The rows of each chunk.
    check : callable or None
        For rows that were not looked at before; see `Unread`.
    """

    source: Source
    pieces: Sequence[Any]
    check: Check | None = None

    def __call__(self, chunk: int) -> Samples:
        """The samples of a chunk, loaded by this process."""
        return self._unread(chunk).unpack()

    def pack(self, chunk: int) -> Samples | Unread:
        """What is sent to the owner of a chunk: its samples, or where it gets them."""
        return self(chunk).pack() if self.source.loaded_by == "notebook" else self._unread(chunk)

    def _unread(self, chunk: int) -> Unread:
        return Unread(self.source, np.asarray(self.pieces[chunk], np.int64), self.check)
