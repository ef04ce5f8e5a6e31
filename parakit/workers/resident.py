"""What lives on a worker process between orders: a run's replica, its chunks and its process group.

The functions of this module are what the driver orders, one call a task. They are importable everywhere, so that
state kept here survives from one order to the next. No order raises across the connection: it answers with an
`Answer`, which carries a value or a `Failure` in words, because an exception of a user's code may not even be
picklable. Knows nothing of Dask.
"""

from __future__ import annotations

import functools
import gc
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import perf_counter
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from parakit.commits import PrivateCommits, State, copy_state
from parakit.data import Samples, pack, unpack
from parakit.devices import CPU, device_here, give_back, use
from parakit.errors import BatchDependent, Diverged, ParakitError, StaleGeneration
from parakit.evaluation import Tally
from parakit.exactness.peers import ALONE
from parakit.gradients import GradientSum, unflatten_into
from parakit.holding import Holding
from parakit.machine import give_back_freed_memory, keep_freed_memory, return_free_memory
from parakit.recipe import Recipe
from parakit.replica import EXCHANGE, Replica, StepRecord
from parakit.shared_memory import CannotShare, SegmentKey
from parakit.vault import Room, Vault, VaultKey
from parakit.workers.base import Strategy
from parakit.workers.group import Adders, Board, GroupBroken
from parakit.workers.meeting import meet
from parakit.workers.messages import Answer, Collected, Failure, Orders, Pulse, Segment, Standing
from parakit.workers.slicing import Slicing

P = ParamSpec("P")

_COMMITS = 2  # that a member keeps: the driver may be one segment behind


