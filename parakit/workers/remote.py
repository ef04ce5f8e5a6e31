"""What lives on a worker process between orders: a run's engine, its chunks and its process group.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from parakit.checkpoints.in_shared_memory import SnapshotsKey
from parakit.checkpoints.state import State, copy_state
from parakit.collectives.base import GroupBroken, Store
from parakit.data.samples import Samples
from parakit.engines.base import Collected
from parakit.engines.evaluation import Tally
from parakit.errors import BatchDependent, Diverged, ParakitError, StaleGeneration
from parakit.gradients.gradient_sum import GradientSum
from parakit.system.devices import CPU, device_here, give_back
from parakit.system.malloc import give_back_freed_memory, keep_freed_memory
from parakit.system.shared_memory import CannotShare, SharedMemoryKey
from parakit.trees import pack, unpack
from parakit.workers.commands import Answer, Failure, Heartbeat, Orders, RollbackReport, Segment
from parakit.workers.member import Member

P = ParamSpec("P")
_members: dict[str, Member] = {}
_members_lock = threading.Lock()


def _order(function: Callable[Concatenate[Member, P], Any]) -> Callable[Concatenate[str, int, P], Answer]:
    """Make a function of a member an order that answers in words, and only to its own generation."""

    @functools.wraps(function)
    def carry_out(run_id: str, generation: int, *args: P.args, **kwargs: P.kwargs) -> Answer:
        member = _members.get(run_id)
        if member is None or member.generation != generation:
            now = "released" if member is None else f"at generation {member.generation}"
            text = f"An order of generation {generation} came to a worker that is {now}."
            return Answer(failure=Failure("stale", -1, StaleGeneration.__name__, text))
        return _answer(member, lambda: function(member, *args, **kwargs))

    return carry_out  # type: ignore[return-value]  # functools.wraps hides the changed parameters


def _answer(member: Member, work: Callable[[], Any]) -> Answer:
    with member.lock, member.at_work():
        try:
            member.make_itself_at_home()
            with member.settings.in_force():
                return Answer(work())
        except StaleGeneration as error:  # somebody else's order: the present group has nothing to do with it
            return Answer(failure=_failure("stale", member, error))
        except GroupBroken as error:
            member.leave_group()
            return Answer(failure=_failure("group", member, error))
        except Diverged as error:  # on all members at once, as they see the same sum
            return Answer(failure=_failure("diverged", member, error))
        except BatchDependent as error:
            member.leave_group()
            return Answer(failure=_failure("checked", member, error))
        except Exception as error:
            member.leave_group()  # the partners need not wait for their limit
            return Answer(failure=_failure("code", member, error))


def _failure(kind: str, member: Member, error: BaseException) -> Failure:
    step, rank = member.mapping or (member.engine.step, -1)
    return Failure.of(kind, step, error, rank)


def stage(
    run_id: str, blob: bytes, memory: SharedMemoryKey | np.ndarray[Any, Any], threads: int, device: str = "cpu"
) -> Answer:
    """Make the member of a run, unless it is here already.

    Parameters
    ----------
    run_id : str
    blob : bytes
        The pickled recipe.
    memory : SharedMemoryKey or array
        Where the recipe's tensors are, or they themselves.
    threads : int
    device : {"cpu", "cuda"}
    """
    with _members_lock:
        if run_id in _members:
            return Answer()
        try:
            recipe = pickle.loads(blob)
            recipe = replace(recipe, frozen=recipe.frozen.within(memory))
            _members[run_id] = Member(run_id, recipe, threads, device_here(device))
        except CannotShare as error:
            return Answer(failure=Failure.of("unreachable", 0, error))
        except Exception as error:
            return Answer(failure=Failure.of("code", 0, error))
    keep_freed_memory()
    return Answer()


def form(
    run_id: str,
    orders: Orders,
    training: Mapping[int, Samples],
    validation: Mapping[int, Samples],
    state: State | Answer | None,
    store: Store | None,
) -> Answer:
    """Follow an assignment; waits for the other members where they form a group."""
    member = _members.get(run_id)
    if member is None:
        return Answer(failure=Failure("stale", -1, StaleGeneration.__name__, "This run was released here."))
    return _answer(member, lambda: member.follow(orders, training, validation, state, store))


@_order
def advance(member: Member, number: int, first: int, count: int, request: int, ahead: bool, covered: bool) -> Segment:
    """Do a segment; the orders of a generation are numbered from 1."""
    return member.segment(number, first, count, request, ahead=ahead, covered=covered)


def fall_back(run_id: str, generation: int, step: int) -> Answer:
    """Return to a step after a loss; says where the member stands."""
    member = _members.get(run_id)
    if member is None:
        return Answer(RollbackReport(False, (), ()))
    return _answer(member, lambda: member.fall_back(generation, step))


@_order
def roll_back(member: Member, step: int) -> bool:
    """Return to a step after a failure; says whether its state is here."""
    return member.engine.fall_back(step)


@_order
def set_learning_rate(member: Member, value: float) -> None:
    """Go on at another learning rate."""
    member.set_learning_rate(value)


@_order
def commit(member: Member) -> SnapshotsKey | None:
    """Keep the present state; tells where it can be found, if others can reach it. Not while a segment goes on."""
    member.engine.commit()
    return member.snapshots.key


@_order
def map_gradient(member: Member, step: int, rank: int, parameters: Tensor) -> GradientSum:
    """The gradient sum of this worker's share at some parameters, as a value of its own."""
    member.mapping = step, rank
    return member.engine.gradient_at(unpack(parameters), step, member.training, rank)


