"""Time of an all-reduce on one host: memory that the workers share, against gloo over loopback.

Run with ``python -m tests.benchmarks.all_reduce``; ``--help`` says how to shorten it. Prints a table; asserts nothing.
The ways take turns within each repeat, so that a noisy neighbour hits all of them, and a ratio is the median of those
within the repeats. Vectors are float32; "in place" ones lie in the group's memory, as gradients can.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from typing import Any

import numpy as np
import torch

from parakit.machine import usable_cores
from parakit.workers.group import Group
from parakit.workers.shared import SharedGroup
from tests.members import FolderBoard, Member, ask, members

SIZES = (1_000, 30_000, 250_000, 2_000_000, 16_000_000, 100_000_000)  # bytes
WORKERS = (2, 4)
WAYS = ("gloo", "shared", "in place")
ROUND_SECONDS = 0.1  # of one measurement, which repeats the operation
LIMIT_SECONDS = 60.0


def main() -> None:
    options = _options()
    print(f"{_machine()}; torch {torch.__version__}, 1 thread a worker; {options.repeats} repeats, in ms\n")
    print(f"workers {'bytes':>11}" + "".join(f"   {way + ': median (quartiles)':>32}" for way in WAYS), end="")
    print("   gloo/shared   gloo/in place")
    for size in options.workers:
        with members(size) as team:
            for nbytes in options.sizes:
                _report(size, nbytes, _measure(team, nbytes, options.repeats))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of a vector")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


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
    board = FolderBoard(folder)
    gloo = Group(board, rank, size, "127.0.0.1", LIMIT_SECONDS)
    shared = SharedGroup(board, rank, size, limit_seconds=LIMIT_SECONDS, capacity=nbytes)
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


def _report(size: int, nbytes: int, found: dict[str, list[float]]) -> None:
    gloo = np.array(found["gloo"])
    spreads = "".join(f"   {_spread(found[way]):>32}" for way in WAYS)
    ratios = [float(np.median(gloo / np.array(found[way]))) for way in WAYS[1:]]
    print(f"{size:7} {nbytes:11,}{spreads}   {ratios[0]:11.1f}   {ratios[1]:13.1f}", flush=True)


def _spread(values: list[float]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _machine() -> str:
    return f"{platform.processor() or platform.machine()}, {usable_cores()} cores, {platform.system()}"


if __name__ == "__main__":
    main()
