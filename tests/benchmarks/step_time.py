"""Time of a training step: parakit in two layouts, plain PyTorch and DDP, on four workloads.

parakit runs as two processes of one thread, and as one process that has all cores; `parakit.advise` tells a user which
is the faster one, and over that the ratios are.
Plain PyTorch runs in fresh processes of the usual environment, with one thread and with all cores; DDP runs under
torchrun, two processes of one thread, over gloo. Both run once more with glibc's malloc told to keep freed memory, as
parakit tells its workers. All take turns, in a random order in each repeat; who is not timed sleeps. A time is that of
a window of about a second, after a warm-up; parakit's is that of whole segments, control included. A ratio is the
median of those within the repeats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

import parakit as pk
from parakit.runs.planning import plan
from parakit.scaling.experiments.arms import ResizedRun
from parakit.system.cores import usable_cores
from tests.benchmarks.reports import Pace, Report, median, run, spread
from tests.benchmarks.rivals import rival
from tests.benchmarks.workloads import WORKLOADS, Workload, optimizer

PARAKIT = "parakit, 2 processes"
PARAKIT_ALONE = f"parakit, 1 process of {usable_cores()} threads"
WINDOW_SECONDS, QUICK_WINDOW_SECONDS = 1.6, 0.4
QUICK = (1, 2)  # places of the workloads

Way = Callable[[float], float]


def measure(pace: Pace) -> Iterator[Report]:
    heads = ["workload", "way", "ms a step", "time over parakit's"]
    rows, figures = [], {}
    with pk.connect(2) as workers, pk.connect(1) as single:
        for place in pace.choose(range(len(WORKLOADS)), QUICK):
            name = WORKLOADS[place].name
            print(f"{name} ...", flush=True)  # the table comes at the end, minutes later
            found = turns(place, workers, single, pace)
            figures[name] = found
            rows += [
                [name, way, spread(times), spread(ratios(found, way)) if way != best(found) else "1"]
                for way, times in found.items()
            ]
    window = pace.choose(WINDOW_SECONDS, QUICK_WINDOW_SECONDS)
    remarks = [
        f"Windows of {window:g} s; ratios over the faster of parakit's layouts: above 1, parakit is faster.",
        "Tuned: malloc keeps freed memory, as in parakit's workers; otherwise, the usual environment.",
    ]
    yield Report("step_time", "Time of a training step", heads, rows, remarks, figures)


def ratios(found: dict[str, list[float]], way: str) -> list[float]:
    """Times of one way over those of the faster of parakit's layouts, repeat by repeat."""
    return (np.array(found[way]) / np.array(found[best(found)])).tolist()


def best(found: dict[str, list[float]]) -> str:
    """The faster of parakit's layouts."""
    return min((way for way in (PARAKIT, PARAKIT_ALONE) if way in found), key=lambda way: median(found[way]))


def turns(place: int, workers: pk.Workers, single: pk.Workers, pace: Pace) -> dict[str, list[float]]:
    """Milliseconds of a step by way, in the order of repeats."""
    window = pace.choose(WINDOW_SECONDS, QUICK_WINDOW_SECONDS)
    generator = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        ways = {
            PARAKIT: stack.enter_context(parakit(WORKLOADS[place], workers, 2, 1)),
            PARAKIT_ALONE: stack.enter_context(parakit(WORKLOADS[place], single, 1, usable_cores())),
        }
        for tuned in (False, True):
            also = ", tuned" if tuned else ""
            for threads in sorted({1, usable_cores()}):
                opened = stack.enter_context(rival("plain", place, threads, tuned=tuned))
                ways[f"plain, {threads} thread{'s' * (threads > 1)}{also}"] = opened.step_seconds
            ways[f"DDP, 2 processes{also}"] = stack.enter_context(rival("ddp", place, 1, tuned=tuned)).step_seconds
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(pace.repeats):
            for way in generator.permutation(list(ways)).tolist():
                found[way].append(1e3 * ways[way](window))
    return found


@contextlib.contextmanager
def parakit(workload: Workload, workers: pk.Workers, count: int, threads: int) -> Iterator[Way]:
    """A run on some workers, which goes on for as long as it is timed."""
    made = plan(
        workload.model(), workload.data(), on=workers, workers=count, threads=threads, optimizer=optimizer,
        batch_size=workload.batch_size, steps=10**9,
    )  # fmt: skip
    rig = ResizedRun(made, workers)

    def step_seconds(window: float) -> float:
        timed = rig.visit(count, window)
        rig.rest()
        return timed.seconds / sum(segment.steps for segment in timed.segments)

    step_seconds(0.1)
    try:
        yield step_seconds
    finally:
        rig.close()


def summary(report: Report) -> Report:
    """A row a workload: milliseconds of parakit's steps, and how many times as long the best of the others takes."""
    rows = []
    for name, found in report.figures.items():
        kinds = {"plain PyTorch": "plain", "DDP": "DDP"}
        cells = []
        for kind in kinds.values():
            for tuned in (False, True):
                ways = [way for way in found if way.startswith(kind) and way.endswith(", tuned") == tuned]
                cells.append(spread(ratios(found, min(ways, key=lambda way: median(found[way])))))
        ours = [spread(found[way]) if way in found else "" for way in (PARAKIT, PARAKIT_ALONE)]
        rows.append([name, *ours, *cells])
    heads = [
        "workload", f"{PARAKIT}, ms", f"{PARAKIT_ALONE}, ms", "plain PyTorch, best", "same, malloc tuned", "DDP",
        "same, malloc tuned",
    ]  # fmt: skip
    return Report("summary", "Times over parakit's", heads, rows, report.remarks, report.figures)


if __name__ == "__main__":
    run(__doc__, measure)
