"""In which order a run orders segments, and when it does not order ahead."""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.errors import InputError, RunFailed, WorkerLost
from parakit.events.records import EpochEnded, SegmentDone
from parakit.pacing import NEWS_SECONDS
from parakit.workers.dask.session import DaskSession
from parakit.workers.inline import InlineSession, InlineWorkers
from parakit.workers.session import Job, Report
from tests.runs.test_exact import wait_for

LIMIT = 60


class AheadSession(InlineSession):
    """A session that takes an order while another has no report yet, and tells of all that is asked of it."""

    orders_ahead = True

    def __init__(self, job: Job, threads: int, log: list[tuple[Any, ...]]) -> None:
        super().__init__(job, threads)
        self._log = log
        self._queue: deque[tuple[int, int, int]] = deque()

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:  # noqa: ARG002
        self._log.append(("order", first, count))
        self._queue.append((first, count, request))

    def report(self) -> Report:
        first, count, request = self._queue.popleft()
        if self._engine.step != first:
            self._log.append(("left out", first))
            return Report(tuple([] for _ in self._holdings), 0.0)
        report = self._advance(first, count, request)
        self._log.append(("report", first, report.steps))
        return report

    def form(self, *args: Any) -> Any:
        self._log.append(("form", len(self._queue)))
        return super().form(*args)

    def state(self, step: int) -> Any:
        self._log.append(("state", len(self._queue)))
        assert step == self._engine.step
        return super().state(step)

    def evaluate(self) -> Any:
        self._log.append(("evaluate", len(self._queue)))
        return super().evaluate()

    def set_learning_rate(self, value: float) -> None:
        self._log.append(("rate", len(self._queue)))
        super().set_learning_rate(value)


