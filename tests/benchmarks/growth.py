"""What costs do as work grows: with workers, samples and parameters; and the memory of each process against its share.

Two workers, unless said otherwise, that compute next to nothing. Start: from `pk.train` to the first finished step.
Memory is Uss (what would be freed if the process ended) and Pss (what it shares, shared out), from
/proc/PID/smaps_rollup; where there is none, as on macOS, it is left out.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

import parakit as pk
from parakit.events.records import SegmentDone
from parakit.runs.planning import plan
from parakit.scaling.experiments.arms import ResizedRun
from tests.benchmarks.reports import Pace, Report, bytes_in_words, median, run, significant, spread, until

COUNTS, QUICK_COUNTS = (1, 2, 4, 8, 16), (1, 2, 4)
SAMPLES, QUICK_SAMPLES = (10**4, 10**5, 10**6, 10**7), (10**4, 10**6)
PARAMETERS, QUICK_PARAMETERS = (10**4, 10**5, 10**6, 10**7, 10**8), (10**4, 10**6, 10**7)
FEATURES = 4
WINDOW_SECONDS = 0.5
MOST_SECONDS = 20.0  # of a case, however slow its steps
LIMIT_SECONDS = 60.0  # for a first step
COPIES = 24  # of the parameters that there must be room for, in all processes together


def measure(pace: Pace) -> Iterator[Report]:
    yield by_workers(pace)
    with pk.connect(2) as workers:
        pk.train(nn.Linear(FEATURES, 2), data(100), on=workers, steps=2).wait(60, progress=False)  # all is imported
        yield by_samples(pace, workers)
        yield by_parameters(pace, workers)
    if smaps(os.getpid()) is not None:
        yield memory(pace)


def data(rows: int, features: int = FEATURES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((rows, features), generator=generator)
    return inputs, torch.randint(2, (rows,), generator=generator)


# --- time


def by_workers(pace: Pace) -> Report:
    """Milliseconds of a step that computes nearly nothing, with more and more workers."""
    counts = pace.choose(COUNTS, QUICK_COUNTS)
    found: dict[int, list[float]] = {count: [] for count in counts}
    control: dict[int, list[float]] = {count: [] for count in counts}
    with pk.connect(counts[-1], timeout=180) as workers:
        made = plan(nn.Linear(FEATURES, 2), data(6400), on=workers, workers=1, batch_size=64, steps=10**9)
        rig = ResizedRun(made, workers)
        for _ in range(pace.repeats):
            for count in counts:
                timed = rig.visit(count, WINDOW_SECONDS)
                found[count].append(1e3 * timed.seconds / sum(segment.steps for segment in timed.segments))
                control[count] += [1e3 * segment.control_seconds for segment in timed.segments]
        rig.close()
    rows = [[str(count), spread(found[count]), spread(control[count])] for count in counts]
    return Report(
        "by_workers", "More workers, on the same cores", ["workers", "ms a step", "ms of control a segment"], rows,
        ["Batch of 64, 10 parameters."], {str(count): median(times) for count, times in found.items()},
    )  # fmt: skip


class Case(NamedTuple):
    """One run: seconds from the call to the first step, of a step, and of a commit."""

    start: float
    step: float
    commit: float


def by_samples(pace: Pace, workers: pk.Workers) -> Report:
    """Start and step with more and more samples."""
    rows = []
    for samples in pace.choose(SAMPLES, QUICK_SAMPLES):
        given = data(samples)
        found = repeated(nn.Linear(FEATURES, 2), given, workers, 256, pace)
        size = bytes_in_words(samples * (4 * FEATURES + 8))
        rows.append([f"{samples:,}", size, *_start_and_step(found)])
    heads = ["samples", "data", "start, s", "ms a step"]
    return Report("by_samples", "More samples, 2 workers", heads, rows, [f"{FEATURES} features, batch of 256."])


def by_parameters(pace: Pace, workers: pk.Workers) -> Report:
    """Start, step and commit with more and more parameters."""
    rows, remarks = [], ["float32, SGD with momentum, one linear layer, batch of 2."]
    for parameters in pace.choose(PARAMETERS, QUICK_PARAMETERS):
        if COPIES * 4 * parameters > 0.8 * psutil.virtual_memory().available:
            remarks.append(f"{parameters:,} left out: this machine has no room for {COPIES} copies of them.")
            continue
        width = parameters // 100
        model = nn.Linear(width, 100, bias=False)
        found = repeated(model, data(8, width), workers, 2, pace)
        rows.append([f"{parameters:,}", bytes_in_words(4 * parameters), *_start_and_step(found),
                     spread([1e3 * case.commit for case in found]) if found else "–"])  # fmt: skip
    heads = ["parameters", "size", "start, s", "ms a step", "ms a commit"]
    return Report("by_parameters", "More parameters, 2 workers", heads, rows, remarks)


def _start_and_step(found: list[Case]) -> list[str]:
    if not found:
        return [f"above {LIMIT_SECONDS:g}", "–"]
    return [spread([case.start for case in found]), spread([1e3 * case.step for case in found])]


def repeated(model: nn.Module, given: Any, workers: pk.Workers, batch_size: int, pace: Pace) -> list[Case]:
    """Some repeats, or one where that takes long; none if there is no step within the limit."""
    found: list[Case] = []
    began = time.perf_counter()
    with contextlib.suppress(TimeoutError):
        while len(found) < pace.choose(3, 2) and time.perf_counter() - began < MOST_SECONDS:
            found.append(timed(model, given, workers, batch_size))
    return found


def timed(model: nn.Module, given: Any, workers: pk.Workers, batch_size: int) -> Case:
    began = time.perf_counter()
    going = pk.train(model, given, on=workers, workers=2, batch_size=batch_size, steps=10**9, optimizer=momentum)
    try:
        until(lambda: going.step, LIMIT_SECONDS)
        start = time.perf_counter() - began
        with contextlib.suppress(TimeoutError):
            until(lambda: _timed_seconds(going) > WINDOW_SECONDS, MOST_SECONDS)
    finally:
        going.stop()
        going.wait(LIMIT_SECONDS, progress=False)
    segments = going.history.of(SegmentDone)
    later = segments[1:] or segments
    steps = sum(segment.steps for segment in later)
    return Case(start, sum(s.seconds for s in later) / steps, median(s.commit_seconds for s in later))


def _timed_seconds(going: pk.Run) -> float:
    return sum(segment.seconds for segment in going.history.of(SegmentDone)[1:])


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)


# --- memory


class Memory(NamedTuple):
    """Bytes of a process: its own, and with its part of what is shared."""

    uss: int
    pss: int


def smaps(pid: int) -> Memory | None:
    """Memory of a process, or None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return None
    told = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}
    return Memory(told["Private_Clean"] + told["Private_Dirty"], told["Pss"])


