"""Progress in words."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from parakit.events import records
from parakit.events.history import History
from parakit.events.log import sentence
from parakit.events.progress import progress_line, samples_per_second
from parakit.events.records import (
    Baseline,
    EpochEnded,
    Event,
    GradientNorms,
    Recovered,
    Requested,
    Resized,
    RunEnd,
    RunStart,
    Said,
    SegmentDone,
    SlowWorker,
    StepDone,
    WorkersLost,
)

SENTENCES: list[tuple[Event, str]] = [
    (RunStart(0.0, "AllReduce()", ("a", "b"), "inline", 2, 1, 650, 1437, 64, 256, 240, 6, 0),
     "Started with 2 workers: AllReduce(), batch of 256, 240 steps"),
    (RunStart(0.0, "AllReduce()", ("a",), "inline", 2, 1, 650, 1437, 64, 256, 12_000, 6, 0),
     "Started with 1 worker: AllReduce(), batch of 256, 12,000 steps"),
    (RunStart(0.0, "AllReduce()", ("a",), "inline", 2, 1, 650, 1437, 64, 256, 1, 6, 0),
     "Started with 1 worker: AllReduce(), batch of 256, 1 step"),
    (Requested(1.0, "resize", 4), "4 workers asked for"),
    (Requested(1.0, "resize", 1), "1 worker asked for"),
    (Requested(1.0, "pause", None), "Pause asked for"),
    (Requested(1.0, "resume", None), "Resume asked for"),
    (Requested(1.0, "stop", None), "Stop asked for"),
    (Requested(1.0, "learning rate", 0.05), "Learning rate 0.05 asked for"),
    (Requested(1.0, "measure", None), "A measurement of plain PyTorch asked for"),
    (Resized(1.0, 0, 0, ("a", "b"), 64, 0.1, 0.0), "2 workers ready"),
    (Resized(1.0, 120, 1, ("a", "b"), 32, 0.1, 0.137),
     "2 workers since step 120 (0.14 s after the wish, 32 chunks moved)"),
    (Resized(1.0, 120, 1, ("a",), 1, 0.1, 0.1), "1 worker since step 120 (0.10 s after the wish, 1 chunk moved)"),
    (StepDone(1.0, 0, 0, 2.3, 256, 0.01, 0.1, 2, 0, ()), ""),
    (GradientNorms(1.0, 0, (2.5, 0.5), (130, 126), 1.25), ""),
    (SegmentDone(1.0, 0, 1, 0.02, 0.01, 0.001, 256, 2, 0), ""),
    (EpochEnded(1.0, 2, 18, None, None, 0.1), ""),
    (EpochEnded(1.0, 2, 18, 0.21, 0.931, 0.1), "Epoch 3: validation loss 0.21, accuracy 93.1 %"),
    (EpochEnded(1.0, 2, 18, 0.21, None, 0.1), "Epoch 3: validation loss 0.21"),
    (Baseline(1.0, "plain PyTorch", 2, 12_312.0, 11_871.0, 12_630.0, 9),
     "plain PyTorch with all 2 cores: 12,300 samples/s (11,900 to 12,600)"),
    (Baseline(1.0, "plain PyTorch", 1, 7.123, 6.5, 99.96, 9),
     "plain PyTorch with 1 core: 7.12 samples/s (6.5 to 100)"),
    (WorkersLost(1.0, ("worker 1",), 7, "1 of 2 workers died: worker 1."),
     "Worker 1 lost after step 7: 1 of 2 workers died: worker 1."),
    (WorkersLost(1.0, (), 7, "no answer"), "The group broke after step 7: no answer"),
    (Recovered(1.0, ("worker 0",), 7, 0.213, 32, 0),
     "Going on from step 7 with 1 worker after 0.21 s, 32 chunks loaded again"),
    (Recovered(1.0, ("a", "b"), 7, 0.2, 0, 3),
     "Going on from step 7 with 2 workers after 0.20 s, 3 steps to be done again"),
    (Resized(1.0, 7, 3, ("a", "b"), 31, 0.1, 0.0), "2 workers again since step 7 (31 chunks moved)"),
    (Resized(1.0, 7, 2, ("a",), 0, 0.1, 0.0), ""),
    (SlowWorker(1.0, "worker 1", 2.44, False),
     "worker 1 is slow: it takes 2.4 times as long as the median of the others"),
    (SlowWorker(1.0, "worker 1", 1.0, True), "worker 1 is as fast as the others again"),
    (Said(1.0, "Zwei Prozesse – ein Modell."), "Zwei Prozesse – ein Modell."),
    (RunEnd(1.0, "finished", 240, ""), "Finished after step 240"),
    (RunEnd(1.0, "finished", 12_000, ""), "Finished after step 12,000"),
    (RunEnd(1.0, "finished", 100, "stopped"), "Stopped after step 100"),
    (RunEnd(1.0, "failed", 100, "The run failed after step 100: ValueError: no\nLikely cause: a"),
     "Failed after step 100: ValueError: no"),
    (RunEnd(1.0, "failed", 3, "Step 3 failed on worker 1: E: f\nRemedy: r"),
     "Failed after step 3: Step 3 failed on worker 1: E: f"),
    (RunEnd(1.0, "failed", 3, ""), "Failed after step 3: no reason is known"),
]  # fmt: skip


@pytest.mark.parametrize(("event", "expected"), SENTENCES, ids=lambda value: type(value).__name__)
def test_an_event_in_a_sentence(event: Event, expected: str) -> None:
    assert sentence(event) == expected


def test_every_kind_of_event_has_its_sentence_here() -> None:
    kinds = {value for value in vars(records).values() if isinstance(value, type) and issubclass(value, Event)}
    assert {type(event) for event, _ in SENTENCES} == kinds - {Event}


def test_an_early_end_is_told_against_the_whole_where_that_is_known() -> None:
    assert sentence(RunEnd(1.0, "finished", 100, "stopped"), steps=240) == "Stopped after step 100 of 240"
    assert sentence(RunEnd(1.0, "finished", 240, ""), steps=240) == "Finished after step 240"


def run_with(history: History) -> Any:
    return SimpleNamespace(history=history, step=30, steps=90, world_size=2)


def segment(at: float, samples: int, seconds: float, world_size: int = 2) -> SegmentDone:
    return SegmentDone(at, 0, 1, seconds, 0.0, 0.0, samples, world_size, 0)


def test_the_rate_is_that_of_the_last_segments_and_of_no_time_between_them() -> None:
    history = History()
    assert math.isnan(samples_per_second(run_with(history)))
    history.append(segment(1.0, 900, 1.0), segment(10.0, 100, 0.5), segment(11.0, 200, 0.5))
    assert samples_per_second(run_with(history)) == 300
    assert samples_per_second(run_with(history), window_seconds=100) == 600


def test_the_rate_after_a_resize_is_that_of_the_present_workers() -> None:
    history = History()
    history.append(StepDone(1.0, 29, 2, 0.5, 200, 0.5, 0.1, 1, 0, ()), segment(1.0, 9000, 0.5, 1))
    assert math.isnan(samples_per_second(run_with(history)))
    assert ", ? samples/s, 2 workers, ? left" in progress_line(run_with(history))
    history.append(segment(1.5, 200, 0.5))
    assert samples_per_second(run_with(history)) == 400
    assert progress_line(run_with(history)).endswith("400 samples/s, 2 workers, 0:30 left")


def test_a_rate_has_three_digits_and_a_large_number_has_commas() -> None:
    history = History()
    history.append(StepDone(1.0, 4752, 792, 0.0029, 200, 0.5, 0.1, 2, 0, ()), segment(1.0, 30_190, 0.5))
    run = run_with(history)
    run.step, run.steps = 4753, 54_000
    line = progress_line(run)
    assert line == "epoch 793, step 4,753/54,000, loss 0.0029, 60,400 samples/s, 2 workers, 2:43 left"


def test_a_line_of_progress() -> None:
    history = History()
    assert progress_line(run_with(history)) == "starting"
    history.append(StepDone(1.0, 29, 2, 0.5, 200, 0.5, 0.1, 2, 0, ()), segment(1.0, 200, 0.5))
    line = progress_line(run_with(history))
    assert line == "epoch 3, step 30/90, loss 0.5000, 400 samples/s, 2 workers, 0:30 left"
    assert ", 400 samples/s, efficiency 87 %, 2 workers" in progress_line(run_with(history), efficiency=0.871)
