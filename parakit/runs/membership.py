"""Membership: who is in the group of a run, and how that changes, by request or by loss.

Owns the assignment and its generations. A change that is requested for is staged while the run goes on, and takes place
between two segments. After a loss, those that are left go back to the last commit, the chunks of the others are loaded
again from their source, and a new group goes on; as soon as others come in their place, they are taken in as in a
resize. Nobody else speaks of generations, so that orders of an older group can be refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from parakit.checkpoints.state import State
from parakit.errors import WorkerLost
from parakit.events.history import History
from parakit.events.records import Recovered, Resized, Said, WorkersLost
from parakit.runs.plan import Plan
from parakit.runs.requests import Requests
from parakit.workers.assignment import GroupAssignment, Survivors
from parakit.workers.pool import Workers
from parakit.workers.session import Session

__all__ = ["Membership"]

_PREPARE_LIMITS = 4  # preparing may take this many times the limit of an order: data travel
_GROW_SECONDS = 60.0
_POLL_SECONDS = 0.25
_LOOK_ROUND_SECONDS = 1.0  # how often a paused run looks whether everybody is there
_AGAIN_SECONDS = 0.05  # until another try after a loss in vain, doubled each time
_FRUITLESS = 6  # so many losses in a row without a segment between them end a run


@dataclass
class _Change:
    """An assignment that is being staged."""

    assignment: GroupAssignment
    target: int
    since: float
    ready: Future[None]


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
        #: Whether there was a group yet.
        self.formed = False
        self._generation = plan.assignment.generation  # the newest that any worker may know of
        self._change: _Change | None = None
        self._growing: tuple[int, float] | None = None  # how many were asked for, and when
        self._lost_at = float("-inf")
        self._fruitless = self._prepared_in_vain = 0
        self._looked = 0.0
        self._there: set[str] = set()  # workers of the pool, active or not, when somebody last looked

    @property
    def session(self) -> Session:
        """The run's hold on the pool, once it is open."""
        assert self._opened is not None
        return self._opened

    @property
    def world_size(self) -> int:
        """Active workers."""
        return len(self.assignment.members)

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the active workers, in the order of their ranks."""
        return tuple(self.session.label(member) for member in self.assignment.members)

    @property
    def settled(self) -> bool:
        """Whether the group is as it is wanted."""
        return self._change is None and self._requests.target == self.world_size

    def open(self) -> None:
        """Take hold of the pool."""
        self._opened = self._pool.open(self._plan.job)
        self._requests.interrupt = self._opened.halt

    def release(self) -> None:
        """Let go of the pool."""
        if self._opened is not None:
            self._opened.release()

    def read_surviving_snapshot(self, step: int) -> State | None:
        """The newest state, of at most a step, that is left although its workers are not; None if there is none."""
        return None if self._opened is None else self._opened.read_surviving_snapshot(step)

    def form(self, step: int, state: State | None) -> bool:
        """Form the first group, from a state or the beginning; says whether the run was not stopped before that."""
        self._there = set(self._pool.names)  # who may go on, if somebody is lost before there is a group
        if not self._await(self.session.stage(self.assignment), self.assignment, lambda: self._requests.stopping):
            return False
        self._there = set(self._pool.names)
        self._form(self.assignment, step, state, len(self.assignment.training.sizes), requested=False)
        return True

    @property
    def _prepare_seconds(self) -> float:
        """How long chunks and recipe may take to reach the workers."""
        return _PREPARE_LIMITS * self._plan.job.limit_seconds

    def _await(self, ready: Future[None], assignment: GroupAssignment, stopping: Callable[[], bool]) -> bool:
        """Wait for an assignment; a stop, a loss or the limit ends the wait. Says whether the assignment is ready."""
        deadline = self._now() + self._prepare_seconds
        while not ready.done() and not stopping():
            if self._now() > deadline:
                raise WorkerLost(
                    f"The workers were not ready within {self._prepare_seconds:g} s.",
                    cause="a worker that hangs or is busy, or data that take long to send",
                    remedy="look at the workers, or allow more: train(..., limit_seconds=...)",
                )
            with suppress(TimeoutError):
                ready.exception(_POLL_SECONDS)
            if not ready.done() and (gone := set(assignment.members) - set(self._pool.names)):
                raise WorkerLost(f"{len(gone)} of {len(assignment.members)} workers died before the group was ready.")
        if ready.done():
            ready.result()
        return ready.done()

    # --- losses

    def progress(self) -> None:
        """Note that a segment was done: a loss after it is not one more in a row."""
        self._fruitless = 0

    def look_round(self) -> None:
        """Notice a loss although no order is being carried out."""
        if self._now() - self._looked > _LOOK_ROUND_SECONDS:
            self._looked = self._now()
            self.session.check()

    def recover(self, loss: WorkerLost, step: int, kept: Callable[[], State]) -> int:
        """Go back to the last commit with those who are left; others may be lost on the way.

        Parameters
        ----------
        loss : WorkerLost
        step : int
            Committed steps.
        kept : callable
            Gives the newest state that is left elsewhere, for when no worker is left that has the last commit.

        Returns
        -------
        int
            The step from which the run goes on: an earlier one, if that state is older.

        Raises
        ------
        WorkerLost
            If nobody is left, or the group breaks again and again.
        """
        began, self._lost_at = self._now(), self._pool.clock()
        while True:
            self._fruitless += 1
            if self._fruitless > _FRUITLESS:
                raise loss
            if self._fruitless > 1:  # the scheduler may still have somebody on its list who is gone
                time.sleep(_AGAIN_SECONDS * 2 ** (self._fruitless - 2))
            try:
                return self._go_back(loss, step, kept, began)
            except WorkerLost as another:
                loss = another

    def _go_back(self, loss: WorkerLost, step: int, kept: Callable[[], State], began: float) -> int:
        before = self.assignment
        self._change = None
        self._generation += 2  # one to refuse older orders by, and one for the group
        remnant = self.session.regroup(self._generation - 1, step)
        lost = tuple(self.session.label(m) for m in before.members if m not in remnant.training)
        self._history.append(WorkersLost(self._now(), lost, step, str(loss).splitlines()[0]))
        state = None if remnant.intact else kept()
        members = self._those_left(remnant)
        if not members:
            raise loss
        goes_on = step if state is None else int(state["step"])
        assignment = before.rebalance_after_loss(members, remnant, self._generation)
        self._history.retract(goes_on)
        self._await(self.session.stage(assignment), assignment, lambda: False)
        self._form(assignment, goes_on, state, 0, requested=False)
        loaded = len(assignment.training.sizes) - len({c for chunks in remnant.training.values() for c in chunks})
        self._history.append(
            Recovered(self._now(), self.labels, goes_on, self._now() - began, loaded, step - goes_on)
        )  # fmt: skip
        return goes_on

    def _those_left(self, remnant: Survivors) -> list[str]:
        members = [*remnant.intact, *(m for m in remnant.training if m not in remnant.intact)]
        there = self._pool.names
        # If no active worker is left, idle ones go on; whoever came in place of the lost is as good as they are. But
        # when all are lost, that is for the user to know, before it happens again.
        if not members and self._there.intersection(there):
            members = list(there)[: self.world_size]
        if members:
            self._there = set(there)
        return members

    # --- requests

    def approach(self, step: int) -> None:
        """Come nearer to the worker count that is wanted, without waiting for anything."""
        change = self._change
        if change is not None:
            if change.ready.done():
                self._change = None
                self._apply(change, step)
            elif self._now() - change.since > self._prepare_seconds:
                self._change = None
                self._give_up(change.target, "the workers were not ready in time; one of them may hang.")
        target = self._requests.target
        if self._change is None and target != self.world_size:
            self._stage(target)
        elif target == self.world_size:
            self._growing = None

    def _stage(self, target: int) -> None:
        there = self._pool.names
        self._there = set(there)
        if target > len(there):
            if not self._grow(target, len(there)):
                return
        else:
            self._growing = None
        members = [m for m in self.assignment.members if m in there]
        members += [name for name in there if name not in members]
        count = min(target, len(members))
        if count == self.world_size:
            return
        assignment = self.assignment.rebalance(members[:count], self._generation + 1)
        self._change = _Change(assignment, target, self._now(), self.session.stage(assignment))
        self._change.ready.add_done_callback(lambda _: self._requests.interrupt_segment())

    def _grow(self, target: int, there: int) -> bool:
        """Ask the cluster for more workers, once for each target; says whether there is still hope."""
        if self._lost_at > self._requests.asked_at:
            return True  # whoever comes in place of the lost is welcome, but nobody requested for a larger cluster
        if self._growing is None or self._growing[0] != target:
            self._growing = target, self._now()
            self._history.append(Said(self._now(), f"Asking the cluster for {target} workers; {there} are there."))
            try:
                self._pool.grow(target)
            except Exception as error:
                self._growing = None
                self._give_up(target, f"the cluster cannot grow: {error}")
                return False
        elif self._now() - self._growing[1] > _GROW_SECONDS:
            self._growing = None
            self._give_up(target, f"only {there} of {target} came within {_GROW_SECONDS:g} s.")
            return False
        return True

    def _apply(self, change: _Change, step: int) -> None:
        error = change.ready.exception()
        if isinstance(error, WorkerLost) and self._prepared_in_vain < _FRUITLESS:
            self._prepared_in_vain += 1  # newcomers can be lost too: the next look finds others, or the same ones again
            return
        self._prepared_in_vain = 0
        if error is not None:
            self._give_up(change.target, str(error))
            return
        moved = sum(len(c) for c in self.assignment.training.gains(change.assignment.training).values())
        self._form(change.assignment, step, None, moved, requested=self._requests.asked_at > self._lost_at)

    def _give_up(self, target: int, why: str) -> None:
        """Stop trying for a worker count, unless another one is wanted by now."""
        self._history.append(Said(self._now(), f"The run goes on with {self.world_size} workers: {why}"))
        with self._requests.changed:
            if self._requests.target == target:
                self._requests.target = self.world_size

    def _form(
        self, assignment: GroupAssignment, step: int, state: State | None, moved: int, *, requested: bool
    ) -> None:
        began = self._pool.clock()
        self._generation = max(self._generation, assignment.generation)
        method = self.session.form(assignment, state)
        self.assignment, self.formed = assignment, True
        ended = self._pool.clock()
        waited = ended - self._requests.asked_at if requested else 0.0
        self._history.append(
            Resized(
                self._now(), step, assignment.generation, self.labels, moved, ended - began, waited, method.way,
                method.divided,
            )
        )  # fmt: skip