def add(*answers: Answer) -> Answer:
    """The sum of some gradient sums; hands on the first failure among them."""
    for answer in answers:
        if answer.failure is not None:
            return answer
    return Answer(GradientSum.of_all(answer.value for answer in answers))


@_order
def collect(member: Member, alone: bool) -> Collected:
    """The worker's accounts since the last call, and what its share of the steps did to its model."""
    return member.engine.collect(alone=alone)


@_order
def state(member: Member, step: int | None = None) -> State:
    """The state of a step, or the present one, as arrays of its own."""
    engine = member.engine
    found = engine.state_of(engine.step if step is None else step)
    if found is None:
        raise ParakitError(f"This worker is at step {engine.step} and has no state of step {step}.")
    return dict(pack(copy_state(found, device=CPU)))


def merge(run_id: str, generation: int, *parts: Answer) -> Answer:
    """The state of the run, of the parts that its members hold; hands on the first failure among them."""
    failed = next((part for part in parts if part.failure is not None), None)
    return failed or _merge(run_id, generation, [unpack(part.value) for part in parts])


@_order
def _merge(member: Member, parts: Sequence[State]) -> State:
    return dict(pack(member.engine.merge(parts)))


@_order
def evaluate(member: Member, values: State | None) -> Tally:
    """Evaluate the present model, or the parameters and buffers given, on the validation chunks held here."""
    if values is not None:
        member.engine.show(unpack(values))
    return member.engine.tally(member.validation)


def halt(run_id: str, request: int) -> None:
    """Ask for the end of the segment going on; callable while it is."""
    member = _members.get(run_id)
    if member is not None:
        member.halt(request)


def heartbeat(run_id: str) -> Heartbeat | None:
    """A sign of life of a run's member; None where there is none. Callable while it works."""
    member = _members.get(run_id)
    return None if member is None else member.heartbeat


def release(run_id: str) -> None:
    """Forget a run."""
    member = _members.pop(run_id, None)
    if member is not None:
        member.leave_group()
        member.snapshots.close()
        device = member.device
        del member
        gc.collect()  # a buffer and the sum that it fills know each other
        give_back_freed_memory()
        give_back(device)


def survey() -> dict[str, Any]:
    """What this process is, and whom it holds; for tests and for people."""
    return {"pid": os.getpid(), "runs": tuple(_members), "threads": torch.get_num_threads()}
