"""Parts of a panel by themselves: its stages, its thread, and when plain PyTorch is timed again."""

from __future__ import annotations

import threading

from parakit.events.records import Baseline
from parakit.events.summary import PLAIN, RunSummary
from parakit.widgets.baseline_schedule import BaselineSchedule
from parakit.widgets.life import Life, Stage
from parakit.widgets.watcher import Watcher
from tests.events.test_summary import followed, segments, started


def measured(high: float, seconds: int) -> RunSummary:
    return followed(started(), *segments([1] * 4 * seconds), Baseline(0.1, PLAIN, 2, 900.0, 500.0, high, 9))


def test_plain_pytorch_is_timed_again_while_it_is_uncertain_and_after_an_itinerary() -> None:
    schedule = BaselineSchedule()
    assert not schedule.due(followed(started()), came_home=True)  # it was not measured at all
    assert not schedule.due(measured(501.0, 8), came_home=False)
    assert not schedule.due(measured(999.0, 5), came_home=False)  # too soon
    assert schedule.due(measured(999.0, 8), came_home=False)
    assert not schedule.due(measured(999.0, 8), came_home=False)  # later each time
    assert schedule.due(measured(501.0, 1), came_home=True)
    assert schedule.due(measured(999.0, 99), came_home=False)
    assert not schedule.due(measured(999.0, 99), came_home=True)  # often enough


def test_a_life_ends_once() -> None:
    life = Life()
    assert (life.stage, life.settled) == (Stage.READY, False)
    assert life.settle()
    assert not life.settle()
    assert life.settled


def test_a_watcher_looks_until_there_is_nothing_more_to_see() -> None:
    paces, ended = [0.0, 0.0, None], threading.Event()
    Watcher(lambda: paces.pop(0), ended.set, 0.0).start()
    assert ended.wait(5)
    assert paces == []


def test_a_watcher_that_is_told_to_leave_is_gone_and_ends_nothing() -> None:
    looked, ended = threading.Event(), threading.Event()
    watcher = Watcher(lambda: looked.set() or 0.01, ended.set, 0.0)
    before = threading.active_count()
    watcher.start()
    assert looked.wait(5)
    watcher.leave()
    assert threading.active_count() == before
    assert not ended.is_set()


def test_a_watcher_may_be_told_to_leave_before_it_starts() -> None:
    Watcher(lambda: None, lambda: None, 0.0).leave()
