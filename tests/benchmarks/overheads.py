"""What parakit takes for itself beside the arithmetic: control of segments, events, and an open panel.

As shares of the time in which a perceptron of 4.2 M parameters trains on two workers. The panel is open in a real
Jupyter kernel, without a browser.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

import parakit as pk
from parakit.events.history import History
from parakit.events.records import SegmentDone, StepDone
from tests.benchmarks import panel_overhead
from tests.benchmarks.reports import Pace, Report, run, significant, spread, until
from tests.benchmarks.workloads import WORKLOADS, optimizer

WORKLOAD = WORKLOADS[1]
SECONDS, QUICK_SECONDS = 10.0, 4.0
SETTLE_SECONDS = 2.0
PANEL = "MLP 4.2 M, batch 256"
PANEL_ROUNDS, PANEL_SECONDS = 5, 6.0
EVENTS = 20_000


def measure(pace: Pace) -> Iterator[Report]:
    history = _history(pace)
    segments = history.of(SegmentDone)
    segments = [segment for segment in segments if segment.at_seconds > SETTLE_SECONDS]
    whole = np.array([segment.seconds for segment in segments])
    control = np.array([segment.control_seconds for segment in segments])
    commit = np.array([segment.commit_seconds for segment in segments])
    steps = sum(segment.steps for segment in segments)
    step_ms = 1e3 * whole.sum() / steps
    event_us = [1e6 * _append_seconds(history.steps) for _ in range(pace.repeats)]
    rows = [
        ["a step", f"{significant(step_ms)} ms", "100 %"],
        ["a segment", f"{spread(1e3 * whole)} ms", ""],
        ["control of a segment", f"{spread(1e3 * control)} ms", _share(control.sum() / whole.sum())],
        ["of which the commit", f"{spread(1e3 * commit)} ms", _share(commit.sum() / whole.sum())],
        ["keeping the event of a step", f"{spread(event_us)} µs", _share(np.median(event_us) / 1e3 / step_ms)],
    ]
    works = pace.choose((PANEL,), ())  # its turns are too short to show anything where they are to be quick
    for name, ratios, frames in panel_overhead.overheads(PANEL_ROUNDS, PANEL_SECONDS, works) if works else ():
        loss = [100 * (1 - ratio) for ratio in ratios]
        told = f"{significant(float(np.median(frames)), 2)} frames/s"
        rows.append([f"an open panel, {name}", told, f"{spread(loss)} %"])
    yield Report(
        "overheads", f"What parakit takes for itself: {WORKLOAD.name}, 2 workers", ["", "", "of the time"], rows,
        [f"{len(segments)} segments, {steps} steps. A panel that costs less than nothing shows the noise."],
    )  # fmt: skip


def _share(share: float) -> str:
    return f"{significant(100 * share, 2)} %"


def _history(pace: Pace) -> History:
    with pk.connect(2) as workers:
        going = pk.train(
            WORKLOAD.model(), WORKLOAD.data(), on=workers, optimizer=optimizer, batch_size=WORKLOAD.batch_size,
            steps=10**9,
        )  # fmt: skip
        until(lambda: going.step)
        time.sleep(SETTLE_SECONDS + pace.choose(SECONDS, QUICK_SECONDS))
        going.stop()
        going.wait(60, progress=False)
        return going.history


def _append_seconds(steps: list[StepDone]) -> float:
    """Seconds to keep an event, many times over."""
    history, given = History(), [steps[place % len(steps)] for place in range(EVENTS)]
    began = time.perf_counter()
    for step in given:
        history.append(step)
    return (time.perf_counter() - began) / EVENTS


if __name__ == "__main__":
    run(__doc__, measure)
