"""Conducting a run: a chain of committed segments, between which requests take effect.

Runs in a thread of its own. A segment is a few steps, a quarter of a second of them or somewhat more; the state is kept
when a segment begins, by every member, or once where this process can hold on to it. As long as nobody wants anything,
a segment is ordered while the one before it goes on, so that members go from one to the next without waiting for the
driver. A segment counts when all members have reported it. Two states are kept, so that all can go back to where the
driver is, even if some have begun the next.

A request is a mark in `Requests` and a vote that ends the segment early, and with it any that was ordered ahead; only
this thread acts on it, and only when no segment is left to be reported. A rival is measured between two segments, in
time that no segment counts. When members are lost, whatever was going on is given up, and the run goes on from its last
commit with the group that `Membership` makes of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from parakit.baselines.measure import measure_plain
from parakit.checkpoints import Saver
from parakit.checkpoints.state import State, copy_state
from parakit.engines.make import make_engine
from parakit.errors import Diverged, ParakitError, RunError, RunFailed, WorkerLost
from parakit.events.history import History
from parakit.events.records import EpochEnded, RunEnd, Said, SegmentDone, StepDone
from parakit.events.stragglers import Stragglers
from parakit.failures.run_failed import code_failed
from parakit.pacing import Pace
from parakit.runs.latest_state import LatestState
from parakit.runs.membership import Membership
from parakit.runs.plan import Plan, Resumption
from parakit.runs.requests import Requests
from parakit.runs.step_metrics import gradient_norms, steps_done
from parakit.workers.commands import Failure
from parakit.workers.pool import Workers
from parakit.workers.session import Report

__all__ = ["RunLoop"]

_POLL_SECONDS = 0.25


class RunLoop:
    """Takes a run from its plan to its end."""

    def __init__(self, plan: Plan, pool: Workers, history: History, requests: Requests) -> None:
        self._plan = plan
        self._pool = pool
        self._history = history
        self._requests = requests
        self._membership = Membership(plan, pool, history, requests, self.now)
        self._pace = Pace()
        self._stragglers = Stragglers()
        self._ordered: deque[_Segment] = deque()  # segments without a report yet
        self._ended = 0.0  # when the last segment did
        self._epochs = 0  # that were closed
        saving = plan.saving
        saver = Saver(saving.checkpoints, saving.every_seconds, plan.identity) if saving else None
        self._latest = LatestState(plan.job.recipe, saver, self._say)
        self._began = pool.clock()
        self.status = "running"
        self.step = 0
        self.error: RunError | None = None
        if plan.resumption is not None:
            self._resume(plan.resumption)

    def _resume(self, resumption: Resumption) -> None:
        self.step = resumption.step
        self._epochs = self.step // self._plan.job.recipe.order.steps_per_epoch
        self._latest.take(resumption.state)
        self._requests.rate = resumption.rate

    def now(self) -> float:
        """Seconds since the start of the run."""
        return self._pool.clock() - self._began

    @property
    def world_size(self) -> int:
        """Active workers."""
        return self._membership.world_size

    @property
    def members(self) -> tuple[str, ...]:
        """The active workers, in the order of their ranks."""
        return self._membership.assignment.members

    @property
    def model(self) -> nn.Module:
        """The newest model on the notebook's side."""
        return self._latest.model

    @property
    def model_step(self) -> int:
        """Steps that it was trained for."""
        return self._latest.step

    @property
    def kept(self) -> State | None:
        """The newest state on the notebook's side; not to be changed."""
        return self._latest.state

    def run(self) -> None:
        """Do the whole run; never raises. It has let go of the workers before its status says that it is over."""
        error: RunFailed | None = None
        try:
            self._history.append(self._plan.start)
            for note in self._plan.notes:
                self._say(note)
            self._membership.open()
            while not self._train():
                pass
            self._latest.close()
        except BaseException as raised:  # an inline worker's code may even ask for the end of the process
            done = self.step
            self._rescue(raised)
            error = _explained(raised, done, self._latest.step)
            self._latest.close()
        try:
            self._membership.release()
            self._latest.settle()
        finally:
            self.error = error
            self._end("failed" if error else "finished")

    def _train(self) -> bool:
        """Train until the run is over, or members are lost and the others ready to go on; says whether it is over."""
        try:
            if not self._membership.formed and not self._form():
                return True
            self._close_epochs()
            while self._ordered or (self.step < self._plan.steps and self._grant()):
                self._advance()
                self._close_epochs()
            self._keep(final=True)
            return True
        except WorkerLost as loss:
            self._recover(loss)
            return False

    def _form(self) -> bool:
        resumption = self._plan.resumption
        if resumption is None:
            return self._membership.form(0, None)
        self._say(f"Going on from step {resumption.step}: {resumption.source}")
        return self._membership.form(resumption.step, resumption.state)

    def _recover(self, loss: WorkerLost) -> None:
        """Go back to the last commit, or else to the newest state that is left."""
        self._ordered.clear()
        self.step = self._membership.recover(loss, self.step, self._newest_left)
        self._epochs = min(self._epochs, self.step // self._plan.job.recipe.order.steps_per_epoch)

    def _newest_left(self) -> State:
        """The newest state that is left although nobody is who has it: lost workers', or the copy on this side."""
        state = self._membership.read_surviving_snapshot(self.step)
        if state is not None and int(state["step"]) >= self._latest.step:
            self._latest.take(state)
        return self._latest.state or self._first()

    def _first(self) -> State:
        """What the run began with."""
        resumption = self._plan.resumption
        if resumption:
            return resumption.state
        with self._plan.job.recipe.settings.in_force():
            return dict(copy_state(make_engine(self._plan.job.recipe).live_state()))

    def _say(self, text: str) -> None:
        self._history.append(Said(self.now(), text))

    def _end(self, status: str) -> None:
        self.status = status
        reason = str(self.error) if self.error else ("stopped" if self.step < self._plan.steps else "")
        self._history.append(RunEnd(self.now(), status, self.step, reason))

    # --- segments

    def _advance(self) -> None:
        """Come to the end of a segment: of the one that was ordered ahead, or else of a new one."""
        if not self._ordered:
            self._order(self.step)
        if self._may_order_ahead():
            self._order(self._ordered[0].end)
        segment = self._ordered.popleft()
        report = self._membership.session.report()
        if report.steps:
            self._take(report, segment.ordered, self.now())
        self._keep()

    def _order(self, first: int) -> None:
        order = self._plan.job.recipe.order
        count = min(self._pace.steps, self._plan.steps - first)
        if self._membership.assignment.validation is not None:
            count = min(count, order.steps_per_epoch - first % order.steps_per_epoch)
        self._ordered.append(_Segment(first, count, self.now()))
        self._membership.session.order(first, count, self._number, self._pace.seconds(count))

    def _may_order_ahead(self) -> bool:
        """Whether nothing is to happen between the segment going on and the next."""
        group, (segment,) = self._membership, self._ordered
        epoch_ends = segment.end % self._plan.job.recipe.order.steps_per_epoch == 0
        return (
            group.session.orders_ahead
            and segment.end < self._plan.steps
            and not (epoch_ends and group.assignment.validation is not None)
            and self._requests.number == self._number
            and group.settled
            and not self._latest.due(self.now())
        )

    def _take(self, report: Report, ordered: float, reported: float) -> None:
        """Note what was done in a segment.

        Reports come late where this process is busy. That costs no time while members go on with what was ordered
        ahead, so their own clocks tell then how long a segment took.
        """
        group, order = self._membership, self._plan.job.recipe.order
        began = max(ordered, self._ended) if report.seconds is None else self._ended
        seconds = reported - began if report.seconds is None else report.seconds
        self._ended = ended = min(reported, began + seconds)
        steps = steps_done(report, group.labels, order, group.assignment.generation, began, ended)
        done = self._finished(steps, ended, seconds, report)
        stepping = sum(step.seconds for step in steps)
        self._pace.learn(report.steps, stepping, done.control_seconds, self._requests.news_seconds)
        self._history.append(*steps, *gradient_norms(report, ended), done)
        self._history.append(*self._stragglers.look(steps))
        self.step += report.steps
        group.progress()

    def _finished(self, steps: Sequence[StepDone], ended: float, seconds: float, report: Report) -> SegmentDone:
        # Of whoever was busy longest; the slowest of each step together may be more than the segment.
        busy = max(sum(record.wall_seconds for record in records) for records in report.records)
        return SegmentDone(
            ended, self.step, len(steps), seconds, max(0.0, seconds - busy), report.commit_seconds,
            sum(step.samples for step in steps), self.world_size, self._membership.assignment.generation,
        )  # fmt: skip

    def _close_epochs(self) -> None:
        """Evaluate and note the end of every epoch that has ended."""
        per_epoch = self._plan.job.recipe.order.steps_per_epoch
        while self._epochs < self.step // per_epoch:
            began = self.now()
            loss, accuracy = None, None
            if self._membership.assignment.validation is not None:
                result = self._membership.session.evaluate().result()
                loss, accuracy = result.loss, result.accuracy
            ended = self.now()
            end = (self._epochs + 1) * per_epoch
            self._history.append(EpochEnded(ended, self._epochs, end, loss, accuracy, ended - began))
            self._epochs += 1

    # --- requests

    def _grant(self) -> bool:
        """Grant what is wanted; says whether the run is to go on."""
        requests = self._requests
        while True:
            with requests.changed:
                self._number, paused, stopping = requests.number, requests.paused, requests.stopping
                rate, requests.rate = requests.rate, None
                measuring = requests.measuring
            if stopping:
                return False
            if rate is not None:
                self._set_learning_rate(rate)
            self._membership.approach(self.step)
            self._stand(paused)
            if measuring:
                self._measure()
            elif not paused:
                return True
            else:
                self._membership.look_round()
                with requests.changed:
                    requests.changed.wait_for(lambda seen=self._number: requests.number != seen, _POLL_SECONDS)  # type: ignore[misc]

    def _set_learning_rate(self, rate: float) -> None:
        try:
            self._membership.session.set_learning_rate(rate)
        except WorkerLost:  # those that are left go back, also to the older rate
            with self._requests.changed:
                if self._requests.rate is None:
                    self._requests.rate = rate
            raise

    def _stand(self, paused: bool) -> None:
        """Be paused, or not."""
        if paused and self.status != "paused":
            self._keep(final=True)
        self.status = "paused" if paused else "running"

    def _measure(self) -> None:
        """Time plain PyTorch while the run stands still; whatever comes of it, the run goes on."""
        try:
            if self._pool.simulated:
                raise ParakitError("these workers are simulated, and a real time beside theirs would mean nothing.")
            found = measure_plain(self._pool, self._plan.job, self.now, lambda: self._requests.stopping)
            if found is not None:
                self._history.append(found)
        except Exception as error:
            self._say(f"Plain PyTorch could not be measured: {error}")
        finally:
            with self._requests.changed:
                self._requests.measuring = False

    # --- the notebook's copy

    def _keep(self, *, final: bool = False) -> None:
        busy = bool(self._ordered)
        self._latest.keep(self._membership.session, self.step, self.now(), busy=busy, final=final)

    def _rescue(self, error: BaseException) -> None:
        """After a failure: fetch the last commit, or what is left of it; a state that diverged is none."""
        try:
            self._latest.keep(self._membership.session, self.step, self.now(), final=True)
        except Exception:
            self._newest_left()
            if self._latest.step < self.step:
                kept = self._latest.step
                self._say(f"With the workers, the state of step {self.step} is lost; that of step {kept} is kept.")
        if isinstance(error, Diverged) and self._latest.step >= error.step:
            self._latest.take(self._latest.older_than(error.step) or self._first())
        self.step = self._latest.step
        self._history.retract(self.step)


@dataclass(frozen=True)
class _Segment:
    """A segment that was ordered, and when."""

    first: int
    count: int
    ordered: float

    @property
    def end(self) -> int:
        return self.first + self.count


def _explained(error: BaseException, done: int, kept: int) -> RunFailed:
    """What a user should read about an error that ended the run after some steps, with the state of a step kept."""
    if isinstance(error, Diverged):
        failed: RunFailed = Diverged(
            f"The run stopped: {error}",
            cause="a learning rate that is too high, or a sample that is not finite",
            remedy=f"run.model holds the last good state, of step {kept}; a lower learning rate goes on from there: "
            "parakit.train(..., resume=run, learning_rate=...); on_nonfinite='continue' lets a run go on all the same",
        )
    elif isinstance(error, RunFailed):  # it says it all
        return error
    else:
        failed = code_failed(
            f"The run failed after step {done}", Failure.of("code", done, error), (),
            remedy=f"run.model holds the state of step {kept}; parakit.train(..., resume=run) goes on from there",
        )  # fmt: skip
    failed.__cause__ = error
    return failed
