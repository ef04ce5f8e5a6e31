"""The loop of a run: carries out one action after another, as `next_action` decides them.

Runs in a thread of its own. A segment is a few steps, a quarter of a second of them or somewhat more; the state is kept
when a segment begins, by every member, or once where this process can hold on to it. As long as nobody wants anything,
a segment is ordered while the one before it goes on, so that members go from one to the next without waiting for the
driver. A segment counts when all members have reported it. Two states are kept, so that all can go back to where the
driver is, even if some have begun the next.

A request is a mark in `Requests` and a vote that ends the segment early, and with it any that was ordered ahead; only
this thread acts on it, and only when no segment is left to be reported. When members are lost, whatever was going on is
given up, and the run goes on from its last commit with the group that `Membership` makes of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parakit.baselines.measure import measure_plain
from parakit.checkpoints import Saver
from parakit.checkpoints.state import State
from parakit.errors import Diverged, ParakitError, RunError, RunFailed, WorkerLost
from parakit.events.history import History
from parakit.events.records import EpochEnded, RunEnd, Said
from parakit.runs import actions
from parakit.runs.failure import failure_of
from parakit.runs.latest_state import LatestState
from parakit.runs.membership import Membership
from parakit.runs.next_action import next_action
from parakit.runs.plan import Plan
from parakit.runs.requests import Requests
from parakit.runs.state import RunState, Segment
from parakit.runs.step_metrics import StepMetrics
from parakit.workers.pool import Workers

__all__ = ["RunLoop"]


class RunLoop:
    """Takes a run from its plan to its end."""

    def __init__(self, plan: Plan, pool: Workers, history: History, requests: Requests) -> None:
        self._plan = plan
        self._pool = pool
        self._history = history
        self._requests = requests
        self._membership = Membership(plan, pool, history, requests, self.now)
        self._metrics = StepMetrics(plan.job.recipe.order, history)
        saving, resumed = plan.saving, plan.resumption
        saver = Saver(saving.checkpoints, saving.every_seconds, plan.identity) if saving else None
        self._latest = LatestState(plan.job.recipe, resumed.state if resumed else None, saver, self._say)
        self._began = pool.clock()
        self._over = False
        self.status = "running"
        self.error: RunError | None = None
        per_epoch, done = plan.job.recipe.order.steps_per_epoch, resumed.step if resumed else 0
        self._state = RunState(plan.steps, per_epoch, plan.assignment.validation is not None, done, done // per_epoch)
        self._verbs = self._verbs_of_actions()

    def now(self) -> float:
        """Seconds since the start of the run."""
        return self._pool.clock() - self._began

    @property
    def step(self) -> int:
        """Committed steps."""
        return self._state.step

    @property
    def members(self) -> tuple[str, ...]:
        """The active workers, in the order of their ranks."""
        return self._membership.assignment.members

    @property
    def latest(self) -> LatestState:
        """The newest state on the notebook's side, and its model."""
        return self._latest

    def run(self) -> None:
        """Do the whole run; never raises. It has let go of the workers before its status says that it is over."""
        error: RunFailed | None = None
        try:
            self._history.append(self._plan.start)
            for note in self._plan.notes:
                self._say(note)
            self._membership.open()
            while not self._over:
                self._act()
            self._latest.close()
        except BaseException as raised:  # an inline worker's code may even ask for the end of the process
            done = self.step
            self._rescue(raised)
            error = failure_of(raised, done, self._latest.step)
            self._latest.close()
        try:
            self._membership.release()
            self._latest.settle()
        finally:
            self.error = error
            self._end("failed" if error else "finished")

    def _act(self) -> None:
        goals = self._requests.goals
        state = replace(self._state, segment_steps=self._metrics.pace.steps, copied=self._latest.copied)
        action = next_action(state, goals, self._membership.seen(goals, idle=not state.ordered), self.now())
        if isinstance(action, actions.Fail):
            assert self._membership.loss is not None
            raise self._membership.loss
        try:
            self._verbs[type(action)](action)
        except WorkerLost as loss:
            self._note(ordered=(), reported=False)
            self._membership.note_loss(loss, self.step)

    def _verbs_of_actions(self) -> dict[type[actions.Action], Callable[[Any], object]]:
        group = self._membership
        return {
            actions.StageFirst: lambda _: group.stage_first(),
            actions.AwaitStaged: lambda wait: group.await_staged(wait.seconds),
            actions.Form: lambda _: self._form(),
            actions.Lose: group.lose,
            actions.Recover: lambda again: group.recover(again.after_seconds, self._newest_left),
            actions.Keep: self._keep,
            actions.CloseEpoch: self._close_epoch,
            actions.OrderSegment: self._order,
            actions.AwaitReport: lambda _: self._await_report(),
            actions.SetLearningRate: self._set_learning_rate,
            actions.AskForWorkers: group.ask_for_workers,
            actions.EndGrowth: lambda _: group.end_growth(),
            actions.Stage: group.stage,
            actions.DropChange: lambda _: group.drop_change(),
            actions.GiveUp: group.give_up,
            actions.StandStill: lambda _: self._stand_still(),
            actions.GoOn: lambda _: self._go_on(),
            actions.Measure: lambda _: self._measure(),
            actions.CheckMembers: lambda _: group.check(),
            actions.Wait: lambda wait: self._requests.wait(wait.number, wait.seconds),
            actions.Finish: self._finish,
        }

    def _note(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)

    def _say(self, text: str) -> None:
        self._history.append(Said(self.now(), text))

    def _end(self, status: str) -> None:
        self.status = status
        reason = str(self.error) if self.error else ("stopped" if self.step < self._plan.steps else "")
        self._history.append(RunEnd(self.now(), status, self.step, reason))

    # --- the group

    def _form(self) -> None:
        step = self._membership.form(self.step)
        if step != self.step:
            self._note(step=step, epochs=min(self._state.epochs, step // self._state.steps_per_epoch))

    def _newest_left(self) -> State:
        return self._latest.newest_left(self._membership.read_surviving_snapshot(self.step))

    # --- segments and epochs

    def _order(self, order: actions.OrderSegment) -> None:
        segment = Segment(order.first, order.count, order.number, self.now())
        self._note(ordered=(*self._state.ordered, segment))
        self._membership.session.order(order.first, order.count, order.number, self._metrics.pace.seconds(order.count))

    def _await_report(self) -> None:
        segment, *ahead = self._state.ordered
        group = self._membership
        report = group.session.report()
        if report.steps:
            self._metrics.take(
                report, group.labels, group.assignment.generation, segment.ordered_at, self.now(),
                self._requests.news_seconds,
            )  # fmt: skip
            group.progress()
        self._note(step=self.step + report.steps, ordered=tuple(ahead), reported=True)
        self._latest.count(self.step)

    def _close_epoch(self, closing: actions.CloseEpoch) -> None:
        began = self.now()
        result = self._membership.session.evaluate().result() if closing.evaluate else None
        ended, end = self.now(), (closing.epoch + 1) * self._state.steps_per_epoch
        loss, accuracy = (result.loss, result.accuracy) if result else (None, None)
        self._history.append(EpochEnded(ended, closing.epoch, end, loss, accuracy, ended - began))
        self._note(epochs=closing.epoch + 1)

    # --- requests

    def _set_learning_rate(self, wanted: actions.SetLearningRate) -> None:
        self._membership.session.set_learning_rate(wanted.rate)
        self._requests.settle("rate", wanted.rate, None)  # not before: those that are left of a loss have the older one

    def _stand_still(self) -> None:
        self._keep_last()
        self._note(paused=True)
        self.status = "paused"

    def _go_on(self) -> None:
        self._note(paused=False)
        self.status = "running"

    def _measure(self) -> None:
        """Time plain PyTorch while the run stands still; whatever comes of it, the run goes on."""
        try:
            if self._pool.simulated:
                raise ParakitError("these workers are simulated, and a real time beside theirs would mean nothing.")
            found = measure_plain(self._pool, self._plan.job, self.now, lambda: self._requests.goals.stopping)
            if found is not None:
                self._history.append(found)
        except Exception as error:
            self._say(f"Plain PyTorch could not be measured: {error}")
        finally:
            self._requests.settle("measuring", True, False)

    def _finish(self, end: actions.Finish) -> None:
        if end.keep:
            self._keep_last()
        self._over = True

    # --- the notebook's copy

    def _keep(self, wanted: actions.Keep) -> None:
        self._note(reported=False)
        self._latest.keep(self._membership.session, self.step, self.now(), save=wanted.save, busy=wanted.busy)

    def _keep_last(self) -> None:
        self._note(reported=False)
        self._latest.keep_last(self._membership.session, self.step, self.now())

    def _rescue(self, error: BaseException) -> None:
        """After a failure: fetch the last commit, or what is left of it; a state that diverged is none."""
        try:
            self._keep_last()
        except Exception:
            self._newest_left()
            if self._latest.step < self.step:
                kept = self._latest.step
                self._say(f"With the workers, the state of step {self.step} is lost; that of step {kept} is kept.")
        if isinstance(error, Diverged):
            self._latest.go_before(error.step)
        self._note(step=self._latest.step)
        self._history.retract(self.step)