def memory(pace: Pace) -> Report:
    """What each process holds in a run beyond what it held before, against the size of its chunks and its model."""
    mega = pace.choose(64, 32)
    cases = {
        "large data": (nn.Linear(FEATURES, 2), data(mega * 4_000_000 // (4 * FEATURES + 8))),
        "large model": (nn.Linear(mega * 10_000, 100, bias=False), data(8, mega * 10_000)),
    }
    rows = []
    for name, (model, given) in cases.items():
        with pk.connect(2) as workers:
            pk.train(nn.Linear(FEATURES, 2), data(100), on=workers, steps=2).wait(60, progress=False)
            rows += _memory_rows(name, model, given, workers)
    heads = ["", "process", "its data", "model", "more Uss", "more Pss", "over data and model"]
    return Report(
        "memory", "Memory of a run, beyond what the processes held before", heads, rows,
        [
            "The notebook holds its data already before the run, which is not counted. SGD with momentum: parameters,",
            "gradients, momentum, and a commit of parameters and momentum are 5 models.",
        ],
    )  # fmt: skip


def _memory_rows(name: str, model: nn.Module, given: Any, workers: pk.Workers) -> list[list[str]]:
    gc.collect()
    pids = {"notebook": os.getpid(), **workers.pids}  # type: ignore[attr-defined]
    before = {who: smaps(pid) for who, pid in pids.items()}
    batch = min(256, len(given[1]) // 4)
    going = pk.train(model, given, on=workers, workers=2, batch_size=batch, steps=10**9, optimizer=momentum)
    until(lambda: len(going.history.of(SegmentDone)) > 3, 120)
    time.sleep(1.0)
    after = {who: smaps(pid) for who, pid in pids.items()}
    going.stop()
    going.wait(120, progress=False)
    whole = sum(part.nbytes for part in given)
    mine = sum(parameter.nbytes for parameter in model.parameters())
    rows = []
    for who, pid_before in before.items():
        then = after[who]
        assert pid_before is not None
        assert then is not None
        needs = whole if who == "notebook" else whole / 2
        more = then.pss - pid_before.pss
        rows.append([
            name, who, bytes_in_words(needs), bytes_in_words(mine), bytes_in_words(then.uss - pid_before.uss),
            bytes_in_words(more), significant(more / (needs + mine), 2),
        ])  # fmt: skip
    return rows


if __name__ == "__main__":
    run(__doc__, measure)
