"""The order of the visits of a sweep: each block visits everything once, in an order that is drawn anew.

Owns the visits and their order; refuses to make them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from parakit.events.records import baseline_name
from parakit.formatting import many

__all__ = ["Visit", "visits"]


@dataclass(frozen=True, slots=True)
class Visit:
    """A place in the order of visits: a worker count, or plain PyTorch with some threads (and no workers)."""

    block: int
    workers: int
    threads: int = 0

    def __str__(self) -> str:
        return many(self.workers, "worker") if self.workers else baseline_name(self.threads)


def visits(counts: Iterable[int], rivals: Iterable[int], repeats: int, seed: int) -> list[Visit]:
    """The order of visits: in each block every count and every rival once, in an order of its own.

    Parameters
    ----------
    counts : iterable of int
        Numbers of workers.
    rivals : iterable of int
        Threads of plain PyTorch.
    repeats : int
        Blocks.
    seed : int
    """
    generator = np.random.default_rng(seed)
    places = [*((count, 0) for count in counts), *((0, threads) for threads in rivals)]
    return [
        Visit(block, *places[place])
        for block in range(repeats)
        for place in generator.permutation(len(places)).tolist()
    ]  # fmt: skip
