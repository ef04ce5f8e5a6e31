"""The team of simulated workers: the verbs of a strategy, each with what it costs in virtual seconds.

Owns the account of a step: who computes how long, with its luck and its stragglers; when parts are there; the exchange
and the update. What a step costs is fixed by (seed, step, workers) alone. Refuses to move a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.costs.model import CostModel
from parakit.data.chunks import EpochOrder
from parakit.engines.account import StepRecord
from parakit.workers.assignment import GroupAssignment
from parakit.workers.inline import InlineTeam
from parakit.workers.session import SampledRanks

__all__ = ["SimulatedTeam", "TimedPart"]

Floats = npt.NDArray[np.float64]

_ACCOUNTED = 64  # workers of which each has a record of each step; of more, some have
_EXCERPT = 16
_LEAST_LUCK = 0.05  # of the usual time: a normal law would know no bound


@dataclass(frozen=True)
class TimedPart:
    """A part, and when each worker (or the one that has it) has it, in seconds since the step began."""

    value: Any
    ready: Any


class SimulatedTeam:
    """The verbs of a strategy with their virtual cost, around a team that computes, or around none.

    Parameters
    ----------
    inner : InlineTeam or None
    costs : CostModel
    order : EpochOrder
    seed : int
    """

    def __init__(self, inner: InlineTeam | None, costs: CostModel, order: EpochOrder, seed: int) -> None:
        self._inner = inner
        self._costs = costs
        self._order = order
        self._seed = seed
        self.rate = math.nan
        self.forget()

    def seat(self, assignment: GroupAssignment) -> None:
        """Let the workers of an assignment be the team."""
        names = assignment.members
        self._size = len(names)
        self._owner = np.zeros(len(assignment.training.sizes), np.int64)
        for rank, chunks in enumerate(assignment.training.chunks_of.values()):
            self._owner[list(chunks)] = rank
        every = range(self._size)
        some = np.linspace(0, self._size - 1, _EXCERPT).round().astype(int).tolist()
        self._shown: tuple[int, ...] = tuple(every if self._size <= _ACCOUNTED else some)
        self._updating = float(self._costs.updating_seconds(self._size))
        self.forget()

    def forget(self) -> None:
        """Forget steps that nobody asked for yet."""
        self._step = -1
        self._records: list[list[StepRecord]] = []
        self._exchanges: list[float] = []
        self._seconds = 0.0

    # --- the verbs

    def gradient(self, step: int) -> TimedPart:
        """Every worker's gradient sum; each is ready when its worker is."""
        value = self._inner.gradient(step) if self._inner else None
        return TimedPart(value, self._compute(step, 0.0))

    def map_gradients(self, step: int) -> list[TimedPart]:
        """Every worker's gradient sum, after the parameters came to it: they leave the driver one after the other."""
        values = self._inner.map_gradients(step) if self._inner else [None] * self._size
        self._driven = True
        sent = np.arange(1, self._size + 1) * self._message_seconds + self._costs.task_seconds
        ready = self._compute(step, sent)
        return [TimedPart(value, when) for value, when in zip(values, ready.tolist(), strict=True)]

    def all_reduce(self, part: TimedPart) -> TimedPart:
        """The sum of every worker's part, once the slowest has brought its own."""
        value = self._inner.all_reduce(part.value) if self._inner else None
        last = float(np.max(part.ready))
        return TimedPart(value, last + float(self._costs.exposed_exchange_seconds(self._size, last - self._at)))

    def sum_for_update(self, part: TimedPart) -> TimedPart:
        """The same, in the same time."""
        return self.all_reduce(part)

    def add(self, parts: Sequence[TimedPart]) -> TimedPart:
        """The sum of some parts, by a task that fetches all but one of them."""
        value = self._inner.add([part.value for part in parts]) if self._inner else None
        fetching = (len(parts) - 1) * self._message_seconds
        return TimedPart(value, max(part.ready for part in parts) + self._costs.task_seconds + fetching)

    def update(self, summed: Callable[[], TimedPart]) -> None:
        """One step of the optimizer, and the end of the step's account."""

        def arrived() -> Any:
            total = summed()
            self._arrive(float(np.max(total.ready)) + (self._message_seconds if self._driven else 0.0))
            return total.value

        self._driven = False
        if self._inner is None:
            arrived()
            done = [StepRecord(self._step, math.nan, self.rate, [], 0.0, 0)]
        else:
            self._inner.update(arrived)
            done = [records[0] for records in self._inner.take_records()]
        # Beside the notebook, one replica is updated; on the workers, many at once are in each other's way.
        self._book(done, self._costs.update_seconds if self._driven else self._updating)

    # --- the account

    @property
    def _message_seconds(self) -> float:
        return float(self._costs.network.link.message_seconds(self._costs.nbytes))

    def _compute(self, step: int, since: Any) -> Floats:
        """Let all workers compute, from some moment on; when they are done."""
        if step != self._step:
            self._begin(step)
        took = self._draw()
        self._computed += took
        ready: Floats = self._at + since + took
        return ready

    def _begin(self, step: int) -> None:
        # One generator a step, so that a step costs the same in whatever segment, and when it is done again.
        self._generator = np.random.default_rng([self._seed, step])
        self._step, self._at = step, 0.0
        self._computed, self._waited = np.zeros(self._size), np.zeros(self._size)
        epoch_step = step % self._order.steps_per_epoch
        boundaries = self._order.boundaries
        taken = boundaries[epoch_step + 1] - boundaries[epoch_step]
        self._rows = np.bincount(self._owner, weights=taken, minlength=self._size)

    def _draw(self) -> Floats:
        """What computing takes each worker, by its share and its luck."""
        costs = self._costs
        luck = 1 + costs.spread * self._generator.standard_normal(self._size)
        slow = self._generator.random(self._size) < costs.stragglers
        luck = np.maximum(_LEAST_LUCK, luck) * np.where(slow, costs.straggler_times, 1.0)
        took: Floats = costs.computing_seconds(self._size, self._rows) * luck
        return took

    def _arrive(self, at: float) -> None:
        """Everybody has the sum: what was no computing since the step began was waiting and exchange."""
        self._at = at
        self._waited = at - self._computed

    def _book(self, done: Sequence[StepRecord], update_seconds: float) -> None:
        """Close the account of a step, of which the team that computes told what it did."""
        loss, rate = done[0].loss, done[0].learning_rate
        wall = self._at + update_seconds
        if len(self._records) != len(self._shown):
            self._records = [[] for _ in self._shown]
        shares = np.asarray(self._costs.phases)
        for rank, records in zip(self._shown, self._records, strict=True):
            seconds = [*(self._computed[rank] * shares).tolist(), float(self._waited[rank]), update_seconds]
            # Norms are of use where all workers have theirs.
            norms = done[rank].norms if len(done) == len(self._shown) else None
            records.append(StepRecord(self._step, loss, rate, seconds, wall, int(self._rows[rank]), norms))
        self._exchanges.append(float(self._waited.min()))
        self._seconds += wall
        self._step = -1

    def take_records(self) -> tuple[list[StepRecord], ...]:
        """The accounts of the workers shown since the last call."""
        taken, self._records = tuple(self._records), []
        return taken

    def take_seconds(self) -> float:
        """What the steps took since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def take_excerpt(self) -> SampledRanks | None:
        """Whose accounts these are, where there are not everybody's."""
        exchanges, self._exchanges = tuple(self._exchanges), []
        return None if len(self._shown) == self._size else SampledRanks(self._shown, self._size, exchanges)
