"""A member of a group: one worker with its engine, its data and its place among the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from parakit.checkpoints.in_memory import InMemorySnapshots
from parakit.checkpoints.in_shared_memory import Room, SharedMemorySnapshots, SnapshotsKey
from parakit.checkpoints.state import State
from parakit.collectives.base import ExchangeMethod, GroupBroken, ProcessGroup, ReduceScatterGroup, Store
from parakit.collectives.compressed import CompressedGroup
from parakit.collectives.form import form_group
from parakit.data.local_chunks import LocalChunks
from parakit.engines.recipe import Recipe
from parakit.engines.replicated import EXCHANGE, Replica
from parakit.errors import ParakitError, StaleGeneration
from parakit.gradients.gradient_sum import GradientSum
from parakit.model_state.peers import ALONE
from parakit.strategies.base import Strategy, requirements_of
from parakit.system.devices import CPU, use
from parakit.system.malloc import return_free_memory
from parakit.trees import unpack
from parakit.workers.commands import Answer, Formed, Heartbeat, Orders, RollbackReport, Segment

__all__ = []

_COMMITS = 2  # that a member keeps: the driver may be one segment behind
_TASKS = ExchangeMethod("tasks")  # where members form no group


class Member:
    """A run's part on this worker, and the team that a strategy's text sees when it runs here."""

    def __init__(self, run_id: str, recipe: Recipe, threads: int, device: torch.device = CPU) -> None:
        self.run_id = run_id
        self.threads = threads
        self.generation = -1
        self.device = device
        self.make_itself_at_home()
        self.settings = recipe.settings
        with self.settings.in_force():
            self.replica = Replica(recipe, device)
        self.strategy: Strategy = self.replica.strategy
        self._commit_privately()
        self.training = LocalChunks(recipe.order, device)
        self.validation = LocalChunks(device=device)
        self.rank = 0
        self.mapping: tuple[int, int] | None = None  # step and rank of the latest gradient that was a task
        self.group: ProcessGroup | None = None
        self._snapshots: SharedMemorySnapshots | None = None
        self._room = Room(0, 0)  # for a state in the snapshots of rank 0
        self._unsettled = 0  # segments in which that may move
        self._alone = True
        self.lock = threading.Lock()
        self._applied = 0
        self._halt = 0
        self._ended = False
        self._ordered = 0  # segments that this generation ordered of this worker
        self._finished = 0.0  # when the last of them was, perf_counter
        self._faltered = False  # in one of them
        self._untidy = False
        self._busy = False
        self._moved = perf_counter()
        self._waiting = False

    def make_itself_at_home(self) -> None:
        """Set what torch counts per thread of Python's: tasks may run on any thread of the worker's."""
        torch.set_num_threads(self.threads)
        use(self.device)

    def progress(self, *, waiting: bool = False) -> None:
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

    def follow(
        self, orders: Orders, training: Any, validation: Any, state: State | Answer | None, store: Store | None
    ) -> Formed:
        """Become what an assignment says."""
        if orders.generation <= self.generation:
            raise StaleGeneration(f"Generation {orders.generation} comes after {self.generation}.")
        self.rank = orders.rank
        self._begin(orders.generation)
        for holding, wanted, brought in (
            (self.training, orders.training, training),
            (self.validation, orders.validation, validation),
        ):
            adopted = {chunk: samples.unpacked() for chunk, samples in brought.items() if chunk in wanted}
            holding.change([c for c in wanted if c in holding.chunks and c not in adopted], adopted)
            if holding.chunks != tuple(sorted(wanted)):
                raise ParakitError(f"This worker holds the chunks {holding.chunks} where {wanted} are wanted.")
        if isinstance(state, Answer):  # a newcomer's state comes straight from a member that stays
            if state.failure is not None:
                raise GroupBroken(f"The state could not be fetched from a member: {state.failure.text}")
            state = state.value
        if state is not None:
            self.replica.load(unpack(state))
        if orders.group:
            assert store is not None
            self.progress(waiting=True)
            self._meet(orders, store)
        self._alone = orders.size == 1
        self._room, self._unsettled = self.replica.room, 0
        self._commit_to_shared_memory(orders.snapshots)
        self._untidy = bool(training or validation) or state is not None
        return Formed(self.group.method if self.group is not None else _TASKS, self.snapshots_key)

    def _meet(self, orders: Orders, store: Store) -> None:
        """Form the group, and let the gradient live where the group adds it from."""
        buffer = self.replica.buffer
        asked = requirements_of(self.strategy)
        common = self.replica.common_nbytes if asked.divides else 0
        group, place = form_group(
            store, orders.rank, orders.hosts, orders.limit_seconds,
            exchange=asked.exchange, numel=buffer.numel, dtype=buffer.dtype, common=common, device=self.device,
        )  # fmt: skip
        self.group = group if asked.codec is None else CompressedGroup(group, asked.codec)
        buffer.live_in(buffer.fresh_vector() if place is None else place, alone=orders.size == 1)
        self.replica.speak_to(ALONE if orders.size == 1 else _Peers(self, self.group, orders))
        if self.group.method.divided and isinstance(self.group, ReduceScatterGroup):
            self.replica.share(_Common(self, self.group))
        self.replica.own_memory()

    def _begin(self, generation: int) -> None:
        """Belong to another generation, and to no group yet."""
        self.generation = generation
        self.leave_group()
        self.replica.speak_to(ALONE)
        self.replica.unshare()
        self._ordered, self._faltered, self._ended = 0, False, False

    def _commit_to_shared_memory(self, wanted: bool) -> None:
        """Keep commits in shared snapshots from now on, or in this process's own memory.

        The driver may still be where a segment began that this member has finished, and the one after it too. A group
        keeps a state as a segment begins, so there are two; a member alone keeps one more.
        """
        places = _COMMITS + self._alone
        if wanted and (self._snapshots is None or self._snapshots.places != places):
            with suppress(OSError):
                snapshots = SharedMemorySnapshots(self.replica.live_state(), places, self.replica.room)
                self.close_snapshots()
                self._snapshots = snapshots
                self.replica.commit_to(snapshots)
        elif not wanted and self._snapshots is not None:
            self._commit_privately()
            self.close_snapshots()

    def _commit_privately(self) -> None:
        self._private = InMemorySnapshots(_COMMITS)
        self.replica.commit_to(self._private)

    @property
    def snapshots_key(self) -> SnapshotsKey | None:
        """Where the commits are, if others can reach them."""
        return None if self._snapshots is None else self._snapshots.key

    def close_snapshots(self) -> None:
        """Let nobody open the snapshots any more."""
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is not None:
            snapshots.close()

    def segment(
        self, number: int, first: int, count: int, request: int, *, ahead: bool, covered: bool = False
    ) -> Segment:
        """Commit, then run the strategy's text for some steps.

        One that was ordered ahead, while the one before it went on, is left out if that one did not come to its end:
        then all members leave it out, as a segment ends for all at the same step.

        A group commits as a segment begins, when all of its members have come that far. A member alone knows that as
        the segment ends, and nobody else has what it did: it commits then, where it has shared ones. Where the driver
        holds on to the snapshots of rank 0, the others need no commits: see `_keep`.
        """
        self._ordered += 1
        if number != self._ordered:
            raise GroupBroken(f"Order {number} came where order {self._ordered} was due.")
        if self._faltered:
            self.leave_group()  # nobody need wait for this member
        if ahead and (self._faltered or self.replica.step != first):
            return Segment([], 0.0, None, self.snapshots_key)
        if self.replica.step != first:
            raise ParakitError(f"This worker is at step {self.replica.step}, but step {first} was ordered.")
        self._faltered = True  # until the end is reached
        committed = self._segment(first, count, request, covered)
        self._faltered = False
        before, self._finished = self._finished, perf_counter()
        seconds = self._finished - before if ahead else None
        return Segment(self.replica.take_records(), committed, seconds, self.snapshots_key)

    def _keep(self, covered: bool) -> float:
        """Commit, or leave it to rank 0; says how many seconds that took.

        Shared snapshots get new memory when a state outgrows theirs, as with an optimizer that keeps much. The driver
        finds that with the report of the segment, and the next one may have been ordered before. So for two segments
        everybody commits; all members see that it is so, as all have the same state.
        """
        if not covered or self._snapshots is not None:
            return self.replica.commit()
        needed = Room.of(self.replica.live_state())
        if not self._room.holds(needed):
            self._room, self._unsettled = needed.grown(), _COMMITS
        if self._unsettled:
            self._unsettled -= 1
            return self.replica.commit()
        if self._private.give_up():
            return_free_memory()
        self.replica.go_on()
        return 0.0

    def _segment(self, first: int, count: int, request: int, covered: bool) -> float:
        """Commit and do the steps; says how many seconds keeping the state took."""
        committed = self._keep(covered)
        self.progress()
        self._applied, self._ended = request, False
        if not self._alone:  # there is nobody to compare with
            self.replica.measure_norms()
        for step in range(first, first + count):
            self.strategy.step(self, step)
            if self._ended:
                break
        self.replica.check_parameters()
        self._settle()
        if self._alone and self._snapshots is not None:
            committed += self.replica.commit()
        if self._untidy:  # by now, what came in messages is gone from them
            self._untidy = False
            return_free_memory()
        return committed

    def _settle(self) -> None:
        """Bring together what no step needs of the others, and see that all have what all should have alike."""
        self.replica.agreement.check_structure(alone=self._alone)
        if self.group is None or self._alone:
            return
        marks = torch.tensor(self.replica.agreement.marks(), dtype=torch.float64)
        together = marks.clone()
        self.progress(waiting=True)
        self.group.average([*self.replica.averaged_buffers, together])
        self.progress()
        self.replica.agreement.check(marks.tolist(), together.tolist())

    def fall_back(self, generation: int, step: int) -> RollbackReport:
        """After a loss: leave the group, refuse older orders from now on, and go back to a step."""
        if generation <= self.generation:
            raise StaleGeneration(f"Generation {generation} comes after {self.generation}.")
        self._begin(generation)
        return RollbackReport(self.replica.fall_back(step), self.training.chunks, self.validation.chunks)

    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate."""
        self.replica.set_learning_rate(value)
        if self._alone and self._snapshots is not None:
            self.replica.commit()

    def gradient(self, step: int) -> GradientSum:
        """The share of this worker; carries its vote for the end of the segment."""
        part = self.replica.gradient(step, self.training, self.rank)
        if self._halt > self._applied:
            part.vote()
        return part

    def all_reduce(self, part: GradientSum) -> GradientSum:
        """The sum over the group."""
        assert self.group is not None
        if not self._alone:
            with self.exchanging():
                self.group.all_reduce_gradient(part.vector, part.tail)
        self._ended = self._ended or part.votes > 0
        return part

    def sum_for_update(self, part: GradientSum) -> GradientSum:
        """The sum over the group: of this worker's slice alone, where the update is divided among the members."""
        if not self.replica.sharded:
            return self.all_reduce(part)
        assert isinstance(self.group, ReduceScatterGroup)
        with self.exchanging():
            vector, own = part.detach_slice()
            summed = self.group.reduce_scatter(vector, tail=part.tail, own=own)
        total = part.with_tail(summed.tail, summed.pieces)
        self._ended = self._ended or total.votes > 0
        return total

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Spend time with the other members; whoever waits here holds nobody up."""
        start = perf_counter()
        self.progress(waiting=True)
        yield
        self.progress()
        self.replica.phase_seconds[EXCHANGE] += perf_counter() - start

    def update(self, summed: Callable[[], GradientSum]) -> None:
        """One step of this worker's optimizer."""
        self.replica.update(summed)

    def map_gradients(self, step: int) -> list[GradientSum]:
        """Not for a text that runs on the workers."""
        raise NotImplementedError("map_gradients is a verb of strategies that run on the driver")

    def add(self, parts: Any) -> GradientSum:
        """Not for a text that runs on the workers."""
        raise NotImplementedError("add is a verb of strategies that run on the driver")

    def leave_group(self) -> None:
        """Leave the process group, if any."""
        group, self.group = self.group, None
        if group is not None:
            group.close()


class _Peers:
    """The members of a group, for a model or a loss whose steps need a word with the others."""

    def __init__(self, member: Member, group: ProcessGroup, orders: Orders) -> None:
        self._member, self._group = member, group
        self.rank, self.size = orders.rank, orders.size

    def sum(self, values: Tensor) -> None:
        with self._member.exchanging():
            self._group.all_reduce(values)


class _Common:
    """What the members of a host have in common, for the shard of one of them."""

    def __init__(self, member: Member, group: ReduceScatterGroup) -> None:
        self._member, self._group = member, group

    def memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._group.common(numel, dtype)

    def slice_of(self, numel: int) -> slice:
        return self._group.slices(numel)[self._group.place]

    def barrier(self) -> None:
        with self._member.exchanging():
            self._group.barrier()

    def add(self, values: Tensor) -> None:
        with self._member.exchanging():
            self._group.add_in_common(values)
