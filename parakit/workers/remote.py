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
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from parakit.checkpoints.in_shared_memory import VaultKey
from parakit.checkpoints.state import State, copy_state
from parakit.collectives.base import Board, GroupBroken
from parakit.data.samples import Samples
from parakit.engines.base import StepRecord
from parakit.engines.evaluation import Tally
from parakit.errors import BatchDependent, Diverged, ParakitError, StaleGeneration
from parakit.gradients.gradient_sum import GradientSum, unflatten_into
from parakit.system.devices import CPU, device_here, give_back
from parakit.system.malloc import give_back_freed_memory, keep_freed_memory
from parakit.system.shared_memory import CannotShare, SegmentKey
from parakit.trees import pack, unpack
from parakit.workers.commands import Answer, Collected, Failure, Orders, Pulse, Segment, Standing
from parakit.workers.member import Resident

P = ParamSpec("P")
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
