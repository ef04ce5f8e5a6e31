"""Time of an all-reduce on one host: memory that the workers share, against gloo over loopback.

The ways take turns within each repeat, so that a noisy neighbour hits all of them, and a ratio is the median of those
within the repeats. Vectors are float32; "in place" ones lie in the group's memory, as gradients can.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from parakit.collectives.gloo import GlooGroup
from parakit.collectives.shared_memory import SharedMemoryGroup
from tests.benchmarks.reports import Pace, Report, median, run, significant, spread
from tests.members import FolderStore, Member, ask, members

QUICK_SIZES = (1_000, 2_000_000, 16_000_000)
SIZES = (1_000, 30_000, 250_000, 2_000_000, 16_000_000, 100_000_000)  # bytes
WORKERS = (2, 4)
WAYS = ("gloo", "shared", "in place")
ROUND_SECONDS = 0.1  # of one measurement, which repeats the operation
LIMIT_SECONDS = 60.0


def measure(pace: Pace) -> Iterator[Report]:
    heads = ["workers", "bytes", *(f"{way}, ms" for way in WAYS), "gloo/shared", "gloo/in place"]
    rows, figures = [], []
    for size in pace.choose(WORKERS, WORKERS[:1]):
        with members(size) as team:
            for nbytes in pace.choose(SIZES, QUICK_SIZES):
                found = _measure(team, nbytes, pace.repeats)
                figures.append([size, nbytes, {way: median(times) for way, times in found.items()}])
                ratios = [significant(median(np.array(found["gloo"]) / np.array(found[way])), 2) for way in WAYS[1:]]
                rows.append([str(size), f"{nbytes:,}", *(spread(found[way]) for way in WAYS), *ratios])
    yield Report("all_reduce", "Time of an all-reduce, float32, 1 thread a worker", heads, rows, [], {"cases": figures})


def _measure(team: list[Member], nbytes: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of an operation, by way, in the order of repeats."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for answer in ask(team, form, len(team), folder, nbytes):
            assert answer.good
        counts = {way: max(1, round(ROUND_SECONDS / _seconds(team, way, 2))) for way in WAYS}
        for turn in range(repeats):
            for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
                found[way].append(1e3 * _seconds(team, way, counts[way]))
        ask(team, leave)
    return found


def _seconds(team: list[Member], way: str, count: int) -> float:
    return max(answer.good for answer in ask(team, take, way, count))


def form(kept: dict[str, Any], rank: int, size: int, folder: str, nbytes: int) -> bool:
    store = FolderStore(folder)
    gloo = GlooGroup(store, rank, size, "127.0.0.1", LIMIT_SECONDS)
    shared = SharedMemoryGroup(store, rank, size, limit_seconds=LIMIT_SECONDS, capacity=nbytes)
    vector = torch.rand(nbytes // 4)
    kept["gloo"], kept["shared"] = (gloo, vector), (shared, vector)
    kept["in place"] = shared, shared.buffer(nbytes // 4, torch.float32)
    return True


def take(kept: dict[str, Any], _: int, way: str, count: int) -> float:
    """Seconds of an operation."""
    group, vector = kept[way]
    vector.zero_()
    group.all_reduce(torch.zeros(1))  # all begin together
    began = time.perf_counter()
    for _ in range(count):
        group.all_reduce(vector)
    return (time.perf_counter() - began) / count


def leave(kept: dict[str, Any], _: int) -> None:
    for way in WAYS:
        kept.pop(way)[0].close()


if __name__ == "__main__":
    run(__doc__, measure)
