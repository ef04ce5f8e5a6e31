"""A member of a group: one worker with its engine, its data and its place among the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from parakit.checkpoints.policy import SnapshotPolicy
from parakit.checkpoints.state import State
from parakit.collectives.base import ExchangeMethod, GroupBroken, ProcessGroup, Store
from parakit.collectives.compressed import CompressedGroup
from parakit.collectives.form import form_group
from parakit.data.local_chunks import LocalChunks
from parakit.engines.make import make_engine
from parakit.engines.recipe import Recipe
from parakit.errors import ParakitError, StaleGeneration
from parakit.gradients.gradient_sum import Counts, GradientSum
from parakit.strategies.base import Strategy, requirements_of
from parakit.system.devices import CPU, use
from parakit.system.malloc import return_free_memory
from parakit.trees import unpack
from parakit.workers.commands import Answer, Formed, Heartbeat, Orders, RollbackReport, Segment
from parakit.workers.timed_group import TimedGroup

__all__ = ["Member"]

_TASKS = ExchangeMethod("tasks")  # where members form no group


@dataclass
class _Progress:
    """How far the orders of a generation were carried out.

    Attributes
    ----------
    ordered : int
        Segments that were ordered of this worker.
    unfinished : bool
        Whether the newest of them did not come to its end.
    applied : int
        The newest request that was applied when it was ordered.
    ended : bool
        Whether somebody voted for its end.
    """

    ordered: int = 0
    unfinished: bool = False
    applied: int = 0
    ended: bool = False


class Member:
    """A run's part on this worker: an engine, and the team that a strategy's text sees when it runs here."""

    def __init__(self, run_id: str, recipe: Recipe, threads: int, device: torch.device = CPU) -> None:
        self.run_id = run_id
        self.threads = threads
        self.generation = -1
        self.device = device
        self.make_itself_at_home()
        self.settings = recipe.settings
        with self.settings.in_force():
            self.engine = make_engine(recipe, device)
        self.strategy: Strategy = self.engine.strategy
        self.snapshots = SnapshotPolicy(self.engine)
        self.training = LocalChunks(recipe.order, device)
        self.validation = LocalChunks(device=device)
        self.rank = 0
        self.mapping: tuple[int, int] | None = None  # step and rank of the latest gradient that was a task
        self.group: ProcessGroup | None = None
        self.lock = threading.Lock()
        self._alone = True
        self._orders = _Progress()
        self._finished = 0.0  # when the last segment was, perf_counter
        self._halt = 0
        self._untidy = False
        self._busy = False
        self._moved, self._waiting = perf_counter(), False

    def make_itself_at_home(self) -> None:
        """Set what torch counts per thread of Python's: tasks may run on any thread of the worker's."""
        torch.set_num_threads(self.threads)
        use(self.device)

    # --- signs of life

    def progress(self, waiting: bool = False) -> None:
        """Note that the work goes on; told to whoever asks for a heartbeat."""
        self._moved, self._waiting = perf_counter(), waiting

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Carry out an order."""
        self.progress()
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    @property
    def heartbeat(self) -> Heartbeat:
        """A sign of life; may be asked for in any thread."""
        return Heartbeat(perf_counter() - self._moved if self._busy else 0.0, self._waiting)

    def halt(self, request: int) -> None:
        """Vote for the end of every segment that was ordered before this request."""
        self._halt = max(self._halt, request)

    # --- assignments

    def follow(
        self, orders: Orders, training: Any, validation: Any, state: State | Answer | None, store: Store | None
    ) -> Formed:
        """Become what an assignment says."""
        if orders.generation <= self.generation:
            raise StaleGeneration(f"Generation {orders.generation} comes after {self.generation}.")
        self.rank = orders.rank
        self._begin(orders.generation)
        self.training.take_over(orders.training, training)
        self.validation.take_over(orders.validation, validation)
        if isinstance(state, Answer):  # a newcomer's state comes straight from a member that stays
            if state.failure is not None:
                raise GroupBroken(f"The state could not be fetched from a member: {state.failure.text}")
            state = state.value
        if state is not None:
            self.engine.load(unpack(state))
        self._alone = orders.size == 1
        if orders.group:
            assert store is not None
            self.progress(waiting=True)
            self._join(orders, store)
        self.snapshots.begin_generation(shared=orders.snapshots, alone=self._alone)
        self._untidy = bool(training or validation) or state is not None
        return Formed(self.group.method if self.group is not None else _TASKS, self.snapshots.key)

    def _join(self, orders: Orders, store: Store) -> None:
        """Form the group, and let the engine belong to it."""
        numel, dtype, common = self.engine.needs
        asked = requirements_of(self.strategy)
        group, vector = form_group(
            store, orders.rank, orders.hosts, orders.limit_seconds, exchange=asked.exchange, numel=numel, dtype=dtype,
            common=common if asked.divides else 0, device=self.device,
        )  # fmt: skip
        self.group = group if asked.codec is None else CompressedGroup(group, asked.codec)
        self.engine.join(TimedGroup(self.group, orders.rank, vector, self.engine.account, self.progress))

    def _begin(self, generation: int) -> None:
        """Belong to another generation, and to no group yet."""
        self.generation = generation
        self.leave_group()
        self.engine.leave()
        self._orders = _Progress()

    def leave_group(self) -> None:
        """Leave the process group, if any."""
        group, self.group = self.group, None
        if group is not None:
            group.close()

    def fall_back(self, generation: int, step: int) -> RollbackReport:
        """After a loss: leave the group, refuse older orders from now on, and go back to a step."""
        if generation <= self.generation:
            raise StaleGeneration(f"Generation {generation} comes after {self.generation}.")
        self._begin(generation)
        return RollbackReport(self.engine.fall_back(step), self.training.chunks, self.validation.chunks)

    # --- segments

    def segment(
        self, number: int, first: int, count: int, request: int, *, ahead: bool, covered: bool = False
    ) -> Segment:
        """Commit where that is this member's to do, then run the strategy's text for some steps.

        One that was ordered ahead, while the one before it went on, is left out if that one did not come to its end:
        then all members leave it out, as a segment ends for all at the same step.
        """
        orders, engine = self._orders, self.engine
        orders.ordered += 1
        if number != orders.ordered:
            raise GroupBroken(f"Order {number} came where order {orders.ordered} was due.")
        if orders.unfinished:
            self.leave_group()  # nobody need wait for this member
        if ahead and (orders.unfinished or engine.step != first):
            return Segment([], 0.0, None, self.snapshots.key)
        if engine.step != first:
            raise ParakitError(f"This worker is at step {engine.step}, but step {first} was ordered.")
        orders.unfinished, orders.ended, orders.applied = True, False, request
        committed = self._do(range(first, first + count), covered)
        orders.unfinished = False
        before, self._finished = self._finished, perf_counter()
        seconds = self._finished - before if ahead else None
        return Segment(engine.account.take_records(), committed, seconds, self.snapshots.key)

    def _do(self, steps: range, covered: bool) -> float:
        """Commit and do the steps; says how many seconds keeping the state took."""
        committed = self.snapshots.begin_segment(covered=covered)
        self.progress()
        if not self._alone:  # there is nobody to compare with
            self.engine.measure_norms()
        for step in steps:
            self.strategy.step(self, step)
            if self._orders.ended:
                break
        self.engine.finish_segment(alone=self._alone)
        committed += self.snapshots.commit_if_alone()
        if self._untidy:  # by now, what came in messages is gone from them
            self._untidy = False
            return_free_memory()
        return committed

    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate."""
        self.engine.set_learning_rate(value)
        self.snapshots.commit_if_alone()

    # --- the verbs of a strategy

    def gradient(self, step: int) -> GradientSum:
        """The share of this worker; carries its vote for the end of the segment."""
        part = self.engine.gradient(step, self.training, self.rank)
        if self._halt > self._orders.applied:
            part.vote()
        return part

    def all_reduce(self, part: GradientSum) -> GradientSum:
        """The sum over the group."""
        total = self.engine.all_reduce(part)
        self._orders.ended |= total.votes > 0
        return total

    def sum_for_update(self, part: GradientSum) -> Counts:
        """The sum over the group, as far as the engine's update needs it here."""
        total = self.engine.sum_for_update(part)
        self._orders.ended |= total.votes > 0
        return total

    def update(self, summed: Callable[[], Counts]) -> None:
        """One step of this worker's optimizer."""
        self.engine.update(summed)

    def map_gradients(self, step: int) -> list[GradientSum]:
        """Not for a text that runs on the workers."""
        raise NotImplementedError("map_gradients is a verb of strategies that run on the driver")

    def add(self, parts: Any) -> GradientSum:
        """Not for a text that runs on the workers."""
        raise NotImplementedError("add is a verb of strategies that run on the driver")
