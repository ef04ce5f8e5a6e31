"""A soak: random faults at random moments of real runs, which must all end as if nothing had happened.

    python -m tests.soak [--faults 200] [--seed 0] [--minutes 20]

Runs of a small network on a pool of four local processes, of which two to four are active at first. The ways in which
workers exchange and update take turns. Seeded faults come
every half second or so: a worker is killed, stopped for good, or stopped for a moment; the run is resized, paused and
resumed. Afterwards each run must have finished, with every step done once, in order, and the losses and parameters of
an undisturbed run; and nothing may be left behind. Prints a table; exits with 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import parakit as pk
from parakit.errors import ParakitError
from parakit.events.records import Recovered, SegmentDone, StepDone, WorkersLost
from parakit.strategies import AllReduce
from parakit.workers import remote
from tests.conftest import leftovers, standing
from tests.mortal import MortalNet, sgd

POOL = 4
STEPS = 1200
LIMIT_SECONDS = 2.0  # until a stopped worker is treated as dead
RUN_SECONDS = 60.0
TOLERANCE = 1e-9
# By turns: each worker updates its slice, or all of it; and exchange by connections.
STRATEGIES = (AllReduce(), AllReduce(shard=False), AllReduce(exchange="gloo"))
# How often each fault is drawn, out of their sum.
FAULTS = {"killed": 6, "stopped": 2, "slowed": 3, "resized": 5, "paused": 2}


@dataclass
class Tally:
    """What was done, and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    delays: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    runs: int = 0
    steps: int = 0
    recoveries: int = 0
    steps_again: int = 0
    furthest: float = 0.0


class Soak:
    """Runs with faults on one pool, until there were enough.

    Parameters
    ----------
    pool : Workers
    seed : int
    """

    def __init__(self, pool: Any, seed: int) -> None:
        self._pool = pool
        self._random = random.Random(seed)
        self.folder = Path(tempfile.mkdtemp(prefix="parakit-soak-"))
        self._asleep: set[int] = set()
        self.tally = Tally()
        with pk.connect("inline") as inline:
            self._reference = self._train(inline, 2, pause_seconds=0.0).wait(RUN_SECONDS, progress=False)

    def _train(
        self, on: Any, workers: int, strategy: AllReduce = STRATEGIES[0], pause_seconds: float = 0.003
    ) -> pk.Run:
        # In doubles: a ReLU that tips over by a rounding error of floats makes the curve another one by 1e-5.
        inputs, targets = pk.datasets.digits().train.tensors
        return pk.train(
            MortalNet(self.folder, pause_seconds).double(), (inputs.double(), targets), on=on, workers=workers,
            steps=STEPS, batch_size=256, optimizer=sgd, strategy=strategy, limit_seconds=LIMIT_SECONDS,
        )  # fmt: skip

    def one_run(self, most_faults: int) -> None:
        """One run with some faults, and what has to be true afterwards."""
        self._until(lambda: self._pool.size == POOL, 60, "the pool is complete")
        strategy = STRATEGIES[self.tally.runs % len(STRATEGIES)]
        run = self._train(self._pool, self._random.randint(2, POOL), strategy)
        for _ in range(most_faults):
            time.sleep(self._random.expovariate(2.0))
            if run.status in ("finished", "failed"):
                break
            self._strike(run)
        with suppress(ParakitError):
            run.resume()
        try:
            run.wait(RUN_SECONDS, progress=False)
        except ParakitError as error:
            self.tally.wrong.append(f"run {self.tally.runs}: {error}\n{_where(run)}")
            run.stop()
            with suppress(ParakitError):
                run.wait(LIMIT_SECONDS, progress=False)
        self._check(run)

    # --- faults

    def _strike(self, run: pk.Run) -> None:
        kind = self._random.choices(list(FAULTS), list(FAULTS.values()))[0]
        if kind in ("killed", "stopped") and self._pool.size < 3:
            kind = "resized"  # where nobody is left, a run has to fail
        began, seen = run.elapsed_seconds, run.step
        with suppress(psutil.Error, OSError, LookupError, ParakitError):  # nobody is there to strike
            getattr(self, f"_{kind}")(run)
            self.tally.faults[kind] += 1
            self._await_step(run, kind, began, seen)

    def _victim(self, run: pk.Run) -> int:
        members = [m for m in run.members if m in self._pool.names]
        member = self._random.choice(members)
        return self._pool.pids[self._pool.cluster.label(member)]

    def _killed(self, run: pk.Run) -> None:
        os.kill(self._victim(run), signal.SIGKILL)

    def _stopped(self, run: pk.Run) -> None:
        os.kill(self._victim(run), signal.SIGSTOP)

    def _slowed(self, run: pk.Run) -> None:
        pid = self._victim(run)
        for _ in range(4):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)

    def _resized(self, run: pk.Run) -> None:
        run.resize(self._random.randint(1, POOL))

    def _paused(self, run: pk.Run) -> None:
        run.pause()
        time.sleep(self._random.uniform(0.1, 0.6))
        run.resume()

    def _await_step(self, run: pk.Run, kind: str, began: float, seen: int) -> None:
        """Half of the faults are waited for, so that their delays are known; the others meet the next ones."""
        if self._random.random() < 0.5:
            return
        deadline = time.monotonic() + 15
        while run.step <= seen + 1 and run.status not in ("finished", "failed") and time.monotonic() < deadline:
            time.sleep(0.005)
        after = [step.at_seconds for step in run.history.steps[-400:] if step.at_seconds > began]
        losses = [event.at_seconds for event in run.history.of(Recovered) if event.at_seconds > began]
        if kind in ("killed", "stopped"):
            after = [at for at in after if losses and at > losses[0]]
        if after:
            self.tally.delays.setdefault(kind, []).append(after[0] - began)

    # --- what must be true

    def _check(self, run: pk.Run) -> None:
        tally, number = self.tally, self.tally.runs
        tally.runs += 1
        tally.steps += run.step
        tally.recoveries += len(run.history.of(WorkersLost))
        tally.wrong += [f"run {number}: {told}" for told in self._wrong(run)]

    def _wrong(self, run: pk.Run) -> Iterator[str]:
        if run.status != "finished":
            yield f"it is {run.status}"
        done = [step.step for step in run.history.steps]
        again = sum(event.steps_again for event in run.history.of(Recovered))
        self.tally.steps_again += again
        if again:
            yield f"{again} committed steps were done twice"
        if done != list(range(STEPS)):
            yield f"{len(done)} steps are recorded, {len(set(done))} of them different, of {STEPS}"
            return
        reference = self._reference
        off = float(abs(run.history.losses - reference.history.losses).max())
        for mine, other in zip(run.model.parameters(), reference.model.parameters(), strict=True):
            off = max(off, float((mine - other).detach().abs().max()))
        self.tally.furthest = max(self.tally.furthest, off)
        if not off <= TOLERANCE:
            yield f"losses or parameters differ by {off:.2g} from the undisturbed run"

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Not within {seconds:g} s: {what}\n{self._standing()}")
            time.sleep(0.05)

    def _standing(self) -> str:
        """What the pool, its scheduler and each keeper of a worker process believe."""
        pool = self._pool
        known = {address: found.get("status") for address, found in pool.cluster.known().items()}
        keepers = [
            f"{name}: {keeper.status}, {keeper.process and keeper.process.status}, {keeper.pid} {keeper.worker_address}"
            for name, keeper in pool.client.cluster.workers.items()
        ]
        return "\n".join([f"the scheduler: {known}", f"excluded: {pool.cluster.excluded}", *keepers])


