"""What a run does next: each situation, and random runs of a group that is only imagined."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parakit.runs import actions
from parakit.runs.actions import (
    Action,
    AskForWorkers,
    AwaitReport,
    AwaitStaged,
    CheckMembers,
    CloseEpoch,
    DropChange,
    EndGrowth,
    Fail,
    Finish,
    Form,
    GiveUp,
    GoOn,
    Keep,
    Lose,
    Measure,
    OrderSegment,
    Recover,
    SetLearningRate,
    Stage,
    StageFirst,
    StandStill,
    Wait,
)
from parakit.runs.next_action import FRUITLESS, GROW_SECONDS, POLL_SECONDS, next_action
from parakit.runs.state import Copied, Goals, GroupState, Growth, RunState, Segment, Staged

NOW = 100.0
FRESH = Copied(20, NOW + 1)
#: Twenty steps of a hundred are done, in epochs of ten, by two of four workers, and nobody wants anything.
RUN = RunState(100, 10, step=20, epochs=2, segment_steps=4, copied=FRESH)
GOALS = Goals(2, asked_at=50.0)
GROUP = GroupState(("a", "b"), ("a", "b", "c", "d"), looked_at=NOW)
GOING = Segment(20, 4, 0)
TWO, THREE = ("a", "b"), ("a", "b", "c")


def on_its_way(target: int, members: tuple[str, ...] = THREE, since: float = NOW - 1) -> Staged:
    return Staged(target, members, since)


def staged(target: int, members: tuple[str, ...] = THREE, **how: Any) -> Staged:
    return Staged(target, members, NOW - 1, ready=True, **how)


# Names of situations, with what differs from the usual in the run, the goals and the group.
SITUATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], Action]] = {
    # --- before there is a group
    "nothing was staged yet": ({}, {}, {"formed": False}, StageFirst()),
    "the first group is on its way": (
        {}, {}, {"formed": False, "staged": on_its_way(2, TWO)}, AwaitStaged(POLL_SECONDS),
    ),
    "the first group is ready": ({}, {}, {"formed": False, "staged": staged(2, TWO)}, Form()),
    "the first group is ready, and a stop is wanted": (
        {}, {"stopping": True}, {"formed": False, "staged": staged(2, TWO)}, Form(),
    ),
    "a stop before there is a group": (
        {}, {"stopping": True}, {"formed": False, "staged": on_its_way(2, TWO)}, Finish(keep=False),
    ),
    "one of the first group is gone": (
        {}, {}, {"formed": False, "staged": on_its_way(2, TWO), "there": ("a", "c")},
        Lose("1 of 2 workers died before the group was ready."),
    ),
    "the first group takes too long": (
        {}, {}, {"formed": False, "staged": on_its_way(2, TWO, since=59.0), "patience": 40.0},
        Lose(
            "The workers were not ready within 40 s.", "a worker that hangs or is busy, or data that take long to send",
            "look at the workers, or allow more: train(..., limit_seconds=...)",
        ),
    ),
    # --- after a loss
    "a loss": ({}, {}, {"formed": False, "recovering": True, "fruitless": 1}, Recover(0.0)),
    "a second loss without a segment between": (
        {}, {}, {"formed": False, "recovering": True, "fruitless": 2}, Recover(0.05),
    ),
    "as many losses as are borne": (
        {}, {}, {"formed": False, "recovering": True, "fruitless": FRUITLESS}, Recover(0.8),
    ),
    "one loss too many": ({}, {}, {"formed": False, "recovering": True, "fruitless": FRUITLESS + 1}, Fail()),
    "a stop waits for the end of a recovery": (
        {}, {"stopping": True}, {"formed": False, "recovering": True, "fruitless": 1}, Recover(0.0),
    ),
    "a stop waits for those that go on after a loss": (
        {}, {"stopping": True}, {"formed": False, "recovering": True, "staged": on_its_way(2, TWO)},
        AwaitStaged(POLL_SECONDS),
    ),
    "those that go on after a loss are ready": (
        {}, {}, {"formed": False, "recovering": True, "staged": staged(2, TWO)}, Form(),
    ),
    "whoever went on after a loss is lost too": (
        {}, {}, {"formed": False, "recovering": True, "staged": on_its_way(2, TWO), "there": ()},
        Lose("2 of 2 workers died before the group was ready."),
    ),
    # --- segments
    "nobody wants anything": ({}, {}, {}, OrderSegment(20, 4, 0)),
    "a segment is going on": ({"ordered": (GOING,)}, {}, {}, OrderSegment(24, 4, 0)),
    "one is going on, and one was ordered ahead": (
        {"ordered": (GOING, Segment(24, 4, 0))}, {}, {}, AwaitReport(),
    ),
    "a session that takes no order ahead": ({"ordered": (GOING,)}, {}, {"orders_ahead": False}, AwaitReport()),
    "a request came since the segment was ordered": ({"ordered": (GOING,)}, {"number": 1}, {}, AwaitReport()),
    "a stop while a segment goes on": ({"ordered": (GOING,)}, {"stopping": True, "number": 1}, {}, AwaitReport()),
    "a change is being staged, so nothing is ordered ahead": (
        {"ordered": (GOING,)}, {"target": 3}, {"staged": on_its_way(3)}, AwaitReport(),
    ),
    "nor while a change is being staged that nobody wants any more": (
        {"ordered": (GOING,)}, {}, {"staged": on_its_way(3)}, AwaitReport(),
    ),
    "a change is ready, but a segment goes on": (
        {"ordered": (GOING,)}, {"target": 3, "number": 1}, {"staged": staged(3)}, AwaitReport(),
    ),
    "others are wanted, but a segment goes on": ({"ordered": (GOING,)}, {"target": 3}, {}, AwaitReport()),
    "a copy is due when the segment ends": ({"ordered": (GOING,), "copied": Copied(10, NOW)}, {}, {}, AwaitReport()),
    "a checkpoint is due when the segment ends": (
        {"ordered": (GOING,), "copied": Copied(20, NOW + 1, NOW)}, {}, {}, AwaitReport(),
    ),
    "the last segment is going on": ({"step": 96, "epochs": 9, "ordered": (Segment(96, 4, 0),)}, {}, {}, AwaitReport()),
    "the last steps are fewer": ({"step": 98, "epochs": 9}, {}, {}, OrderSegment(98, 2, 0)),
    "steps go past the end of an epoch": ({"step": 28}, {}, {}, OrderSegment(28, 4, 0)),
    "but not where epochs are validated": ({"step": 28, "validates": True}, {}, {}, OrderSegment(28, 2, 0)),
    "nothing is ordered ahead of a validation": (
        {"step": 26, "validates": True, "ordered": (Segment(26, 4, 0),)}, {}, {}, AwaitReport(),
    ),
    "without validation it is": ({"step": 26, "ordered": (Segment(26, 4, 0),)}, {}, {}, OrderSegment(30, 4, 0)),
    # --- the ends of epochs and of the run
    "an epoch has ended": ({"step": 31}, {}, {}, CloseEpoch(2, evaluate=False)),
    "an epoch has ended, while what was ordered ahead goes on": (
        {"step": 31, "ordered": (Segment(31, 4, 0),)}, {}, {}, CloseEpoch(2, evaluate=False),
    ),
    "several epochs have ended": ({"step": 55, "epochs": 3}, {}, {}, CloseEpoch(3, evaluate=False)),
    "an epoch is validated": ({"step": 30, "validates": True}, {}, {}, CloseEpoch(2, evaluate=True)),
    "the last epoch is validated before the run is over": (
        {"step": 100, "epochs": 9, "validates": True}, {}, {}, CloseEpoch(9, evaluate=True),
    ),
    "all steps are done": ({"step": 100, "epochs": 10}, {}, {}, Finish()),
    "all steps are done, whatever is wanted": (
        {"step": 100, "epochs": 10}, {"paused": True, "target": 3, "rate": 0.1, "measuring": True}, {}, Finish(),
    ),
    "a stop": ({}, {"stopping": True}, {}, Finish()),
    "a stop comes before all else that is wanted": (
        {}, {"stopping": True, "rate": 0.1, "target": 4, "measuring": True}, {"staged": staged(4)}, Finish(),
    ),
    "a stop while paused": ({"paused": True}, {"paused": True, "stopping": True}, {}, Finish()),
    "an epoch that ended is closed before a stop": ({"step": 30}, {"stopping": True}, {}, CloseEpoch(2, False)),
    # --- the copy
    "a copy is due after a report": (
        {"reported": True, "copied": Copied(10, NOW)}, {}, {}, Keep(save=False, busy=False),
    ),
    "the first copy": ({"reported": True, "copied": Copied()}, {}, {}, Keep(save=False, busy=False)),
    "one while a segment goes on that was ordered ahead": (
        {"reported": True, "ordered": (GOING,), "copied": Copied(10, NOW)}, {}, {}, Keep(save=False, busy=True),
    ),
    "it is looked after before an epoch is closed": (
        {"step": 30, "reported": True, "copied": Copied(10, NOW)}, {}, {}, Keep(save=False, busy=False),
    ),
    "a copy is not due": ({"reported": True, "copied": Copied(10, NOW + 0.1)}, {}, {}, OrderSegment(20, 4, 0)),
    "once after a report is enough": ({"copied": Copied(10, NOW)}, {}, {}, OrderSegment(20, 4, 0)),
    "there is a copy of this step": ({"reported": True, "copied": Copied(20, NOW)}, {}, {}, OrderSegment(20, 4, 0)),
    "a checkpoint is due": (
        {"reported": True, "copied": Copied(10, NOW + 1, NOW)}, {}, {}, Keep(save=True, busy=False),
    ),
    "a checkpoint of what was copied is due": (
        {"reported": True, "copied": Copied(20, NOW + 1, NOW)}, {}, {}, Keep(save=True, busy=False),
    ),
    # --- a learning rate
    "another learning rate": ({}, {"rate": 0.1}, {}, SetLearningRate(0.1)),
    "another learning rate, and a change that is ready": (
        {}, {"rate": 0.1, "target": 3}, {"staged": staged(3)}, SetLearningRate(0.1),
    ),
    "another learning rate while paused": ({"paused": True}, {"paused": True, "rate": 0.1}, {}, SetLearningRate(0.1)),
    # --- another worker count
    "one more": ({}, {"target": 3}, {}, Stage(3, THREE)),
    "one fewer": ({}, {"target": 1}, {}, Stage(1, ("a",))),
    "one fewer, with the one that is left": ({}, {"target": 1}, {"there": ("d", "b")}, Stage(1, ("b",))),
    "members come first": ({}, {"target": 3}, {"there": ("d", "b", "a")}, Stage(3, ("a", "b", "d"))),
    "it is on its way": ({}, {"target": 3}, {"staged": on_its_way(3)}, OrderSegment(20, 4, 0)),
    "it is ready": ({}, {"target": 3}, {"staged": staged(3)}, Form()),
    "it is ready in a pause": ({"paused": True}, {"target": 3, "paused": True}, {"staged": staged(3)}, Form()),
    "a pause in a resize that is on its way": (
        {}, {"target": 3, "paused": True}, {"staged": on_its_way(3)}, StandStill(),
    ),
    "a resize in a pause": ({"paused": True}, {"target": 3, "paused": True}, {}, Stage(3, THREE)),
    "asked for twice, the first is on its way": ({}, {"target": 4}, {"staged": on_its_way(3)}, OrderSegment(20, 4, 0)),
    "asked for twice, the first is ready": ({}, {"target": 4}, {"staged": staged(3)}, Form()),
    "asked for twice, the second after the first": (
        {}, {"target": 4}, {"members": THREE}, Stage(4, ("a", "b", "c", "d")),
    ),
    "asked for and taken back": ({}, {"target": 2}, {"staged": on_its_way(3)}, OrderSegment(20, 4, 0)),
    "a newcomer was lost": ({}, {"target": 3}, {"staged": staged(3, error="gone", lost=True)}, DropChange()),
    "others are tried a moment later": ({}, {"target": 3}, {"in_vain": 1, "vain_at": NOW}, OrderSegment(20, 4, 0)),
    "others are tried": ({}, {"target": 3}, {"in_vain": 1, "vain_at": NOW - POLL_SECONDS}, Stage(3, THREE)),
    "newcomers were lost again and again": (
        {}, {"target": 3}, {"staged": staged(3, error="gone", lost=True), "in_vain": FRUITLESS}, GiveUp(3, "gone"),
    ),
    "a newcomer cannot have what it needs": (
        {}, {"target": 3}, {"staged": staged(3, error="no memory")}, GiveUp(3, "no memory"),
    ),
    "a newcomer takes too long": (
        {}, {"target": 3}, {"staged": on_its_way(3, since=59.9), "patience": 40.0},
        GiveUp(3, "the workers were not ready in time; one of them may hang."),
    ),
    "a target that nobody can be found for now": ({}, {"target": 3}, {"there": ()}, AskForWorkers(3, 0)),
    # --- more than there are
    "more than there are": ({}, {"target": 6}, {}, AskForWorkers(6, 4)),
    "those who are there begin": ({}, {"target": 6}, {"growth": Growth(6, NOW)}, Stage(6, ("a", "b", "c", "d"))),
    "nobody came yet": (
        {}, {"target": 6}, {"growth": Growth(6, NOW - 30), "there": TWO}, OrderSegment(20, 4, 0),
    ),
    "nobody comes": (
        {}, {"target": 6}, {"growth": Growth(6, NOW - GROW_SECONDS - 1)}, GiveUp(6, "only 4 of 6 came within 60 s."),
    ),
    "all came": ({}, {"target": 4}, {"growth": Growth(4, NOW - 30)}, EndGrowth()),
    "even more": ({}, {"target": 8}, {"growth": Growth(6, NOW - 30)}, AskForWorkers(8, 4)),
    "as many as there are, after all": ({}, {"target": 2}, {"growth": Growth(6, NOW)}, EndGrowth()),
    "nothing is wanted any more of a change on its way": (
        {}, {"target": 2}, {"growth": Growth(6, NOW), "staged": on_its_way(6)}, EndGrowth(),
    ),
    "some were lost since: who comes is taken in": (
        {}, {"target": 4}, {"there": THREE, "lost_at": 51.0}, Stage(4, THREE),
    ),
    "some were lost since: the cluster is not asked": (
        {}, {"target": 4}, {"there": TWO, "lost_at": 51.0}, OrderSegment(20, 4, 0),
    ),
    "some were lost before: the cluster is asked": (
        {}, {"target": 4}, {"there": TWO, "lost_at": 49.0}, AskForWorkers(4, 2),
    ),
    # --- pauses and baselines
    "a pause": ({}, {"paused": True}, {}, StandStill()),
    "in a pause": ({"paused": True}, {"paused": True, "number": 7}, {}, Wait(7, POLL_SECONDS)),
    "in a pause, now and then": ({"paused": True}, {"paused": True}, {"looked_at": NOW - 1.1}, CheckMembers()),
    "on again": ({"paused": True}, {}, {}, GoOn()),
    "a baseline": ({}, {"measuring": True}, {}, Measure()),
    "a baseline in a pause": ({"paused": True}, {"paused": True, "measuring": True}, {}, Measure()),
    "a baseline and a pause": ({}, {"paused": True, "measuring": True}, {}, StandStill()),
    "a baseline, but a segment is going on": (
        {"ordered": (GOING,)}, {"measuring": True, "number": 1}, {}, AwaitReport(),
    ),
    "a baseline while a change is on its way": ({}, {"measuring": True}, {"staged": on_its_way(3)}, Measure()),
    "a baseline and a change that is ready": ({}, {"measuring": True, "target": 3}, {"staged": staged(3)}, Form()),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    run, goals, group, expected = SITUATIONS[name]
    assert next_action(replace(RUN, **run), replace(GOALS, **goals), replace(GROUP, **group), NOW) == expected


def test_every_action_has_a_situation() -> None:
    shown = {type(expected) for *_, expected in SITUATIONS.values()}
    assert {kind.__name__ for kind in shown} == set(actions.__all__) - {"Action"}


def test_what_was_lost_takes_ever_longer_until_it_is_tried_again() -> None:
    waits = []
    for fruitless in range(1, FRUITLESS + 1):
        action = next_action(RUN, GOALS, replace(GROUP, formed=False, recovering=True, fruitless=fruitless), NOW)
        assert isinstance(action, Recover)
        waits.append(action.after_seconds)
    assert waits == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8]


# --- random runs

STAGE_SECONDS = 0.6
MOST = 6


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Lost(Exception):
    """A member is gone."""


@dataclass
class Imagined:
    """A run whose group is only imagined: carries actions out, and says whenever one is not allowed.

    Parameters
    ----------
    requests : list of pairs
        A time, and the goals that change then.
    losses : list of pairs
        A time, and the worker that dies then; another one comes in its place.
    comes : bool
        Whether the cluster has the workers that it is asked for.
    """

    requests: deque[tuple[float, dict[str, Any]]]
    losses: deque[tuple[float, int]]
    comes: bool
    validates: bool
    orders_ahead: bool
    now: float = 0.0
    steps: int = 60
    step_seconds: float = 0.05
    there: list[str] = field(default_factory=lambda: ["w0", "w1", "w2", "w3"])
    known: int = 4  # workers there ever were
    evaluated: list[int] = field(default_factory=list)
    ended: str = ""
    stopped_at: float = math.inf
    done: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = RunState(self.steps, 7, self.validates, segment_steps=3)
        self.goals = Goals(2)
        self.group = GroupState(("w0", "w1"), formed=False, patience=5.0, orders_ahead=self.orders_ahead)

    def pass_time(self, seconds: float) -> None:
        """Let time go by, with all that happens meanwhile."""
        self.now += seconds
        while self.requests and self.requests[0][0] <= self.now:
            at, change = self.requests.popleft()
            if change.get("stopping"):
                self.stopped_at = min(self.stopped_at, self.now)
            asked = at if "target" in change else self.goals.asked_at
            self.goals = replace(self.goals, **change, asked_at=asked, number=self.goals.number + 1)
        while self.losses and self.losses[0][0] <= self.now:
            _, which = self.losses.popleft()
            self.there.pop(which % len(self.there))
            self.come(1)

    def come(self, count: int) -> None:
        self.there += [f"w{self.known + place}" for place in range(count)]
        self.known += count

    def seen(self) -> GroupState:
        waiting = self.group.staged
        if waiting is not None and not waiting.ready and self.now - waiting.since > STAGE_SECONDS:
            gone = set(waiting.members) - set(self.there)
            waiting = replace(waiting, ready=True, lost=bool(gone), error="gone" if gone else "")
            self.goals = replace(self.goals, number=self.goals.number + 1)
            self.group = replace(self.group, staged=waiting)
        return replace(self.group, there=tuple(self.there))

    def go(self) -> None:
        for _ in range(5000):
            action = next_action(self.run, self.goals, self.seen(), self.now)
            self.done.append(action)
            self.pass_time(0.001)
            try:
                getattr(self, snake(type(action).__name__))(action)
            except Lost:
                self.note_loss()
            if self.ended:
                return
        raise AssertionError(f"no end: {self.done[-20:]}")

    def note_loss(self) -> None:
        self.run = replace(self.run, ordered=(), reported=False)
        lost_at = self.group.lost_at if self.group.recovering else self.now
        self.group = replace(
            self.group, formed=False, recovering=True, staged=None, fruitless=self.group.fruitless + 1, lost_at=lost_at
        )  # fmt: skip

    def ask(self) -> None:
        """Speak to the members, which is allowed if there is a group and no segment of it is without a report."""
        assert self.group.formed
        assert not self.run.ordered
        if not set(self.group.members) <= set(self.there):
            raise Lost

    def begin(self, target: int, members: tuple[str, ...]) -> None:
        assert self.group.staged is None
        assert members
        self.group = replace(self.group, staged=Staged(target, members, self.now))

    def stage_first(self, _: StageFirst) -> None:
        assert not self.group.formed
        self.begin(2, self.group.members)

    def await_staged(self, action: AwaitStaged) -> None:
        assert not self.group.formed
        self.pass_time(action.seconds)

    def form(self, _: Form) -> None:
        assert not self.run.ordered
        change = self.group.staged
        assert change is not None
        assert change.ready
        self.group = replace(self.group, staged=None)
        if not set(change.members) <= set(self.there):
            raise Lost
        self.group = replace(self.group, members=change.members, formed=True, recovering=False, in_vain=0)

    def lose(self, _: Lose) -> None:
        assert not self.group.formed
        raise Lost

    def recover(self, action: Recover) -> None:
        assert not self.group.formed
        assert not self.run.ordered
        self.pass_time(action.after_seconds)
        left = [member for member in self.group.members if member in self.there] or self.there[:1]
        self.begin(len(left), tuple(left))

    def fail(self, _: Fail) -> None:
        assert self.group.fruitless > FRUITLESS
        self.ended = "failed"

    def keep(self, action: Keep) -> None:
        assert action.busy == bool(self.run.ordered)
        self.run = replace(self.run, reported=False)
        if not action.busy:
            self.ask()
            self.run = replace(self.run, copied=Copied(self.run.step, self.now + 1.0))

    def close_epoch(self, action: CloseEpoch) -> None:
        assert action.epoch == self.run.epochs
        if action.evaluate:
            self.ask()
            assert self.run.step == (action.epoch + 1) * 7
            self.evaluated.append(action.epoch)
        self.run = replace(self.run, epochs=action.epoch + 1)

    def order_segment(self, action: OrderSegment) -> None:
        assert self.group.formed
        assert len(self.run.ordered) < (2 if self.orders_ahead else 1)
        assert not self.goals.stopping or action.number < self.goals.number
        assert action.first == (self.run.ordered[-1].end if self.run.ordered else self.run.step)
        assert action.count > 0
        segment = Segment(action.first, action.count, action.number)
        assert segment.end <= self.run.steps
        self.run = replace(self.run, ordered=(*self.run.ordered, segment))

    def await_report(self, _: AwaitReport) -> None:
        segment, *ahead = self.run.ordered
        steps = 0
        while segment.first == self.run.step and steps < segment.count:
            self.pass_time(self.step_seconds)
            if not set(self.group.members) <= set(self.there):
                raise Lost
            steps += 1
            if self.goals.number > segment.number:
                break
        self.run = replace(self.run, step=self.run.step + steps, ordered=tuple(ahead), reported=True)
        if steps:
            self.group = replace(self.group, fruitless=0)

    def set_learning_rate(self, action: SetLearningRate) -> None:
        self.ask()
        assert action.rate == self.goals.rate or self.goals.rate is not None
        self.settle(rate=(action.rate, None))

    def settle(self, **goals: tuple[Any, Any]) -> None:
        for name, (granted, then) in goals.items():
            if getattr(self.goals, name) == granted:
                self.goals = replace(self.goals, **{name: then})

    def ask_for_workers(self, action: AskForWorkers) -> None:
        growth = self.group.growth
        assert growth is None or growth.target != action.target
        self.group = replace(self.group, growth=Growth(action.target, self.now))
        if self.comes:
            self.come(action.target - len(self.there))

    def end_growth(self, _: EndGrowth) -> None:
        assert self.group.growth is not None
        self.group = replace(self.group, growth=None)

    def stage(self, action: Stage) -> None:
        assert self.group.formed
        assert set(action.members) <= {f"w{number}" for number in range(self.known)}
        assert len(set(action.members)) == len(action.members) <= action.target
        self.begin(action.target, action.members)

    def drop_change(self, _: DropChange) -> None:
        self.group = replace(self.group, staged=None, in_vain=self.group.in_vain + 1, vain_at=self.now)

    def give_up(self, action: GiveUp) -> None:
        self.group = replace(self.group, staged=None, in_vain=0, growth=None)
        self.settle(target=(action.target, len(self.group.members)))

    def stand_still(self, _: StandStill) -> None:
        self.ask()
        self.run = replace(self.run, paused=True)

    def go_on(self, _: GoOn) -> None:
        assert self.run.paused
        self.run = replace(self.run, paused=False)

    def measure(self, _: Measure) -> None:
        assert not self.run.ordered
        self.pass_time(0.5)
        self.settle(measuring=(True, False))

    def check_members(self, _: CheckMembers) -> None:
        self.group = replace(self.group, looked_at=self.now)
        self.ask()

    def wait(self, action: Wait) -> None:
        assert self.run.paused
        if action.number == self.goals.number:
            self.pass_time(action.seconds)

    def finish(self, action: Finish) -> None:
        if action.keep:
            self.ask()
        self.ended = "stopped" if self.run.step < self.run.steps else "finished"


MOMENTS = st.floats(0.0, 6.0, allow_nan=False)
CHANGES = st.one_of(
    st.integers(1, MOST).map(lambda target: {"target": target}),
    st.sampled_from([
        {"paused": True}, {"paused": False}, {"rate": 0.1}, {"rate": 0.2}, {"measuring": True}, {"stopping": True},
    ]),
)  # fmt: skip
REQUESTS = st.lists(st.tuples(MOMENTS, CHANGES), max_size=8)
LOSSES = st.lists(st.tuples(MOMENTS, st.integers(0, MOST)), max_size=5)


def imagined(requests: Any, losses: Any, *how: Any) -> Imagined:
    going_on = (7.0, {"paused": False})  # nothing else would end a pause
    in_order = sorted([*requests, going_on], key=lambda request: request[0])
    return Imagined(deque(in_order), deque(sorted(losses)), *how)


@settings(max_examples=200, deadline=None)
@given(REQUESTS, LOSSES, st.booleans(), st.booleans(), st.booleans())
def test_whatever_happens_a_run_comes_to_its_end(
    requests: Any, losses: Any, comes: bool, validates: bool, orders_ahead: bool
) -> None:
    run = imagined(requests, losses, comes, validates, orders_ahead)
    run.go()
    assert run.ended in ("finished", "stopped")  # so few losses are borne
    if run.ended == "finished":
        assert run.run.step == 60
        assert run.run.epochs == 8
        assert run.evaluated == (list(range(8)) if validates else [])
    else:
        assert run.goals.stopping


@settings(max_examples=100, deadline=None)
@given(REQUESTS, LOSSES, st.booleans(), MOMENTS)
def test_every_stop_is_granted(requests: Any, losses: Any, comes: bool, at: float) -> None:
    run = imagined([*requests, (at, {"stopping": True})], losses, comes, False, True)
    run.go()
    if run.ended == "stopped":
        late = run.now - run.stopped_at
        losses_meanwhile = sum(isinstance(action, Recover) for action in run.done)
        assert late < 0.75 + 3 * losses_meanwhile
    steps_after = [a for a in run.done if isinstance(a, OrderSegment) and a.number > run.goals.number]
    assert steps_after == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(MOMENTS, st.integers(1, 12)), min_size=1, max_size=5), LOSSES, st.booleans())
def test_a_target_is_reached_or_given_up(targets: Any, losses: Any, comes: bool) -> None:
    run = imagined([(at, {"target": target}) for at, target in targets], losses, comes, False, True)
    run.run, run.step_seconds = replace(run.run, steps=400), 0.25
    run.go()
    assert run.group.staged is None
    wanted = sorted(targets, key=lambda pair: pair[0])[-1][1]  # the last of those at one moment
    there = len(run.there)
    if wanted <= there:
        assert run.goals.target == len(run.group.members) == wanted
    elif run.group.lost_at > run.goals.asked_at:  # whoever comes in place of the lost is waited for
        assert (run.goals.target, len(run.group.members)) == (wanted, there)
    else:
        assert not comes
        assert run.goals.target == len(run.group.members) == there
        assert [action.target for action in run.done if isinstance(action, GiveUp)][-1] == wanted


@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.booleans())
def test_without_a_loss_nothing_is_done_twice(requests: Any, orders_ahead: bool) -> None:
    run = imagined(requests, [], True, False, orders_ahead)
    run.go()
    assert not [action for action in run.done if isinstance(action, Recover | Lose | Fail | DropChange)]
    formed = [action for action in run.done if isinstance(action, Form)]
    assert len(formed) <= 1 + sum("target" in change for _, change in requests) * 2
    assert run.goals.rate is None or run.ended == "stopped" or run.run.step == 60
