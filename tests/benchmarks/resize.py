"""Time of a resize within the pool: from `run.resize(n)` to the first finished step at the new size.

Run with ``python -m tests.benchmarks.resize``. Prints a table; asserts nothing.
"""

from __future__ import annotations

import itertools
import platform
import time

import numpy as np
import torch
from torch import nn

import parakit as pk
from parakit.events import Asked, Resized, SegmentDone
from parakit.machine import usable_cores

CHANGES = 20
COURSE = (2, 4, 3, 1)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with pk.connect(4) as workers:
        run = pk.train(model, pk.datasets.digits().train, on=workers, workers=1, steps=1_000_000)
        _await(lambda: run.step > 0)
        for size in itertools.islice(itertools.cycle(COURSE), CHANGES):
            run.resize(size)
            _await(lambda size=size: run.history.steps[-1].world_size == size)
            time.sleep(0.2)
        run.stop()
        run.wait(60, progress=False)
    _report(run)


def _await(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError("the resize did not take effect")
        time.sleep(0.002)


def _report(run: pk.Run) -> None:
    history = run.history
    asked = [event for event in history.of(Asked) if event.wish == "resize"]
    formed = history.of(Resized)[1:]
    rows = []
    for wish, event in zip(asked, formed, strict=True):
        first = next(step for step in history.steps if step.generation == event.generation)
        rows.append((wish.value, first.at_seconds - wish.at_seconds, event.seconds, event.chunks_moved))
    print(f"{platform.processor() or platform.machine()}, {usable_cores()} cores; {CHANGES} changes on 4 processes\n")
    print("to workers   wish to first step / s   standing still / s   chunks moved (of 64)")
    for size in COURSE:
        mine = [row for row in rows if row[0] == size]
        print(
            f"{size:10}   {_spread([r[1] for r in mine]):>22}   {_spread([r[2] for r in mine]):>18}   "
            f"{sorted({r[3] for r in mine})}"
        )
    print(f"{'all':>10}   {_spread([r[1] for r in rows]):>22}   {_spread([r[2] for r in rows]):>18}")
    segments = history.of(SegmentDone)
    control = [s.control_seconds for s in segments]
    print(f"\ncontrol per segment / s: {_spread(control)} over {len(segments)} segments")


def _spread(values: list[float]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