def _where(run: pk.Run) -> str:
    """What a run did last, and where its thread stands."""
    events = [str(event) for event in run.history if not isinstance(event, StepDone | SegmentDone)][-12:]
    frame = sys._current_frames().get(run._thread.ident or 0)
    return "\n".join([*events, *(traceback.format_stack(frame) if frame else [])])


def soak(faults: int, seed: int, seconds: float) -> Tally:
    """As many faults as are wanted, in as many runs as that takes, within a time."""
    before = standing()
    deadline = time.monotonic() + seconds
    with pk.connect(POOL) as pool:
        pool.client.run(remote.survey)  # type: ignore[attr-defined]
        soaking = Soak(pool, seed)
        tally = soaking.tally
        while sum(tally.faults.values()) < faults and time.monotonic() < deadline and not tally.wrong:
            soaking.one_run(min(10, faults))
    shutil.rmtree(soaking.folder)
    left = leftovers(before)
    if left:
        soaking.tally.wrong.append(f"left behind: {left}")
    return soaking.tally


def table(tally: Tally, seed: int) -> str:
    """What happened, for people."""
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"seed {seed}",
        f"{'fault':10} {'times':>6} {'to the next step, median':>26} {'longest':>9}",
    ]
    for kind in FAULTS:
        delays = tally.delays.get(kind, [])
        middle, longest = (f"{statistics.median(delays):.2f} s", f"{max(delays):.2f} s") if delays else ("", "")
        lines.append(f"{kind:10} {tally.faults[kind]:6} {middle:>26} {longest:>9}")
    lines += [
        f"{sum(tally.faults.values())} faults in {tally.runs} runs of {STEPS} steps; {tally.recoveries} losses seen, "
        f"{tally.steps_again} committed steps done twice",
        f"largest difference from the undisturbed run in losses and parameters: {tally.furthest:.1e}",
        *(f"WRONG: {told}" for told in tally.wrong),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0)
    given = parser.parse_args()
    tally = soak(given.faults, given.seed, 60 * given.minutes)
    print(table(tally, given.seed))
    return 1 if tally.wrong or sum(tally.faults.values()) < given.faults else 0


if __name__ == "__main__":
    sys.exit(main())