class Resident:
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
        self.training = Holding(recipe.order, device)
        self.validation = Holding(device=device)
        self.rank = 0
        self.mapping: tuple[int, int] | None = None  # step and rank of the latest gradient that was a task
        self.group: Adders | None = None
        self._vault: Vault | None = None
        self._room = Room(0, 0)  # for a state in the vault of rank 0
        self._unsettled = 0  # segments in which that may move
        self._alone = True
        self.lock = threading.Lock()
        self._heeded = 0
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
        """Note that the work goes on; told to whoever asks for a pulse."""
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
    def pulse(self) -> Pulse:
        """A sign of life; may be asked for in any thread."""
        return Pulse(perf_counter() - self._moved if self._busy else 0.0, self._waiting)

    def halt(self, wish: int) -> None:
        """Vote for the end of every segment that was ordered before this wish."""
        self._halt = max(self._halt, wish)

    def follow(
        self, orders: Orders, training: Any, validation: Any, state: State | Answer | None, board: Board | None
    ) -> VaultKey | None:
        """Become what a roster says; tells where the commits can be found, if others can reach them."""
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
            assert board is not None
            self.progress(waiting=True)
            self._meet(orders, board)
        self._alone = orders.size == 1
        self._room, self._unsettled = self.replica.room, 0
        self._commit_to_vault(orders.vault)
        self._untidy = bool(training or validation) or state is not None
        return self.vault_key

    def _meet(self, orders: Orders, board: Board) -> None:
        """Form the group, and let the gradient live where the group adds it from."""
        buffer = self.replica.buffer
        common = self.replica.common_nbytes if getattr(self.strategy, "shard", False) else 0
        self.group, place = meet(
            board, orders.rank, orders.hosts, orders.limit_seconds,
            exchange=getattr(self.strategy, "exchange", "auto"), numel=buffer.numel, dtype=buffer.dtype, common=common,
            device=self.device,
        )  # fmt: skip
        buffer.live_in(buffer.fresh_vector() if place is None else place, alone=orders.size == 1)
        self.replica.speak_to(ALONE if orders.size == 1 else _Peers(self, self.group, orders))
        if common and isinstance(self.group, Slicing) and self.group.divides:
            self.replica.share(_Common(self, self.group))
        self.replica.settle_down()

    def _begin(self, generation: int) -> None:
        """Belong to another generation, and to no group yet."""
        self.generation = generation
        self.leave_group()
        self.replica.speak_to(ALONE)
        self.replica.unshare()
        self._ordered, self._faltered, self._ended = 0, False, False

    def _commit_to_vault(self, wanted: bool) -> None:
        """Keep commits in a vault from now on, or in this process's own memory.

        The driver may still be where a segment began that this member has finished, and the one after it too. A group
        keeps a state as a segment begins, so there are two; a member alone keeps one more.
        """
        places = _COMMITS + self._alone
        if wanted and (self._vault is None or self._vault.places != places):
            with suppress(OSError):
                vault = Vault(self.replica.live_state(), places, self.replica.room)
                self.close_vault()
                self._vault = vault
                self.replica.commit_to(vault)
        elif not wanted and self._vault is not None:
            self._commit_privately()
            self.close_vault()

    def _commit_privately(self) -> None:
        self._private = PrivateCommits(_COMMITS)
        self.replica.commit_to(self._private)

    @property
    def vault_key(self) -> VaultKey | None:
        """Where the commits are, if others can reach them."""
        return None if self._vault is None else self._vault.key

    def close_vault(self) -> None:
        """Let nobody open the vault any more."""
        vault, self._vault = self._vault, None
        if vault is not None:
            vault.close()

    def segment(self, number: int, first: int, count: int, wish: int, *, ahead: bool, covered: bool = False) -> Segment:
        """Commit, then run the strategy's text for some steps.

        One that was ordered ahead, while the one before it went on, is left out if that one did not come to its end:
        then all members leave it out, as a segment ends for all at the same step.

        A group commits as a segment begins, when all of its members have come that far. A member alone knows that as
        the segment ends, and nobody else has what it did: it commits then, where it has a vault. Where the driver holds
        on to the vault of rank 0, the others need no commits: see `_keep`.
        """
        self._ordered += 1
        if number != self._ordered:
            raise GroupBroken(f"Order {number} came where order {self._ordered} was due.")
        if self._faltered:
            self.leave_group()  # nobody need wait for this member
        if ahead and (self._faltered or self.replica.step != first):
            return Segment([], 0.0, None, self.vault_key)
        if self.replica.step != first:
            raise ParakitError(f"This worker is at step {self.replica.step}, but step {first} was ordered.")
        self._faltered = True  # until the end is reached
        committed = self._segment(first, count, wish, covered)
        self._faltered = False
        before, self._finished = self._finished, perf_counter()
        seconds = self._finished - before if ahead else None
        return Segment(self.replica.take_records(), committed, seconds, self.vault_key)

    def _keep(self, covered: bool) -> float:
        """Commit, or leave it to rank 0; says how many seconds that took.

        A vault gets new memory when a state outgrows it, as with an optimizer that keeps much. The driver finds that
        with the report of the segment, and the next one may have been ordered before. So for two segments everybody
        commits; all members see that it is so, as all have the same state.
        """
        if not covered or self._vault is not None:
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

    def _segment(self, first: int, count: int, wish: int, covered: bool) -> float:
        """Commit and do the steps; says how many seconds keeping the state took."""
        committed = self._keep(covered)
        self.progress()
        self._heeded, self._ended = wish, False
        if not self._alone:  # there is nobody to compare with
            self.replica.measure_norms()
        for step in range(first, first + count):
            self.strategy.step(self, step)
            if self._ended:
                break
        self.replica.check_parameters()
        self._settle()
        if self._alone and self._vault is not None:
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

    def fall_back(self, generation: int, step: int) -> Standing:
        """After a loss: leave the group, refuse older orders from now on, and go back to a step."""
        if generation <= self.generation:
            raise StaleGeneration(f"Generation {generation} comes after {self.generation}.")
        self._begin(generation)
        return Standing(self.replica.fall_back(step), self.training.chunks, self.validation.chunks)

    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate."""
        self.replica.set_learning_rate(value)
        if self._alone and self._vault is not None:
            self.replica.commit()

    def gradient(self, step: int) -> GradientSum:
        """The share of this worker; carries its vote for the end of the segment."""
        part = self.replica.gradient(step, self.training, self.rank)
        if self._halt > self._heeded:
            part.vote()
        return part

    def all_reduce(self, part: GradientSum) -> GradientSum:
        """The sum over the group."""
        assert self.group is not None
        if not self._alone:
            with self.exchanging():
                self.group.all_reduce(part.vector)
        self._ended = self._ended or part.votes > 0
        return part

    def sum_for_update(self, part: GradientSum) -> GradientSum:
        """The sum over the group: of this worker's slice alone, where the update is divided among the members."""
        if not self.replica.sharded:
            return self.all_reduce(part)
        assert isinstance(self.group, Slicing)
        with self.exchanging():
            vector, own = part.take_apart()
            summed = self.group.sum_slice(vector, tail=part.tail, own=own)
        total = part.beside(summed.tail, summed.pieces)
        self._ended = self._ended or total.votes > 0
        return total

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Spend time with the other members; whoever waits here holds nobody up."""
        start = perf_counter()
        self.progress(waiting=True)
        yield
        self.progress()
        self.replica.spent[EXCHANGE] += perf_counter() - start

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

    def __init__(self, resident: Resident, group: Adders, orders: Orders) -> None:
        self._resident, self._group = resident, group
        self.rank, self.size = orders.rank, orders.size

    def sum(self, values: Tensor) -> None:
        with self._resident.exchanging():
            self._group.all_reduce(values)


class _Common:
    """What the members of a host have in common, for the shard of one of them."""

    def __init__(self, resident: Resident, group: Slicing) -> None:
        self._resident, self._group = resident, group

    def memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        return self._group.common(numel, dtype)

    def slice_of(self, numel: int) -> slice:
        return self._group.slices(numel)[self._group.place]

    def barrier(self) -> None:
        with self._resident.exchanging():
            self._group.barrier()

    def add(self, values: Tensor) -> None:
        with self._resident.exchanging():
            self._group.add_in_common(values)


_residents: dict[str, Resident] = {}
_residents_lock = threading.Lock()


def _order(function: Callable[Concatenate[Resident, P], Any]) -> Callable[Concatenate[str, int, P], Answer]:
    """Make a function of a resident an order that answers in words, and only to its own generation."""

    @functools.wraps(function)
    def carry_out(run_id: str, generation: int, *args: P.args, **kwargs: P.kwargs) -> Answer:
        resident = _residents.get(run_id)
        if resident is None or resident.generation != generation:
            now = "released" if resident is None else f"at generation {resident.generation}"
            text = f"An order of generation {generation} came to a worker that is {now}."
            return Answer(failure=Failure("stale", -1, StaleGeneration.__name__, text))
        return _answer(resident, lambda: function(resident, *args, **kwargs))

    return carry_out  # type: ignore[return-value]  # functools.wraps hides the changed parameters


def _answer(resident: Resident, work: Callable[[], Any]) -> Answer:
    with resident.lock, resident.at_work():
        try:
            resident.make_itself_at_home()
            with resident.settings.in_force():
                return Answer(work())
        except StaleGeneration as error:  # somebody else's order: the present group has nothing to do with it
            return Answer(failure=_failure("stale", resident, error))
        except GroupBroken as error:
            resident.leave_group()
            return Answer(failure=_failure("group", resident, error))
        except Diverged as error:  # on all members at once, as they see the same sum
            return Answer(failure=_failure("diverged", resident, error))
        except BatchDependent as error:
            resident.leave_group()
            return Answer(failure=_failure("checked", resident, error))
        except Exception as error:
            resident.leave_group()  # the partners need not wait for their limit
            return Answer(failure=_failure("code", resident, error))


def _failure(kind: str, resident: Resident, error: BaseException) -> Failure:
    step, rank = resident.mapping or (resident.replica.step, -1)
    return Failure.of(kind, step, error, rank)


def prepare(
    run_id: str, blob: bytes, memory: SegmentKey | np.ndarray[Any, Any], threads: int, device: str = "cpu"
) -> Answer:
    """Make the resident of a run, unless it is here already.

    Parameters
    ----------
    run_id : str
    blob : bytes
        The pickled recipe.
    memory : SegmentKey or array
        Where the recipe's tensors are, or they themselves.
    threads : int
    device : {"cpu", "cuda"}
    """
    with _residents_lock:
        if run_id in _residents:
            return Answer()
        try:
            recipe = pickle.loads(blob)
            recipe = replace(recipe, frozen=recipe.frozen.within(memory))
            _residents[run_id] = Resident(run_id, recipe, threads, device_here(device))
        except CannotShare as error:
            return Answer(failure=Failure.of("unreachable", 0, error))
        except Exception as error:
            return Answer(failure=Failure.of("code", 0, error))
    keep_freed_memory()
    return Answer()


def muster(
    run_id: str,
    orders: Orders,
    training: Mapping[int, Samples],
    validation: Mapping[int, Samples],
    state: State | Answer | None,
    board: Board | None,
) -> Answer:
    """Follow a roster; waits for the other members where they form a group."""
    resident = _residents.get(run_id)
    if resident is None:
        return Answer(failure=Failure("stale", -1, StaleGeneration.__name__, "This run was released here."))
    return _answer(resident, lambda: resident.follow(orders, training, validation, state, board))


@_order
def advance(resident: Resident, number: int, first: int, count: int, wish: int, ahead: bool, covered: bool) -> Segment:
    """Do a segment; the orders of a generation are numbered from 1."""
    return resident.segment(number, first, count, wish, ahead=ahead, covered=covered)


def fall_back(run_id: str, generation: int, step: int) -> Answer:
    """Return to a step after a loss; says where the member stands."""
    resident = _residents.get(run_id)
    if resident is None:
        return Answer(Standing(False, (), ()))
    return _answer(resident, lambda: resident.fall_back(generation, step))


@_order
def roll_back(resident: Resident, step: int) -> bool:
    """Return to a step after a failure; says whether its state is here."""
    return resident.replica.fall_back(step)


@_order
def set_learning_rate(resident: Resident, value: float) -> None:
    """Go on at another learning rate."""
    resident.set_learning_rate(value)


@_order
def commit(resident: Resident) -> VaultKey | None:
    """Keep the present state; tells where it can be found, if others can reach it. Not while a segment goes on."""
    resident.replica.commit()
    return resident.vault_key


@_order
def map_gradient(resident: Resident, step: int, rank: int, parameters: Tensor) -> GradientSum:
    """The gradient sum of this worker's share at some parameters, as a value of its own."""
    began = perf_counter()
    replica = resident.replica
    resident.mapping = step, rank
    unflatten_into(unpack(parameters), list(replica.model.parameters()))
    part = replica.gradient(step, resident.training, rank).on_cpu()
    spent, replica.spent = replica.spent, [0.0] * len(replica.spent)
    wall = perf_counter() - began
    replica.records.append(StepRecord(step, float("nan"), float("nan"), spent, wall, replica.share_rows))
    return part


