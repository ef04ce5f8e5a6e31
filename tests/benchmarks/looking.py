"""What the check of a run costs: steps that are now and then computed as one share and as several, against none.

Two runs of each workload on two workers each, one with the check and one without, take turns in a random order; the
ratio is that of steps in one repeat. What the first fifty steps take more, where looks come often, is told by
itself: it is in the first seconds of a run, and does not grow with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from torch.nn import functional as F

import parakit as pk
from parakit.events.records import StepDone
from parakit.runs.planning import plan
from parakit.scaling.experiments.arms import ResizedRun
from tests.benchmarks.reports import Pace, Report, run, significant, spread
from tests.benchmarks.workloads import WORKLOADS, Workload, optimizer

WINDOW_SECONDS, QUICK_WINDOW_SECONDS = 1.6, 0.6
EARLY = 50


def measure(pace: Pace) -> Iterator[Report]:
    heads = ["workload", "ms a step", "with the check, %", f"first {EARLY} steps, ms more"]
    rows, figures = [], {}
    window = pace.choose(WINDOW_SECONDS, QUICK_WINDOW_SECONDS)
    with pk.connect(2) as one, pk.connect(2) as other:
        for workload in WORKLOADS:
            print(f"{workload.name} ...", flush=True)
            found = _turns(workload, {"on": one, "off": other}, window, 3 * pace.repeats)
            more = [100 * (on / off - 1) for on, off in zip(found["on"], found["off"], strict=True)]
            early = [
                _early(workload, one, check=True) - _early(workload, one, check=False) for _ in range(pace.repeats)
            ]
            figures[workload.name] = {"more": more, "early": early}
            rows.append([workload.name, spread([1e3 * s for s in found["off"]]), spread(more), spread(early)])
    middle = significant(float(np.median([np.median(found["more"]) for found in figures.values()])), 2)
    yield Report(
        "looking", "What the check of a run costs", heads, rows,
        [f"Windows of {window:g} s, after the first steps; {middle} % in the middle. Below 0 is noise."],
        figures,
    )  # fmt: skip


def _turns(workload: Workload, pools: dict[str, pk.Workers], window: float, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step, with and without, in the order of repeats."""
    generator = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        rigs = {}
        for name, pool in pools.items():
            made = plan(
                workload.model(), workload.data(), on=pool, workers=2, optimizer=optimizer, loss=_loss,
                batch_size=workload.batch_size, steps=10**9, check=name == "on",
            )  # fmt: skip
            rigs[name] = ResizedRun(made, pool)
            stack.callback(rigs[name].close)
            _step_seconds(rigs[name], 2 * window)
        found: dict[str, list[float]] = {name: [] for name in rigs}
        for _ in range(repeats):
            for name in generator.permutation(list(rigs)).tolist():
                found[name].append(_step_seconds(rigs[name], window))
        return found


def _loss(output, target):  # type: ignore[no-untyped-def]  # as a user writes it: nothing is known of it
    return F.cross_entropy(output, target)


def _step_seconds(rig: ResizedRun, window: float) -> float:
    timed = rig.visit(2, window)
    rig.rest()
    return timed.seconds / sum(segment.steps for segment in timed.segments)


def _early(workload: Workload, pool: pk.Workers, *, check: bool) -> float:
    """Milliseconds of the first steps of a run."""
    done = pk.train(
        workload.model(), workload.data(), on=pool, workers=2, optimizer=optimizer, loss=_loss,
        batch_size=workload.batch_size, steps=EARLY, check=check,
    ).wait(120, progress=False)  # fmt: skip
    return 1e3 * sum(step.seconds for step in done.history.of(StepDone))


if __name__ == "__main__":
    run(__doc__, measure)
