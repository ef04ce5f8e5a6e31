"""Groups of steps: those of one run at one worker count, as arrays, once the group of workers has settled.

Owns which steps count, and how busy the machine was meanwhile; refuses to fit anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parakit.collectives.base import ExchangeMethod
from parakit.events.history import History
from parakit.events.records import Resized, RunStart, StepDone, WorkerStep

__all__ = ["FEWEST_STEPS", "WARM_UP_STEPS", "Group", "groups_of"]

Floats = npt.NDArray[np.float64]

WARM_UP_STEPS = 3  # of a group: memory is filled, caches are cold
FEWEST_STEPS = 5
_IN_TURNS = "in turns"


@dataclass(frozen=True)
class Group:
    """The steps at one worker count of one run; arrays are (steps, workers)."""

    workers: int
    method: ExchangeMethod
    crowding: float
    others: float  # threads of other workers that are busy meanwhile
    samples: Floats
    phases: Floats  # (steps, workers, 3)
    exchange: Floats  # (steps,)
    update: Floats

    @property
    def travels(self) -> bool:
        """Whether gradients go from one process to another."""
        return self.workers > 1 and self.method.way != _IN_TURNS

    @property
    def divided(self) -> bool:
        """Whether each updates its slice, of the memory that all have in common."""
        return self.method == ExchangeMethod("shared memory", divided=True)

    @property
    def computing(self) -> Floats:
        """Seconds of a worker with a core of its own; (steps, workers)."""
        total: Floats = self.phases.sum(axis=2) / self.crowding
        return total

    def updating(self, contention: float) -> Floats:
        """Seconds of a whole update by a worker that nobody disturbs."""
        whole: Floats = self.update * (self.workers if self.divided else 1)
        return whole / self.crowding / (1 + contention * self.others)


def groups_of(history: History, start: RunStart) -> list[Group]:
    """The settled steps by worker count and exchange; those that account for all of their workers alike."""
    methods = {formed.generation: ExchangeMethod(formed.exchange, formed.divided_update)
               for formed in history.of(Resized) if formed.exchange}  # fmt: skip
    former = ExchangeMethod.of(start.exchange)  # what older files say of the whole run
    alike: dict[tuple[int, ExchangeMethod], list[StepDone]] = {}
    seen: dict[int, int] = {}
    for step in history.steps:
        seen[step.generation] = seen.get(step.generation, 0) + 1
        if seen[step.generation] > WARM_UP_STEPS and any(part.samples for part in step.workers):
            alike.setdefault((step.world_size, methods.get(step.generation, former)), []).append(step)
    return [
        _group(count, method, steps, start)
        for (count, method), steps in sorted(alike.items(), key=lambda item: item[0][0])
        if len(steps) >= FEWEST_STEPS
    ]


def _group(count: int, method: ExchangeMethod, steps: Sequence[StepDone], start: RunStart) -> Group:
    shown = min(len(step.workers) for step in steps)
    parts = [step.workers[:shown] for step in steps]
    # In one process workers take turns: whoever computes has the machine alone.
    in_turns = method.way == _IN_TURNS
    crowding = 1.0 if in_turns else max(1.0, count * start.threads_per_worker / start.cores)
    others = (
        0.0 if in_turns else max(0.0, min(count * start.threads_per_worker, start.cores) - start.threads_per_worker)
    )
    return Group(
        count, method, crowding, others,
        np.array([[part.samples for part in row] for row in parts], np.float64),
        np.array([[_computing_of(part) for part in row] for row in parts], np.float64),
        np.array([min(part.exchange_seconds for part in row) for row in parts], np.float64),
        np.array([[part.update_seconds for part in row] for row in parts], np.float64),
    )  # fmt: skip


def _computing_of(part: WorkerStep) -> tuple[float, float, float]:
    return part.data_seconds, part.forward_seconds, part.backward_seconds
