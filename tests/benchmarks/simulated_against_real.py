"""How far the cost model is off: steps of two workers as it predicts them, against steps of two real ones.

Run with ``python -m tests.benchmarks.simulated_against_real``; ``--help`` says how to shorten it. Prints a table;
asserts nothing. No run with two workers of the model in question goes into its prediction. The cost model of each
workload is calibrated from

- two runs with one worker, over the whole batch and over half of it: seconds of a sample, of a step and of the update,
  which two workers would divide;
- a probe of contention: the plain loop on one worker alone, and on both at once (`parakit.scaling.experiments.probes`);
- a probe of the exchange: two workers that train as many parameters but compute next to nothing.

All of these and the run with two real workers take turns within each repeat, so that a noisy neighbour hits all of
them; a difference is taken within its repeat, and the median is over repeats. The time of a step is that of its
segments, orders and commits included.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import numpy as np
import torch
from torch import nn

import parakit as pk
from parakit.costs.breakdown import TERMS
from parakit.costs.model import CostModel
from parakit.events.records import SegmentDone
from parakit.scaling.experiments.probes import probe_contention, probe_exchange
from parakit.system.this_host import name_here
from tests.benchmarks.workloads import WORKLOADS, Workload, optimizer

WORKERS = 2
WARM_UP_SEGMENTS = 3
FEWEST_STEPS = 16  # for a cost model
LIMIT_SECONDS = 60.0


def main() -> None:
    options = _options()
    print(f"{name_here()}; {platform.system()}, torch {torch.__version__}, {WORKERS} workers of 1 thread")
    print(f"{options.repeats} repeats, {options.seconds:g} s each; ms a step: median (quartiles)\n")
    print(f"{'workload':22} {'predicted':>22} {'measured':>22} {'difference, %':>22}")
    chosen = [WORKLOADS[place] for place in options.workloads]
    with pk.connect(WORKERS) as pool:
        found = {workload.name: _compared(pool, workload, options) for workload in chosen}
    if options.terms:
        _print_terms(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run and of each half of a probe")
    parser.add_argument("--workloads", type=int, nargs="+", default=range(len(WORKLOADS)), help="by number, from 0")
    parser.add_argument("--terms", action="store_true", help="also show the terms of the last repeat")
    return parser.parse_args()


def _compared(pool: pk.Workers, workload: Workload, options: argparse.Namespace) -> tuple[CostModel, pk.History]:
    """Print a line about a workload; its last cost model and its last real history."""
    predicted, measured = [], []
    for _ in range(options.repeats):
        costs = _calibrated(pool, workload, options.seconds)
        real = _trained(pool, workload, WORKERS, workload.batch_size, options.seconds)
        predicted.append(1e3 * costs.step_seconds(WORKERS))
        measured.append(1e3 * _step_seconds(real))
    off = 100 * (np.array(predicted) / np.array(measured) - 1)
    print(f"{workload.name:22} {_spread(predicted):>22} {_spread(measured):>22} {_spread(off, '+.1f'):>22}", flush=True)
    return costs, real


def _calibrated(pool: pk.Workers, workload: Workload, seconds: float) -> CostModel:
    batch = workload.batch_size
    alone = [_trained(pool, workload, 1, rows, seconds) for rows in (batch, batch // WORKERS)]
    contention = probe_contention(
        workload.model(), workload.data(), on=pool, rows=batch // WORKERS, workers=WORKERS, seconds=seconds,
        loss=nn.CrossEntropyLoss(), optimizer=optimizer,
    )  # fmt: skip
    exchange = probe_exchange(_parameters(workload), on=pool, workers=WORKERS, seconds=seconds)
    return CostModel.from_history(
        alone, algorithm=exchange.algorithm, network=exchange.network, contention=contention, batch_size=batch
    )


def _trained(pool: pk.Workers, workload: Workload, workers: int, batch: int, seconds: float) -> pk.History:
    run = pk.train(
        workload.model(), workload.data(), on=pool, workers=workers, loss=nn.CrossEntropyLoss(), optimizer=optimizer,
        batch_size=batch, steps=10**6,
    )  # fmt: skip
    time.sleep(seconds)
    began = time.monotonic()  # a slow machine has the time it needs
    while time.monotonic() - began < LIMIT_SECONDS:
        if len(run.history.of(SegmentDone)) >= 2 * WARM_UP_SEGMENTS and run.step >= FEWEST_STEPS:
            break
        time.sleep(0.05)
    run.stop()
    return run.wait(LIMIT_SECONDS, progress=False).history


def _step_seconds(history: pk.History) -> float:
    segments = history.of(SegmentDone)[WARM_UP_SEGMENTS:]
    return sum(segment.seconds for segment in segments) / sum(segment.steps for segment in segments)


def _parameters(workload: Workload) -> int:
    return sum(p.numel() for p in workload.model().parameters())


def _spread(values: Any, form: str = ".2f") -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def _print_terms(found: dict[str, tuple[CostModel, pk.History]]) -> None:
    """Which term is off, if any."""
    print(f"\n{'last repeat, ms':22} {'':9}" + "".join(f" {term:>9}" for term in TERMS) + "  contention")
    for name, (costs, real) in found.items():
        parts = costs.breakdown(WORKERS).seconds()
        print(f"{name:22} predicted" + "".join(f" {1e3 * parts[term]:9.2f}" for term in TERMS), end="")
        print(f"  {costs.contention:10.2f}")
        print(f"{'':22} measured " + "".join(f" {1e3 * _real(real)[term]:9.2f}" for term in TERMS))


def _real(history: pk.History) -> dict[str, float]:
    """The terms of real steps, means over steps and workers."""
    parts = np.array([[part.seconds() for part in step.workers] for step in history.steps[WARM_UP_SEGMENTS:]])
    data, forward, backward, exchange, update, idle = parts.mean(axis=(0, 1)).tolist()
    segments = history.of(SegmentDone)[WARM_UP_SEGMENTS:]
    control = sum(segment.control_seconds for segment in segments) / sum(segment.steps for segment in segments)
    return dict(zip(TERMS, (data + forward + backward, idle, exchange, update, control), strict=True))


if __name__ == "__main__":
    main()
