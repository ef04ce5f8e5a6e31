"""How long it takes to start, to change, and to recover.

Each start is that of a fresh Python process, whose files are in the system's cache. A recovery is the time from SIGKILL
of one of two workers to the next finished step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import parakit as pk
from tests.benchmarks import resize
from tests.benchmarks.reports import Pace, Report, run, spread, until

ROOT = Path(__file__).resolve().parents[2]
CHANGES, QUICK_CHANGES = 20, 4

SCRIPT = """
import time
clock = time.time
def main():
    moments = [clock()]
    import torch, distributed
    moments.append(clock())
    import parakit as pk
    moments.append(clock())
    workers = pk.connect(2)
    moments.append(clock())
    model = torch.nn.Linear(64, 10)
    data = pk.datasets.digits().train
    for _ in range(2):
        moments.append(clock())
        run = pk.train(model, data, on=workers, steps=10**9)
        while not run.step:
            time.sleep(0.001)
        moments.append(clock())
        run.stop()
        run.wait(30, progress=False)
    moments.append(clock())
    workers.close()
    moments.append(clock())
    import json
    print(json.dumps(moments))
if __name__ == "__main__":
    main()
"""


def measure(pace: Pace) -> Iterator[Report]:
    if not pace.quick:
        _start()  # fills the system's cache
    found = [_start() for _ in range(pace.choose(pace.repeats, 2))]
    rows = [[what, spread([one[what] for one in found])] for what in found[0]]
    changes = resize.changes(pace.choose(CHANGES, QUICK_CHANGES))
    rows += [
        [
            "a resize within the pool: request to first step",
            spread([change.request_to_step_seconds for change in changes]),
        ],
        ["of which the run stands still", spread([change.still_seconds for change in changes])],
        ["a worker killed: SIGKILL to next step", spread(list(recoveries(pace.repeats)))],
    ]
    yield Report("starting", "Starting, changing, recovering", ["", "s"], rows)


def _start() -> dict[str, float]:
    """Seconds of each part of a start, in a process of its own."""
    before = time.time()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True, timeout=120,
    )  # fmt: skip
    begun, torch_in, parakit_in, connected, asked, stepped, again, again_stepped, ending, ended = json.loads(
        done.stdout.splitlines()[-1]
    )
    return {
        "import torch and distributed": torch_in - begun,
        "import parakit beyond these": parakit_in - torch_in,
        "pk.connect(2)": connected - parakit_in,
        "pk.train to the first step, first run": stepped - asked,
        "the same, second run on the pool": again_stepped - again,
        "workers.close()": ended - ending,
        "cold start: from the process's start to the first step": stepped - before,
        "of which from pk.connect(2) on": stepped - parakit_in,
    }


def recoveries(repeats: int) -> Iterator[float]:
    """Seconds from SIGKILL to the next step, with one of two workers killed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with pk.connect(2) as workers:
        going = pk.train(model, pk.datasets.digits().train, on=workers, steps=10**9)
        for _ in range(repeats):
            until(lambda: going.world_size == 2 and workers.size == 2)
            time.sleep(1.0)
            victim = list(workers.pids.values())[-1]  # type: ignore[attr-defined]
            generation = going.history.steps[-1].generation
            os.kill(victim, signal.SIGKILL)
            yield until(lambda generation=generation: going.history.steps[-1].generation > generation)
        going.stop()
        going.wait(60, progress=False)


if __name__ == "__main__":
    run(__doc__, measure)
