"""Waiting while workers live: who is done, who is gone, who hangs and who is late, without any Dask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import pytest

from parakit.workers.commands import Heartbeat
from parakit.workers.dask.liveness import Limits, Outcome, await_while_alive

QUICK = 0.01


class Workers:
    """Workers that are there, and answer at once with what they are to say; None for those that say nothing."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.says: dict[str, Heartbeat | None] = {name: Heartbeat(0.0, False) for name in names}
        self.asked: list[str] = []
        self.stands_still = 0.0  # how long this process itself does, in the first wait

    def ask_heartbeat(self, name: str, run_id: str) -> Future[Heartbeat]:
        assert run_id == "a run"
        self.asked.append(name)
        answer: Future[Heartbeat] = Future()
        said = self.says[name]
        if said is not None:
            answer.set_result(said)
        return answer

    def wait_for_one(self, futures: Sequence[Future[Any]], limit_seconds: float) -> list[Future[Any]]:
        wait(futures, limit_seconds, "FIRST_COMPLETED")
        time.sleep(self.stands_still)
        self.stands_still = 0.0
        return [future for future in futures if not future.done()]


@pytest.fixture
def workers() -> Workers:
    return Workers("a", "b")


def orders(*done: bool) -> list[Future[int]]:
    """One each, of which some are done."""
    futures: list[Future[int]] = [Future() for _ in done]
    for future, is_done in zip(futures, done, strict=True):
        if is_done:
            future.set_result(1)
    return futures


def within(seconds: float, futures: Sequence[Future[int]], workers: Workers, limits: Limits) -> Outcome:
    began = time.monotonic()
    outcome = await_while_alive(workers, futures, ["a", "b"], limits, "a run")
    assert time.monotonic() - began < seconds
    return outcome


def test_orders_that_are_done_are_not_waited_for_and_nobody_is_asked(workers: Workers) -> None:
    assert within(1, orders(True, True), workers, Limits(1.0, 1.0, 1.0)) == Outcome()
    assert not workers.asked


def test_nothing_to_wait_for_is_done(workers: Workers) -> None:
    assert await_while_alive(workers, [], [], Limits()) == Outcome()


def test_whoever_is_gone_is_found_and_the_others_need_not_answer_if_they_have(workers: Workers) -> None:
    futures = orders(True, False)
    workers.names.remove("b")
    assert within(1, futures, workers, Limits(look_seconds=QUICK)) == Outcome((futures[1],), frozenset("b"))


def test_partners_of_the_lost_have_a_moment_to_notice(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parakit.workers.dask.liveness._GRACE_SECONDS", 0.3)
    futures = orders(False, False)
    workers.names.remove("b")
    began = time.monotonic()
    assert within(2, futures, workers, Limits(look_seconds=QUICK)).gone == {"b"}
    assert time.monotonic() - began >= 0.3


def test_what_all_work_on_ends_with_the_first_that_is_gone(workers: Workers) -> None:
    workers.names.remove("a")
    assert within(1, orders(False), workers, Limits(look_seconds=QUICK)).gone == {"a"}


def test_whoever_gives_no_sign_of_life_hangs_and_nobody_else_does(workers: Workers) -> None:
    workers.says["b"] = None
    outcome = within(2, orders(False, False), workers, Limits(0.2, look_seconds=QUICK))
    assert list(outcome.hung) == ["b"]
    assert outcome.hung["b"].startswith("gave no sign of life for 0.")
    assert outcome.blamed == outcome.hung
    assert workers.asked.count("b") == 1  # one question at a time


def test_whoever_makes_no_progress_hangs_but_not_whoever_waits_for_partners(workers: Workers) -> None:
    workers.says = {"a": Heartbeat(9.0, True), "b": Heartbeat(5.0, False)}
    outcome = within(2, orders(False, False), workers, Limits(1.0, 4.0, look_seconds=QUICK))
    assert outcome.hung == {"b": "made no progress in 5.0 s, though its process answers"}


def test_of_those_that_are_late_the_ones_that_wait_for_partners_are_not_to_blame(workers: Workers) -> None:
    workers.says = {"a": Heartbeat(0.0, True), "b": Heartbeat(0.0, False)}
    outcome = within(2, orders(False, False), workers, Limits(0.2, 9.0, 0.5, QUICK))
    assert outcome.late == {"b": "did not carry out an order within 0.5 s"}
    assert not outcome.hung


def test_without_a_limit_for_heartbeats_nobody_is_asked_for_one(workers: Workers) -> None:
    outcome = within(2, orders(False, False), workers, Limits(whole_seconds=0.1, look_seconds=QUICK))
    assert set(outcome.late) == {"a", "b"}
    assert not workers.asked


def test_time_in_which_this_process_stood_still_is_held_against_nobody(workers: Workers) -> None:
    workers.says["b"] = None
    workers.stands_still = 1.0
    began = time.monotonic()
    assert list(within(3, orders(False, False), workers, Limits(0.4, look_seconds=QUICK)).hung) == ["b"]
    assert time.monotonic() - began > 1.0 + 0.3
