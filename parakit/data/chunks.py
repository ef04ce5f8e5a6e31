"""Chunks are virtual workers: cutting, ownership, epoch order and resharding.

The data is cut once into C chunks; C is fixed for a run, workers are not. What a step computes is fixed by
(seed, epoch, step) alone, so the mathematics of a run does not know how many workers there are. This module is pure:
numpy only, no processes. It refuses to know what a sample is; it deals in row numbers.

References
----------
Or, Zhang, Freedman: "VirtualFlow: Decoupling Deep Learning Models from the Underlying Hardware", MLSys 2022.
The interleaving is the apportionment of Webster and Sainte-Laguë: row i of a chunk of s rows is due at (i + 1/2) / s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.errors import DataError, WorkerCountError

__all__ = [
    "DEFAULT_CHUNKS",
    "ORDER",
    "EpochOrder",
    "chunk_count",
    "cut",
]

Rows = npt.NDArray[np.int64]

DEFAULT_CHUNKS = 64
#: Changes whenever a seed comes to mean another order of rows.
ORDER = 2
_CUT_STREAM = 0  # separates the generator of the cut from those of the epochs
_EPOCH_STREAM = 1
_SMALL_ROWS = 1024  # of a chunk that is shuffled together with the others
_ROWS_AT_ONCE = 1 << 14
# A chunk moves for balance only across a gap of this many times its size; less would move chunks for nothing.
_WORTH_MOVING = 1.25


def chunk_count(samples: int, batch_size: int, wanted: int = DEFAULT_CHUNKS) -> int:
    """Number of chunks: as wanted, but never more than samples, nor than rows in a batch.

    Parameters
    ----------
    samples, batch_size : int
        Rows in the data, and in one global batch.
    wanted : int
        The most chunks to cut.

    Returns
    -------
    int
        At least 1.
    """
    return max(1, min(wanted, samples, batch_size))


def cut(samples: int, chunks: int, seed: int) -> list[Rows]:
    """Shuffle the rows once and cut them into chunks whose sizes differ by at most one.

    Parameters
    ----------
    samples, chunks : int
        Rows to cut, and the number of pieces.
    seed : int
        Fixes the shuffle.

    Returns
    -------
    list of int64 arrays
        The row numbers of each chunk; together every row exactly once.
    """
    shuffled = np.random.default_rng([seed, _CUT_STREAM]).permutation(samples)
    return list(np.array_split(shuffled, chunks))


@dataclass(frozen=True)
class EpochOrder:
    """Which rows of which chunk make up each global batch.

    Every batch takes its share of every chunk; within an epoch each row comes exactly once, none padded, none
    dropped. A worker can therefore compute its own rows of any step without talking to anybody.

    Parameters
    ----------
    sizes : tuple of int
        Rows in each chunk.
    batch_size : int
        Rows in a global batch; the last one of an epoch may be smaller.
    seed : int
        Fixes the order of rows within each chunk, epoch by epoch.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise DataError(f"Every chunk needs at least one row; the sizes are {self.sizes}.")
        if self.batch_size < 1:
            raise DataError(f"A batch needs at least one row; the batch size is {self.batch_size}.")

    @property
    def samples(self) -> int:
        """Rows in one epoch."""
        return sum(self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch, the last partial one included."""
        return -(-self.samples // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step, counted from the start of the run, belongs to."""
        return step // self.steps_per_epoch

    def batch_rows(self, step: int) -> int:
        """Rows in the global batch of a step."""
        first = (step % self.steps_per_epoch) * self.batch_size
        return min(self.batch_size, self.samples - first)

    @cached_property
    def boundaries(self) -> Rows:
        """How many rows of each chunk come before each batch.

        Returns
        -------
        int64 array, (steps_per_epoch + 1, chunks)
            Row t counts what batches 0 to t - 1 have taken; the last row is the sizes.
        """
        sizes = np.asarray(self.sizes)
        ends = np.minimum(np.arange(self.steps_per_epoch + 1) * self.batch_size, self.samples)
        due = np.sort(np.concatenate([_due(np.arange(size), size) for size in self.sizes]))
        # Row number `end` in the merged order is the first one a batch ending there must not take.
        threshold = np.append(due, np.inf)[ends][:, None]
        before = _rows_due_before(threshold, sizes)
        # Ties on the threshold go to the chunks in their order until the batch is full.
        tied = (_due(before, sizes) == threshold) & (before < sizes)
        missing = ends[:, None] - before.sum(axis=1, keepdims=True)
        boundaries: Rows = before + (tied & (np.cumsum(tied, axis=1) <= missing))
        return boundaries

    def permutation(self, epoch: int, chunk: int) -> Rows:
        """The order in which an epoch visits the rows of a chunk."""
        return next(self._permutations(epoch, [chunk]))

    def _permutations(self, epoch: int, chunks: Sequence[int]) -> Iterator[Rows]:
        """The same of several chunks, ascending.

        To make a generator takes as long as to shuffle a thousand rows. Small chunks share one, which shuffles those
        that nobody asked for as well, up to the last that somebody did.
        """
        stream = [self.seed, _EPOCH_STREAM, epoch]
        if max(self.sizes) > _SMALL_ROWS:
            for chunk in chunks:
                yield np.random.default_rng([*stream, chunk]).permutation(self.sizes[chunk])
            return
        generator, shuffled = np.random.default_rng(stream), -1
        for chunk in chunks:
            while shuffled < chunk:
                shuffled += 1
                rows = generator.permutation(self.sizes[shuffled])
            yield rows

    def rows(self, step: int, chunk: int) -> Rows:
        """Rows of a chunk that belong to the batch of a step.

        Parameters
        ----------
        step : int
            Counted from the start of the run.
        chunk : int
            Which chunk.

        Returns
        -------
        int64 array
            Row numbers within the chunk; empty where the batch takes none of it.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        first, end = self.boundaries[batch : batch + 2, chunk]
        return self.permutation(epoch, chunk)[first:end]

    def epoch_rows(self, epoch: int, chunks: Sequence[int]) -> tuple[Rows, Rows]:
        """All rows that the holder of some chunks visits in an epoch, batch after batch.

        Parameters
        ----------
        epoch : int
            Which epoch.
        chunks : sequence of int
            The chunks held, ascending, laid end to end.

        Returns
        -------
        rows : int64 array
            Row numbers into the chunks laid end to end, in the order of the batches.
        ends : int64 array, (steps_per_epoch + 1,)
            Batch t has ``rows[ends[t]:ends[t + 1]]``.
        """
        chosen = list(chunks)
        if not chosen:
            return np.zeros(0, np.int64), np.zeros(self.steps_per_epoch + 1, np.int64)
        boundaries = self.boundaries[:, chosen]
        counts = np.diff(boundaries, axis=0)
        ends = boundaries.sum(axis=1)
        within = np.cumsum(counts, axis=1) - counts  # what earlier chunks take of the same batch
        starts = ends[:-1, None] + within - boundaries[:-1]
        sizes = boundaries[-1]
        bases = np.cumsum(sizes) - sizes
        rows = np.empty(ends[-1], np.int64)
        # Some chunks at once: numpy's calls take as long as a small chunk's rows, and memory is for many.
        at_once = max(1, _ROWS_AT_ONCE // max(self.sizes))
        shuffled = self._permutations(epoch, chosen)
        for first in range(0, len(chosen), at_once):
            some = slice(first, first + at_once)
            base = np.repeat(bases[some], sizes[some])
            place = np.arange(len(base)) - base + bases[first]  # the place of a row in its chunk
            place += np.repeat(starts[:, some].T.ravel(), counts[:, some].T.ravel())
            rows[place] = np.concatenate(list(islice(shuffled, at_once))) + base
        return rows, ends


def _due(row: npt.NDArray[Any], size: npt.NDArray[Any] | int) -> npt.NDArray[np.float64]:
    """The moment of an epoch, from 0 to 1, at which a row of a chunk is due."""
    return np.asarray((2 * row + 1) / (2 * size), dtype=np.float64)


def _rows_due_before(threshold: npt.NDArray[np.float64], sizes: Rows) -> Rows:
    """How many rows of each chunk are due strictly before the threshold, exactly as `_due` rounds."""
    ceiling = np.where(np.isinf(threshold), 1.0, threshold)
    guess = np.clip(np.floor(ceiling * sizes + 0.5).astype(np.int64), 0, sizes)
    # The guess is at most one off, since both sides round the same quotient.
    guess -= (guess > 0) & (_due(guess - 1, sizes) >= threshold)
    guess += (guess < sizes) & (_due(guess, sizes) < threshold)
    counts: Rows = guess
    return counts


def check_chunks(workers: int, chunks: int) -> None:
    """Refuse more workers than chunks."""
    if workers > chunks:
        raise WorkerCountError(
            f"{workers} workers cannot share {chunks} chunks: each worker needs at least one.",
            cause="a small batch or little data, which are cut into fewer chunks",
            remedy=f"ask for at most {chunks} workers, or train with a larger batch_size or chunks=",
        )
