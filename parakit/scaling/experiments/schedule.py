"""The schedule of an experiment: what is visited, in which order, how often and for how long, and what is too much.

Owns the checks of what a sweep is asked for, before anything is started; refuses to measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from parakit.data.samples import Samples
from parakit.errors import InputError, WorkerCountError
from parakit.events.records import baseline_name
from parakit.formatting import many
from parakit.validation import brief, check_positive, check_whole, plain
from parakit.workers.pool import Workers

__all__ = ["AROUND_SECONDS", "Count", "blocks", "check_extent", "rows_of_a_worker", "usual_counts", "wanted_counts"]

#: Of a visit that go into its warm-up and the change to it, beside what is timed.
AROUND_SECONDS = 0.6

_DEFAULT_BATCH = 256
_AT_LEAST = 4  # workers that virtual ones are taken to be, where nobody says how many
_MOST_COUNT = 100_000
_MOST_COUNTS = 1000
_MOST_REPEATS = 10_000
_MOST_HOURS = 24.0  # longer is a mistake, or worth several sweeps that are kept one by one

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Count:
    """What a sweep visits: a worker count, or plain PyTorch (no workers), with some threads in each process."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return many(self.workers, "worker") if self.workers else baseline_name(self.threads)


def blocks(places: Sequence[T], repeats: int, seed: int) -> Iterator[tuple[int, T]]:
    """The order of visits: each block, counted from 0, has every place once, in an order that is drawn anew."""
    generator = np.random.default_rng(seed)
    for block in range(repeats):
        for place in generator.permutation(len(places)).tolist():
            yield block, places[place]


def usual_counts(pool: Workers) -> list[int]:
    """Powers of two up to what a pool has, or four if it can; and all that it has."""
    most = max(pool.size, min(_AT_LEAST, pool.most))
    return sorted({most, *(2**power for power in range(most.bit_length()))})


def wanted_counts(workers: Any) -> tuple[int, ...]:
    """The worker counts to measure, ascending, with one among them.

    Raises
    ------
    WorkerCountError
        If there are none, or more than a thousand, or one of them cannot be, or is there twice.
    """
    given = [workers] if isinstance(plain(workers), int) else workers
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
        raise WorkerCountError(f"workers is {brief(workers)}; it must be a list of worker counts, such as [1, 2, 4].")
    # No further than that: a generator may never end.
    counts = [plain(count) for count in islice(given, _MOST_COUNTS + 1)]
    if not counts:
        raise WorkerCountError("workers is empty: there is nothing to measure.", remedy="such as workers=[1, 2, 4]")
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_COUNT:
            raise WorkerCountError(
                f"workers has {brief(count)}; each must be a whole number from 1 to {_MOST_COUNT:,}.",
                remedy="such as workers=[1, 2, 4]",
            )
    if len(set(counts)) < len(counts):
        twice = sorted({count for count in counts if counts.count(count) > 1})
        raise WorkerCountError(
            f"workers has {brief(twice)[1:-1]} more than once.", remedy="for more repeats of each: repeats=..."
        )
    if len(counts) > _MOST_COUNTS:
        raise WorkerCountError(
            f"workers has more than {_MOST_COUNTS:,} counts.",
            cause="a range to its end, or a generator that never ends",
            remedy="powers of two tell as much: workers=[1, 2, 4, 8]",
        )
    return tuple(sorted({1, *counts}))


def check_extent(counts: int, repeats: Any, seconds: Any) -> None:
    """Refuse a sweep of so many worker counts that would take longer than anybody waits for.

    Raises
    ------
    InputError
        If a number cannot be, or all of them together come to more than a day.
    """
    check_whole("repeats", repeats, 1)
    check_positive("seconds", seconds)
    if repeats > _MOST_REPEATS:
        raise InputError(f"repeats is {brief(repeats)}; the most is {_MOST_REPEATS:,}.", remedy="5 to 20 are usual")
    hours = counts * repeats * (seconds + AROUND_SECONDS) / 3600
    if hours > _MOST_HOURS:
        raise InputError(
            f"{counts} worker counts, {repeats:,} repeats and {seconds:g} seconds each make a sweep of at least "
            f"{hours:,.4g} hours; the most is {_MOST_HOURS:g}.",
            remedy="fewer repeats, or less of seconds=, which is the time of one visit; 0.5 is usual",
        )


def rows_of_a_worker(batch_size: int | None, samples: Any, most: int) -> int:
    """Rows in a worker's batch, for weak scaling, where there are to be enough for the largest count."""
    check_whole("batch_size", batch_size, 1, none=True)
    if batch_size is not None:
        return batch_size
    rows = len(samples) if isinstance(samples, Samples) else _DEFAULT_BATCH
    return max(1, min(_DEFAULT_BATCH, rows // most))