class AheadWorkers(InlineWorkers):
    """Inline workers whose session takes orders ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []

    def open(self, job: Job) -> InlineSession:
        return AheadSession(job, 1, self.log)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(64, 10)


def train(on: pk.Workers, **how: Any) -> pk.Run:
    return pk.train(net(), pk.datasets.digits().train, on=on, **{"batch_size": 64, "seed": 1} | how)


def outstanding(log: list[tuple[Any, ...]]) -> list[int]:
    """Orders without a report, after each entry."""
    found, now = [], 0
    for what, *_ in log:
        now += {"order": 1, "report": -1, "left out": -1}.get(what, 0)
        found.append(now)
    return found


def test_a_segment_is_ordered_while_the_one_before_goes_on() -> None:
    pool = AheadWorkers()
    run = train(pool, epochs=60).wait(LIMIT, progress=False)
    assert max(outstanding(pool.log)) == 2
    assert outstanding(pool.log)[-1] == 0
    firsts = [entry[1] for entry in pool.log if entry[0] == "order"]
    counts = [entry[2] for entry in pool.log if entry[0] == "order"]
    assert all(first + count == then for first, count, then in zip(firsts, counts, firsts[1:], strict=False))
    assert firsts[-1] + counts[-1] == run.steps
    assert not [entry for entry in pool.log if entry[0] == "left out"]
    alone = train(pk.connect("inline"), epochs=60).wait(LIMIT, progress=False)
    assert run.history.losses.tolist() == alone.history.losses.tolist()


def test_times_of_segments_add_up_to_the_time_that_went_by() -> None:
    run = train(AheadWorkers(), steps=3000).wait(LIMIT, progress=False)
    segments = run.history.of(SegmentDone)
    assert len(segments) > 3
    whole = segments[-1].at_seconds - (segments[0].at_seconds - segments[0].seconds)
    assert sum(segment.seconds for segment in segments) <= whole
    for before, after in itertools.pairwise(segments):
        assert after.at_seconds - after.seconds >= before.at_seconds - 1e-9


@pytest.mark.dask
def test_a_segment_lasts_as_long_if_its_report_or_the_one_before_comes_late(
    pool: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, number = DaskSession.report, itertools.count()

    def late(session: DaskSession) -> Report:
        found = report(session)
        time.sleep(0.15 * (next(number) % 2))
        return found

    monkeypatch.setattr(DaskSession, "report", late)
    run = train(pool, workers=2, steps=4000).wait(LIMIT, progress=False)
    steps = {step.step: step for step in run.history.steps}
    first, *segments = run.history.of(SegmentDone)
    assert len(steps) == 4000
    assert len(segments) > 4
    for segment in segments:
        mine = [steps[segment.first_step + place] for place in range(segment.steps)]
        for rank in range(2):
            assert sum(sum(step.workers[rank].seconds()) for step in mine) <= segment.seconds * (1 + 1e-9)
    whole = segments[-1].at_seconds - first.at_seconds
    assert sum(segment.seconds for segment in segments) == pytest.approx(whole, abs=0.3)


def test_nothing_is_asked_of_workers_while_an_order_is_under_way() -> None:
    pool = AheadWorkers()
    run = train(pool, workers=1, steps=10**6)
    for change in (
        lambda: run.resize(3), lambda: run.set_learning_rate(0.01), run.pause, run.resume, lambda: run.resize(2),
    ):  # fmt: skip
        before = run.step
        wait_for(run, lambda before=before: run.step > before or run.status == "paused")
        change()
        time.sleep(0.1)
    wait_for(run, lambda: run.world_size == 2)
    time.sleep(1.2)  # the notebook's copy is fetched about once a second
    run.stop()
    run.wait(LIMIT, progress=False)
    asked = [entry for entry in pool.log if entry[0] in ("form", "rate", "state")]
    assert {entry[0] for entry in asked} == {"form", "rate", "state"}
    assert all(entry[1] == 0 for entry in asked)
    done = sum(entry[2] for entry in pool.log if entry[0] == "report")
    assert done == run.step == len(run.history.losses)


def test_an_epoch_is_evaluated_before_the_next_one_is_ordered() -> None:
    pool = AheadWorkers()
    digits = pk.datasets.digits()
    run = pk.train(net(), digits.train, on=pool, batch_size=64, epochs=5, validation=digits.test)
    run.wait(LIMIT, progress=False)
    evaluations = [entry for entry in pool.log if entry[0] == "evaluate"]
    assert len(evaluations) == len(run.history.of(EpochEnded)) == 5
    assert all(entry[1] == 0 for entry in evaluations)


def test_who_watches_has_news_more_often(inline: pk.Workers) -> None:
    run = train(inline, steps=10**6)
    for wrong in (0, -1, "often", True, float("nan")):
        with pytest.raises(InputError, match=r"seconds is .*; it must be a number above 0, or None"):
            run.want_news(wrong)  # type: ignore[arg-type]
    run.want_news(0.5)
    assert run.news_seconds == 0.5
    panel = pk.panel(run)
    assert run.news_seconds == NEWS_SECONDS
    panel.close()
    assert run.news_seconds == float("inf")
    run.stop()
    run.wait(LIMIT, progress=False)


class UnreadySession(InlineSession):
    """A session of which somebody is lost again and again before the group is formed."""

    def __init__(self, job: Job, losses: int) -> None:
        super().__init__(job, 1)
        self._losses = losses

    def form(self, *args: Any) -> Any:
        self._losses -= 1
        if self._losses >= 0:
            raise WorkerLost("worker 3 could not be sent its data")
        return super().form(*args)


class UnreadyWorkers(InlineWorkers):
    """Their cluster takes a moment to notice who is gone."""

    def __init__(self, losses: int) -> None:
        super().__init__()
        self._losses = losses

    def open(self, job: Job) -> InlineSession:
        return UnreadySession(job, self._losses)


def test_a_cluster_has_time_to_notice_who_is_gone() -> None:
    began = time.monotonic()
    run = train(UnreadyWorkers(6), steps=5).wait(LIMIT, progress=False)
    assert run.status == "finished"
    assert 1.0 < time.monotonic() - began < 10.0  # six tries in a few milliseconds would all meet the same


def test_losses_without_end_end_a_run_in_words() -> None:
    run = train(UnreadyWorkers(100), steps=5)
    with pytest.raises(RunFailed, match="worker 3 could not be sent its data"):
        run.wait(LIMIT, progress=False)
