"""Time of a resize within the pool: from `run.resize(n)` to the first finished step at the new size."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

import parakit as pk
from parakit.events.records import Requested, Resized
from tests.benchmarks.reports import Pace, Report, run, spread, until

CHANGES, QUICK_CHANGES = 20, 8
COURSE = (2, 4, 3, 1)


@dataclass(frozen=True)
class Change:
    """A resize: to which size, how long it took, how long the run stood still, and how many chunks moved."""

    size: int
    request_to_step_seconds: float
    still_seconds: float
    chunks_moved: int


def changes(count: int) -> list[Change]:
    """Resize a run so many times, on four processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with pk.connect(4) as workers:
        going = pk.train(model, pk.datasets.digits().train, on=workers, workers=1, steps=10**9)
        until(lambda: going.step > 0)
        for size in itertools.islice(itertools.cycle(COURSE), count):
            going.resize(size)
            until(lambda size=size: going.history.steps[-1].world_size == size)
            time.sleep(0.2)
        going.stop()
        going.wait(60, progress=False)
    return list(_told(going.history))


def _told(history: pk.History) -> Iterator[Change]:
    asked = [event for event in history.of(Requested) if event.request == "resize"]
    for request, event in zip(asked, history.of(Resized)[1:], strict=True):
        first = next(step for step in history.steps if step.generation == event.generation)
        assert request.value is not None
        yield Change(int(request.value), first.at_seconds - request.at_seconds, event.seconds, event.chunks_moved)


def measure(pace: Pace) -> Iterator[Report]:
    found = changes(pace.choose(CHANGES, QUICK_CHANGES))
    rows = []
    for name, mine in [*((str(n), [c for c in found if c.size == n]) for n in COURSE), ("all", found)]:
        moved = ", ".join(map(str, sorted({change.chunks_moved for change in mine})))
        took = spread([change.request_to_step_seconds for change in mine])
        rows.append([name, took, spread([change.still_seconds for change in mine]), moved])
    heads = ["to workers", "request to first step, s", "standing still, s", "chunks moved, of 64"]
    yield Report("resize", f"{len(found)} changes of a run on 4 processes", heads, rows)


if __name__ == "__main__":
    run(__doc__, measure)
