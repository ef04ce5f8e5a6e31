"""Membership: who is in the group of a run, and the steps by which that changes, by request or by loss.

Owns the assignment and its generations; when a step is taken is decided by `next_action`. A change that is requested is
staged while the run goes on, and takes place between two segments. After a loss, those that are left go back to the
last commit, the chunks of the others are loaded again from their source, and a new group goes on; as soon as others
come in their place, they are taken in as in a resize. Nobody else speaks of generations, so that orders of an older
group can be refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from parakit.checkpoints.state import State
from parakit.errors import WorkerLost
from parakit.events.history import History
from parakit.events.records import Recovered, Resized, Said, WorkersLost
from parakit.runs.actions import AskForWorkers, GiveUp, Lose, Stage
from parakit.runs.plan import Plan
from parakit.runs.requests import Requests
from parakit.runs.state import Goals, GroupState, Growth, Staged
from parakit.workers.assignment import GroupAssignment, Survivors
from parakit.workers.pool import Workers
from parakit.workers.session import Session

__all__ = ["Membership"]

_PREPARE_LIMITS = 4  # preparing may take this many times the limit of an order: data travel


@dataclass
class _Change:
    """An assignment that is being staged; with a state to start from, if not from what members have."""

    assignment: GroupAssignment
    target: int
    since: float
    ready: Future[None]
    moved: int  # chunks
    state: State | None = None

    def seen(self) -> Staged:
        error = self.ready.exception() if self.ready.done() else None
        return Staged(
            self.target, self.assignment.members, self.since, self.ready.done(),
            "" if error is None else str(error) or type(error).__name__, isinstance(error, WorkerLost),
        )  # fmt: skip


@dataclass
class _Recovery:
    """What began with a loss, at a number of committed steps, and ends with the next group."""

    began: float
    step: int
    loaded: int = 0  # chunks


class Membership:
    """The group of a run.

    Parameters
    ----------
    plan : Plan
    pool : Workers
    history : History
    requests : Requests
    now : callable
        Seconds since the start of the run.
    """

    def __init__(
        self, plan: Plan, pool: Workers, history: History, requests: Requests, now: Callable[[], float]
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._history = history
        self._requests = requests
        self._now = now
        self._opened: Session | None = None
        self.assignment = plan.assignment
        #: The last loss.
        self.loss: WorkerLost | None = None
        self._generation = plan.assignment.generation  # the newest that any worker may know of
        self._change: _Change | None = None
        self._recovery: _Recovery | None = None
        self._group = GroupState(
            plan.assignment.members, formed=False, patience=_PREPARE_LIMITS * plan.job.limit_seconds
        )  # fmt: skip
        self._there: tuple[str, ...] = ()  # workers of the pool, active or not, when that was last asked
        self._known: set[str] = set()  # those of them when a group was last staged

    @property
    def session(self) -> Session:
        """The run's hold on the pool, once it is open."""
        assert self._opened is not None
        return self._opened

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the active workers, in the order of their ranks."""
        return tuple(self.session.label(member) for member in self.assignment.members)

    def seen(self, goals: Goals, *, idle: bool) -> GroupState:
        """How the group is now; who is there is asked for only where that matters, as in a group that is idle."""
        group, change = self._group, self._change
        if group.formed:
            asked = idle and change is None and goals.target != len(group.members)
        else:
            asked = change is not None and not change.ready.done()
        if asked:
            self._there = self._pool.names  # which asks the scheduler, and takes some milliseconds
        there, staged = self._there if asked else (), None if change is None else change.seen()
        return replace(group, there=there, staged=staged, orders_ahead=self.session.orders_ahead)

    def _note(self, **changes: Any) -> None:
        self._group = replace(self._group, **changes)

    def open(self) -> None:
        """Take hold of the pool."""
        self._opened = self._pool.open(self._plan.job)
        self._there = self._pool.names
        self._requests.interrupt = self._opened.halt

    def release(self) -> None:
        """Let go of the pool."""
        if self._opened is not None:
            self._opened.release()

    def read_surviving_snapshot(self, step: int) -> State | None:
        """The newest state, of at most a step, that is left although its workers are not; None if there is none."""
        return None if self._opened is None else self._opened.read_surviving_snapshot(step)

    def progress(self) -> None:
        """Note that a segment was done: a loss after it is not one more in a row."""
        self._note(fruitless=0)

    def check(self) -> None:
        """Notice a loss although no order is being carried out."""
        self._note(looked_at=self._now())
        self.session.check()

    # --- a group is staged, and formed

    def stage_first(self) -> None:
        """Begin to bring what they need to those that the run begins with."""
        resumption, assignment = self._plan.resumption, self.assignment
        if resumption is not None:
            self._say(f"Going on from step {resumption.step}: {resumption.source}")
        moved = len(assignment.training.sizes)
        self._begin(assignment, len(assignment.members), moved, resumption.state if resumption else None)

    def stage(self, wanted: Stage) -> None:
        """Begin to bring what they need to the members of another group, while the run goes on."""
        assignment = self.assignment.rebalance(wanted.members, self._generation + 1)
        moved = sum(len(c) for c in self.assignment.training.gains(assignment.training).values())
        change = self._begin(assignment, wanted.target, moved)
        change.ready.add_done_callback(lambda _: self._requests.interrupt_segment())

    def _begin(self, assignment: GroupAssignment, target: int, moved: int, state: State | None = None) -> _Change:
        self._known = set(self._there)
        self._change = _Change(assignment, target, self._now(), self.session.stage(assignment), moved, state)
        return self._change

    def await_staged(self, seconds: float) -> None:
        """Wait until the staged group is ready, or the time is up."""
        assert self._change is not None
        with suppress(TimeoutError):
            self._change.ready.exception(seconds)

    def drop_change(self) -> None:
        """Forget a change of which somebody was lost: newcomers can be lost too."""
        self._change = None
        self._note(in_vain=self._group.in_vain + 1, vain_at=self._now())

    def form(self, step: int) -> int:
        """Make the staged group the active one; the step from which it goes on, an earlier one after a loss of both."""
        change, self._change = self._change, None
        assert change is not None
        change.ready.result()
        recovery, assignment, state = self._recovery, change.assignment, change.state
        requested = self._group.formed and self._requests.goals.asked_at > self._group.lost_at
        goes_on = step if state is None else int(state["step"])
        began = self._pool.clock()
        self._generation = max(self._generation, assignment.generation)
        method = self.session.form(assignment, state)
        self.assignment, self._recovery = assignment, None
        self._note(members=assignment.members, formed=True, recovering=False, in_vain=0)
        ended = self._pool.clock()
        waited = ended - self._requests.goals.asked_at if requested else 0.0
        labels = self.labels
        self._history.append(
            Resized(
                self._now(), goes_on, assignment.generation, labels, change.moved, ended - began, waited, method.way,
                method.divided,
            )
        )  # fmt: skip
        if recovery is not None:
            now, again = self._now(), recovery.step - goes_on
            self._history.append(Recovered(now, labels, goes_on, now - recovery.began, recovery.loaded, again))
        return goes_on

    # --- the worker count that is wanted

    def ask_for_workers(self, asked: AskForWorkers) -> None:
        """Ask the cluster for more workers."""
        self._note(growth=Growth(asked.target, self._now()))
        self._say(f"Asking the cluster for {asked.target} workers; {asked.there} are there.")
        try:
            self._pool.grow(asked.target)
        except Exception as error:
            self.give_up(GiveUp(asked.target, f"the cluster cannot grow: {error}"))

    def end_growth(self) -> None:
        """Wait no longer for workers that the cluster was asked for."""
        self._note(growth=None)

    def give_up(self, given_up: GiveUp) -> None:
        """Stop trying for a worker count, unless another one is wanted by now."""
        growth = self._group.growth
        self._change = None
        self._note(in_vain=0, growth=growth if growth and growth.target != given_up.target else None)
        count = len(self.assignment.members)
        self._say(f"The run goes on with {count} workers: {given_up.why}")
        self._requests.settle("target", given_up.target, count)

    # --- losses

    def lose(self, lost: Lose) -> None:
        """Take workers of the staged group for lost."""
        raise WorkerLost(lost.fact, cause=lost.cause, remedy=lost.remedy)

    def note_loss(self, loss: WorkerLost, step: int) -> None:
        """Note that members were lost; with them goes whatever was going on after a number of committed steps."""
        if self._recovery is None:
            self._recovery = _Recovery(self._now(), step)
            self._note(lost_at=self._pool.clock())
        self.loss, self._change = loss, None
        self._note(formed=False, recovering=True, fruitless=self._group.fruitless + 1)

    def recover(self, after_seconds: float, newest_left: Callable[[], State]) -> None:
        """Find out who is left, let them go back to the last commit, and stage a group of them.

        Parameters
        ----------
        after_seconds : float
        newest_left : callable
            Gives the newest state that is left elsewhere, for when no worker is left that has the last commit.

        Raises
        ------
        WorkerLost
            If nobody is left.
        """
        recovery, loss = self._recovery, self.loss
        assert recovery is not None
        assert loss is not None
        time.sleep(after_seconds)
        self._generation += 2  # one to refuse older orders by, and one for the group
        survivors = self.session.regroup(self._generation - 1, recovery.step)
        lost = tuple(self.session.label(m) for m in self.assignment.members if m not in survivors.training)
        self._history.append(WorkersLost(self._now(), lost, recovery.step, str(loss).splitlines()[0]))
        state = None if survivors.intact else newest_left()
        members = self._those_left(survivors)
        if not members:
            raise loss
        assignment = self.assignment.rebalance_after_loss(members, survivors, self._generation)
        self._history.retract(recovery.step if state is None else int(state["step"]))
        held = {chunk for chunks in survivors.training.values() for chunk in chunks}
        recovery.loaded = len(assignment.training.sizes) - len(held)
        self._begin(assignment, len(members), 0, state)

    def _those_left(self, survivors: Survivors) -> Sequence[str]:
        members = [*survivors.intact, *(m for m in survivors.training if m not in survivors.intact)]
        # If no active worker is left, idle ones go on; whoever came in place of the lost is as good as they are. But
        # when all are lost, that is for the user to know, before it happens again.
        there = self._there = self._pool.names
        if not members and self._known.intersection(there):
            return there[: len(self.assignment.members)]
        return members

    def _say(self, text: str) -> None:
        self._history.append(Said(self._now(), text))
