"""Conducting a run: a chain of committed segments, between which wishes take effect.

Runs in a thread of its own. A segment is a few steps, about a quarter of a second of them; every member keeps its
state when a segment begins, that is, when the driver knows that all members reached its first step. A wish is a mark
in `Wishes` and a vote that ends the segment early; only this thread acts on it. A resize is prepared while the run
goes on: newcomers get the recipe and their chunks first, and the group changes when they are ready. A rival is measured
between two segments, in time that no segment counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from parakit.accounts import steps_done
from parakit.errors import ParakitError, RunError, RunFailed, WorkerLost
from parakit.events import (
    EpochEnded,
    History,
    Resized,
    RunEnd,
    RunStart,
    Said,
    SegmentDone,
    StepDone,
)
from parakit.keeping import Keeper
from parakit.scaling.measuring import measure_plain
from parakit.wishes import Wishes
from parakit.workers.base import Crew, Job, Roster, Workers

__all__ = ["Conductor", "Plan"]

SEGMENT_SECONDS = 0.25
_GROWTH = 4  # a segment is at most this many times longer than the one before
_PREPARE_LIMITS = 4  # preparing may take this many times the limit of an order: data travel
_GROW_SECONDS = 60.0
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Plan:
    """A run, fully checked.

    Parameters
    ----------
    job : Job
    roster : Roster
        Of the first generation.
    workers, steps : int
        How many to begin with, and how far to go.
    start : RunStart
        What the history begins with.
    rate : float
        Learning rate of the optimizer as it is made; NaN where it has none.
    """

    job: Job
    roster: Roster
    workers: int
    steps: int
    start: RunStart
    rate: float


@dataclass
class _Change:
    """A roster that is being prepared."""

    roster: Roster
    target: int
    since: float
    ready: Future[None]


class Conductor:
    """Takes a run from its plan to its end."""

    def __init__(self, plan: Plan, pool: Workers, history: History, wishes: Wishes) -> None:
        self._plan = plan
        self._pool = pool
        self._history = history
        self._wishes = wishes
        self._crew: Crew | None = None
        self._roster = plan.roster
        self._change: _Change | None = None
        self._growing: tuple[int, float] | None = None  # how many were asked for, and when
        self._pace = _Pace()
        self._keeper = Keeper(plan.job.recipe.model)
        self._began = time.perf_counter()
        self.status = "running"
        self.step = 0
        self.error: RunError | None = None

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self._began

    @property
    def world_size(self) -> int:
        """Active workers."""
        return len(self._roster.members)

    @property
    def model(self) -> nn.Module:
        """The newest model on the notebook's side."""
        return self._keeper.model

    @property
    def model_step(self) -> int:
        """Steps that it was trained for."""
        return self._keeper.step

    def conduct(self) -> None:
        """Do the whole run; never raises."""
        try:
            if self._begin():
                while self.step < self._plan.steps and self._grant():
                    self._advance()
                self._keep(final=True)
            self._end("finished")
        except Exception as error:
            self.error = error if isinstance(error, RunFailed) else _explained(error, self.step)
            self._rescue()
            self._end("failed")
        finally:
            if self._crew is not None:
                self._crew.release()

    def _begin(self) -> bool:
        """Form the first group; says whether the run was not stopped before that."""
        self._history.append(self._plan.start)
        self._crew = self._pool.open(self._plan.job)
        self._wishes.interrupt = self._crew.halt
        if not self._await(self._crew.prepare(self._roster)):
            return False
        self._muster(self._roster, len(self._roster.training.sizes), wished=False)
        return True

    @property
    def _prepare_seconds(self) -> float:
        """How long chunks and recipe may take to reach the workers."""
        return _PREPARE_LIMITS * self._plan.job.limit_seconds

    def _await(self, ready: Future[None]) -> bool:
        """Wait for the first roster; a stop or the limit ends the wait. Says whether the roster is ready."""
        deadline = self.now() + self._prepare_seconds
        while not ready.done() and not self._wishes.stopping:
            if self.now() > deadline:
                raise WorkerLost(
                    f"The workers were not ready within {self._prepare_seconds:g} s.",
                    cause="a worker that hangs or is busy, or data that take long to send",
                    remedy="look at the workers, or allow more: train(..., limit_seconds=...)",
                )
            with suppress(TimeoutError):
                ready.exception(_POLL_SECONDS)
        if ready.done():
            ready.result()
        return ready.done()

    def _end(self, status: str) -> None:
        self.status = status
        reason = str(self.error) if self.error else ("stopped" if self.step < self._plan.steps else "")
        self._history.append(RunEnd(self.now(), status, self.step, reason))

    # --- segments

    def _advance(self) -> None:
        crew, order = self._working, self._plan.job.recipe.order
        count = min(self._pace.steps, self._plan.steps - self.step)
        if self._roster.validation is not None:
            count = min(count, order.steps_per_epoch - self.step % order.steps_per_epoch)
        began = self.now()
        report = crew.advance(self.step, count, self._number, self._pace.seconds(count))
        ended = self.now()
        labels = [crew.label(member) for member in self._roster.members]
        steps = steps_done(report, labels, order, self._roster.generation, began, ended)
        self._pace.learn(report.steps, sum(step.seconds for step in steps))
        self._history.append(*steps, self._finished(steps, began, ended, report.commit_seconds))
        self.step += report.steps
        self._close_epochs(self.step - report.steps)
        self._keep()

    def _finished(self, steps: Sequence[StepDone], began: float, ended: float, commit_seconds: float) -> SegmentDone:
        control = max(0.0, ended - began - sum(step.seconds for step in steps))
        return SegmentDone(
            ended, self.step, len(steps), ended - began, control, commit_seconds,
            sum(step.samples for step in steps), self.world_size, self._roster.generation,
        )  # fmt: skip

    def _close_epochs(self, before: int) -> None:
        per_epoch = self._plan.job.recipe.order.steps_per_epoch
        for epoch in range(before // per_epoch, self.step // per_epoch):
            began = self.now()
            loss, accuracy = None, None
            if self._roster.validation is not None:
                result = self._working.evaluate().result()
                loss, accuracy = result.loss, result.accuracy
            ended = self.now()
            self._history.append(EpochEnded(ended, epoch, (epoch + 1) * per_epoch, loss, accuracy, ended - began))

    # --- wishes

    @property
    def _working(self) -> Crew:
        assert self._crew is not None
        return self._crew

    def _grant(self) -> bool:
        """Grant what is wanted; says whether the run is to go on."""
        wishes = self._wishes
        while True:
            with wishes.changed:
                self._number, paused, stopping = wishes.number, wishes.paused, wishes.stopping
                rate, wishes.rate = wishes.rate, None
                measuring, wishes.measuring = wishes.measuring, False
            if stopping:
                return False
            if rate is not None:
                self._working.set_learning_rate(rate)
            self._approach()
            self._stand(paused)
            if measuring:
                self._measure()
            elif not paused:
                return True
            else:
                with wishes.changed:
                    wishes.changed.wait_for(lambda seen=self._number: wishes.number != seen, _POLL_SECONDS)  # type: ignore[misc]

    def _stand(self, paused: bool) -> None:
        """Be paused, or not."""
        if paused and self.status != "paused":
            self._keep(final=True)
        self.status = "paused" if paused else "running"

    def _measure(self) -> None:
        """Time plain PyTorch while the run stands still; whatever comes of it, the run goes on."""
        began = time.perf_counter()
        try:
            found = measure_plain(self._pool, self._plan.job, self.now, lambda: self._wishes.stopping)
            if found is not None:
                self._history.append(found)
        except Exception as error:
            self._history.append(Said(self.now(), f"Plain PyTorch could not be measured: {error}"))
        finally:
            self._wishes.excuse(began)

    def _approach(self) -> None:
        """Come nearer to the worker count that is wanted, without waiting for anything."""
        change = self._change
        if change is not None:
            if change.ready.done():
                self._change = None
                self._apply(change)
            elif self.now() - change.since > self._prepare_seconds:
                self._change = None
                self._give_up(change.target, "the workers were not ready in time; one of them may hang.")
        target = self._wishes.target
        if self._change is None and target != self.world_size:
            self._prepare(target)
        elif target == self.world_size:
            self._growing = None

    def _prepare(self, target: int) -> None:
        there = self._pool.names
        if target > len(there):
            if not self._grow(target, len(there)):
                return
        else:
            self._growing = None
        members = [m for m in self._roster.members if m in there]
        members += [name for name in there if name not in members]
        count = min(target, len(members))
        if count == self.world_size:
            return
        roster = self._roster.succeed(members[:count])
        self._change = _Change(roster, target, self.now(), self._working.prepare(roster))
        self._change.ready.add_done_callback(lambda _: self._wishes.nudge())

    def _grow(self, target: int, there: int) -> bool:
        """Ask the cluster for more workers, once for each target; says whether there is still hope."""
        if self._growing is None or self._growing[0] != target:
            self._growing = target, self.now()
            self._history.append(Said(self.now(), f"Asking the cluster for {target} workers; {there} are there."))
            try:
                self._pool.grow(target)
            except Exception as error:
                self._growing = None
                self._give_up(target, f"the cluster cannot grow: {error}")
                return False
        elif self.now() - self._growing[1] > _GROW_SECONDS:
            self._growing = None
            self._give_up(target, f"only {there} of {target} came within {_GROW_SECONDS:g} s.")
            return False
        return True

    def _apply(self, change: _Change) -> None:
        error = change.ready.exception()
        if error is not None:
            self._give_up(change.target, str(error))
            return
        moved = sum(len(c) for c in self._roster.training.gains(change.roster.training).values())
        self._muster(change.roster, moved, wished=True)

    def _give_up(self, target: int, why: str) -> None:
        """Stop trying for a worker count, unless another one is wanted by now."""
        self._history.append(Said(self.now(), f"The run goes on with {self.world_size} workers: {why}"))
        with self._wishes.changed:
            if self._wishes.target == target:
                self._wishes.target = self.world_size

    def _muster(self, roster: Roster, moved: int, *, wished: bool) -> None:
        began = time.perf_counter()
        self._working.muster(roster, None)
        self._roster = roster
        ended = time.perf_counter()
        waited = ended - self._wishes.asked_at if wished else 0.0
        labels = tuple(self._working.label(member) for member in roster.members)
        self._history.append(
            Resized(self.now(), self.step, roster.generation, labels, moved, ended - began, waited)
        )  # fmt: skip

    # --- the notebook's copy

    def _keep(self, *, final: bool = False) -> None:
        self._keeper.keep(self._working, self.step, self.now(), final=final)

    def _rescue(self) -> None:
        """After a failure: fetch the last commit, if a worker is left that has it."""
        try:
            if self._crew is not None:
                state = self._crew.state()
                self._keeper.take(state)
        except Exception as error:
            self._history.append(
                Said(self.now(), f"The state could not be fetched ({error}); step {self._keeper.step} is kept.")
            )
        self.step = max(self.step, self._keeper.step)


class _Pace:
    """How many steps make a segment."""

    def __init__(self) -> None:
        self.steps = 1
        self._step_seconds = SEGMENT_SECONDS

    def learn(self, steps: int, seconds: float) -> None:
        self._step_seconds = max(1e-6, seconds / steps)
        wanted = round(SEGMENT_SECONDS / self._step_seconds)
        self.steps = max(1, min(wanted, _GROWTH * self.steps))

    def seconds(self, steps: int) -> float:
        return steps * self._step_seconds


def _explained(error: Exception, step: int) -> RunFailed:
    """What a user should read about an error that ended the run."""
    if isinstance(error, ParakitError):
        failed = RunFailed(f"The run failed after step {step}: {error}", remedy="run.model holds the last kept state")
    else:
        failed = RunFailed(
            f"The run failed after step {step}: {type(error).__name__}: {error}",
            cause="the model, the loss or the optimizer raised this error in its own code",
            remedy="run.model holds the last committed state",
        )
    failed.__cause__ = error
    return failed