def add(*answers: Answer) -> Answer:
    """The sum of some gradient sums; hands on the first failure among them."""
    for answer in answers:
        if answer.failure is not None:
            return answer
    return Answer(GradientSum.of_all(answer.value for answer in answers))


@_order
def collect(resident: Resident, alone: bool) -> Collected:
    """The worker's accounts since the last call, and what its share of the steps did to its model."""
    replica = resident.replica
    replica.agreement.check_structure(alone=alone)
    buffers = {name: b.clone().cpu() for name, b in replica.computation.buffers.there.items()}
    return Collected(replica.take_records(), buffers, replica.agreement.state(), replica.agreement.marks())


@_order
def state(resident: Resident, step: int | None = None) -> State:
    """The state of a step, or the present one, as arrays of its own."""
    found = resident.replica.state_of(resident.replica.step if step is None else step)
    if found is None:
        raise ParakitError(f"This worker is at step {resident.replica.step} and has no state of step {step}.")
    return dict(pack(copy_state(found, device=CPU)))


@_order
def evaluate(resident: Resident, values: State | None) -> Tally:
    """Evaluate the present model, or the parameters and buffers given, on the validation chunks held here."""
    if values is not None:
        resident.replica.show(unpack(values))
    return resident.replica.tally(resident.validation)


def halt(run_id: str, wish: int) -> None:
    """Ask for the end of the segment going on; callable while it is."""
    resident = _residents.get(run_id)
    if resident is not None:
        resident.halt(wish)


def pulse(run_id: str) -> Pulse | None:
    """A sign of life of a run's member; None where there is none. Callable while it works."""
    resident = _residents.get(run_id)
    return None if resident is None else resident.pulse


def release(run_id: str) -> None:
    """Forget a run."""
    resident = _residents.pop(run_id, None)
    if resident is not None:
        resident.leave_group()
        resident.close_vault()
        device = resident.device
        del resident
        gc.collect()  # a buffer and the sum that it fills know each other
        give_back_freed_memory()
        give_back(device)


def survey() -> dict[str, Any]:
    """What this process is, and whom it holds; for tests and for people."""
    return {"pid": os.getpid(), "runs": tuple(_residents), "threads": torch.get_num_threads()}
