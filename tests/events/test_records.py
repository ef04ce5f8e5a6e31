"""Events as plain records, and the history that keeps them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from parakit.errors import InputError
from parakit.events import records
from parakit.events.history import History
from parakit.events.reader import event_from_dict
from parakit.events.records import (
    PHASES,
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
    WorkerStep,
)


def part(worker: str = "w0", samples: int = 3) -> WorkerStep:
    return WorkerStep(worker, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, samples)


def step(number: int, loss: float = 1.0, workers: tuple[WorkerStep, ...] = (), at: float | None = None) -> StepDone:
    return StepDone(float(number) if at is None else at, number, 0, loss, 6, 0.01, 0.1, len(workers), 0, workers)


EVENTS = [
    RunStart(0.0, "AllReduce()", ("w0", "w1"), "inline", 2, 1, 650, 1437, 64, 256, 12, 6, 0),
    Resized(0.1, 0, 0, ("w0", "w1"), 64, 0.05, 0.0),
    StepDone(0.2, 0, 0, 2.3, 256, 0.01, 0.1, 2, 0, (part("w0", 128), part("w1", 128))),
    GradientNorms(0.3, 0, (2.5, 0.5), (130, 126), 1.25),
    SegmentDone(0.3, 0, 1, 0.02, 0.01, 0.001, 256, 2, 0),
    Requested(0.4, "pause", None),
    Requested(0.5, "resize", 4),
    Requested(0.55, "learning rate", 0.05),
    EpochEnded(0.6, 0, 6, None, None, 0.01),
    EpochEnded(0.7, 1, 12, 0.5, 0.9, 0.01),
    Baseline(0.75, "plain PyTorch", 2, 12_300.0, 11_900.0, 12_600.0, 57),
    WorkersLost(0.76, ("worker 1",), 7, "1 of 2 workers died: worker 1."),
    Recovered(0.77, ("worker 0",), 7, 0.2, 32, 0),
    SlowWorker(0.78, "worker 0", 2.4, False),
    Said(0.8, "Zwei Prozesse – ein Modell."),
    RunEnd(0.9, "finished", 12, ""),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_survives_a_dict_and_json(event: Event) -> None:
    assert event_from_dict(event.to_dict()) == event
    revived = event_from_dict(json.loads(json.dumps(event.to_dict())))
    assert revived == event
    assert hash(revived) == hash(event)  # lists would have become tuples again


def test_what_will_be_done_again_is_taken_back() -> None:
    history = History()
    history.append(step(0), step(1), SegmentDone(1.1, 0, 2, 0.1, 0.0, 0.0, 12, 2, 0))
    history.append(step(2), step(3), SegmentDone(3.1, 2, 2, 0.1, 0.0, 0.0, 12, 2, 0), Said(3.2, "what was said"))
    history.retract(2)
    assert [done.step for done in history.steps] == [0, 1]
    assert [segment.first_step for segment in history.of(SegmentDone)] == [0]
    assert history.of(Said)


def test_every_kind_of_event_is_tried_here() -> None:
    kinds = {value for value in vars(records).values() if isinstance(value, type) and issubclass(value, Event)}
    assert {type(event) for event in EVENTS} == kinds - {Event}


def test_a_loss_that_is_no_number_survives_json() -> None:
    history = History()
    history.append(step(0, math.nan), step(1, math.inf))
    again = History.from_json(history.to_json())
    assert np.isnan(again.losses[0])
    assert again.losses[1] == math.inf


def test_a_history_survives_json_in_the_order_of_time() -> None:
    history = History()
    history.append(*reversed(EVENTS))
    again = History.from_json(history.to_json())
    assert list(again) == EVENTS
    assert again.to_dicts() == history.to_dicts()


def changed(event: Event, **values: Any) -> dict[str, Any]:
    return {**event.to_dict(), **values}


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


START, DONE = EVENTS[0], EVENTS[2]
WORKER = dataclasses.asdict(part())


NO_EVENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "unknown kind": {"kind": "Eruption", "at_seconds": 0.0},
    "kind of none": {"kind": None, "at_seconds": 0.0},
    "the base of all": {"kind": "Event", "at_seconds": 0.0},
    "no kind": without(EVENTS[-1].to_dict(), "kind"),
    "missing field": without(DONE.to_dict(), "loss"),
    "unknown field": changed(DONE, extra=1),
    "text for a number": changed(DONE, loss="2.3"),
    "none for a number": changed(DONE, loss=None),
    "fraction for a count": changed(DONE, step=1.5),
    "text for a count or none": changed(EVENTS[4], value="4"),
    "none for a text": changed(EVENTS[4], request=None),
    "worker lacks a field": changed(DONE, workers=[without(WORKER, "samples")]),
    "worker with an unknown field": changed(DONE, workers=[{**WORKER, "extra": 1}]),
    "text for a worker's seconds": changed(DONE, workers=[{**WORKER, "idle_seconds": "long"}]),
    "text for a worker's record": changed(DONE, workers=["w0"]),
    "number for workers' records": changed(DONE, workers=2),
    "number for workers' names": changed(START, workers=2),
    "text for workers' names": changed(START, workers="w0"),
    "number for a worker's name": changed(START, workers=[0]),
}


@pytest.mark.parametrize("wrong", NO_EVENTS)
def test_what_is_no_event_is_refused(wrong: str) -> None:
    with pytest.raises(InputError):
        event_from_dict(NO_EVENTS[wrong])


@pytest.mark.parametrize("text", ["", "{", "3", '{"kind": "Said"}', "[1]", '["Said"]'])
def test_a_text_that_holds_no_events_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        History.from_json(text)


def test_a_history_of_a_run_of_any_length_stays_small() -> None:
    history = History(capacity=1000)
    workers = (part(),)
    for number in range(500_000):
        history.append(step(number, workers=workers))
    assert len(history) == len(history.steps) <= 1000
    assert history.total == 500_000
    assert history.thinned == 500_000 - len(history)
    numbers = np.array([kept.step for kept in history.steps])
    assert (np.diff(numbers) > 0).all()
    assert numbers[0] == 0
    assert numbers[-400:].tolist() == list(range(499_600, 500_000))  # what is new is complete


def test_a_history_keeps_the_whole_course_of_a_run() -> None:
    history = History(capacity=1000)
    for number in range(100_000):
        history.append(step(number))
    kept = [kept.step for kept in history.steps]
    each_tenth, _ = np.histogram(kept, bins=10, range=(0, 100_000))
    assert each_tenth.min() >= 5, f"steps kept of each tenth of the course: {each_tenth}"


@pytest.mark.parametrize("capacity", [4, 5, 7])
def test_the_first_and_the_newest_records_survive_in_the_smallest_history(capacity: int) -> None:
    history = History(capacity)
    for number in range(100):
        history.append(step(number), Said(float(number), str(number)))
        assert len(history.steps) <= capacity
        assert len(history.of(Said)) <= capacity
        assert history.steps[0].step == 0
        assert [kept.step for kept in history.steps[-2:]] == [number - 1, number][-len(history.steps) :]
        assert history.of(Said)[0].text == "0"
        assert history.latest(Said) == Said(float(number), str(number))


def test_a_history_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="at least 4 records, not 3"):
        History(capacity=3)


def test_several_threads_may_write_while_others_read() -> None:
    history, failures = History(capacity=500), []
    done = threading.Event()

    def write(first: int) -> None:
        for number in range(first, first + 4000):
            history.append(step(number, workers=(part(),)), Said(float(number), "…"))

    def read() -> None:
        try:
            while not done.is_set():
                assert len(history) <= 1000
                assert len(history.losses) <= 500
                assert all(isinstance(event, Event) for event in history)
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(10_000 * n,)) for n in range(4)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert history.total == 4 * 4000 * 2
    assert history.thinned == 4 * 4000 - len(history.steps)
    newest = {10_000 * n + 3999 for n in range(4)}
    assert newest & {kept.step for kept in history.steps}


def test_events_are_found_by_their_kind() -> None:
    history = History()
    assert history.latest(Resized) is None
    assert history.of(StepDone) == ()
    history.append(*EVENTS)
    assert history.of(Requested) == tuple(EVENTS[5:8])
    assert history.latest(Requested) == EVENTS[7]
    assert history.of(StepDone) == history.steps == (EVENTS[2],)
    assert len(history) == len(EVENTS)


def test_losses_are_those_of_the_steps() -> None:
    history = History()
    assert history.losses.shape == (0,)
    history.append(step(0, 2.0), Said(0.5, "…"), step(1, 1.0))
    assert history.losses.dtype == np.float64
    assert history.losses.tolist() == [2.0, 1.0]


def test_a_frame_has_one_row_a_step_and_worker() -> None:
    history = History()
    history.append(step(0, 2.0, (part("a", 4),)), step(1, 1.0, (part("a", 2), part("b", 5))), Said(3.0, "…"))
    frame = history.to_frame()
    assert list(zip(frame["step"], frame["rank"], frame["worker"], strict=True)) == [
        (0, 0, "a"),
        (1, 0, "a"),
        (1, 1, "b"),
    ]
    assert frame["loss"].tolist() == [2.0, 1.0, 1.0]
    assert frame["worker_samples"].tolist() == [4, 2, 5]
    assert frame["samples"].tolist() == [6, 6, 6]
    phases = frame[[f"{phase}_seconds" for phase in PHASES]].to_numpy()
    assert np.allclose(phases, part().seconds())


def test_seconds_follow_the_order_of_the_phases() -> None:
    assert PHASES == ("data", "forward", "backward", "exchange", "update", "idle")
    assert part().seconds() == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVENTS[0].at_seconds = 1.0  # type: ignore[misc]


def test_a_history_says_what_it_holds() -> None:
    history = History()
    assert repr(history) == "<History: no step yet>"
    history.append(Said(0.0, "…"), step(0, 2.5, (part(),)), step(1, 0.25, (part("a"), part("b"))))
    assert repr(history) == "<History: 2 steps, loss 2.5 to 0.25, world sizes 1, 2, 3 events kept>"


def test_newer_finds_what_came_after_a_moment() -> None:
    history = History()
    assert history.newer(StepDone, 0.0) == ()
    history.append(*(step(number, at=number / 2) for number in range(6)), Said(1.0, "…"))
    assert history.newer(StepDone, -1.0) == history.steps
    assert [found.step for found in history.newer(StepDone, 1.0)] == [3, 4, 5]  # the one at this moment is known
    assert [found.step for found in history.newer(StepDone, 1.2)] == [3, 4, 5]
    assert history.newer(StepDone, 2.5) == history.newer(StepDone, 99.0) == ()
    assert history.newer(Said, 0.5) == (Said(1.0, "…"),)


def test_newer_costs_little_in_a_long_history() -> None:
    history = History()
    history.append(*(step(number) for number in range(40_000)))
    began = time.perf_counter()
    for _ in range(1000):
        assert len(history.newer(StepDone, 39_990.0)) == 9
    assert time.perf_counter() - began < 1  # a copy of all would take a hundred times as long


def table() -> History:
    history = History()
    history.append(step(0, math.nan, (part("a", 4),)), step(1, 0.1, (part('the "b", ä', 2), part("b", 5))))
    return history


def test_csv_has_the_rows_and_columns_of_the_frame() -> None:
    frame, text = table().to_frame(), table().to_csv()
    lines = list(csv.reader(io.StringIO(text)))
    assert lines[0] == list(frame.columns)
    assert len(lines) == 1 + len(frame) == 4
    again = pandas.read_csv(io.StringIO(text))
    pandas.testing.assert_frame_equal(again, frame)
    assert "\r" not in text


def test_a_table_of_no_steps_has_its_columns() -> None:
    assert History().to_csv().splitlines() == [",".join(table().to_frame().columns)]
    assert list(History().to_frame().columns) == list(table().to_frame().columns)


def test_a_history_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = table()
    history.append(*EVENTS)
    place = tmp_path / "run.json"
    assert history.save(str(place)) == place
    assert History.from_json(place.read_text(encoding="utf-8")).total == history.total
    assert history.save(tmp_path / "RUN.CSV").read_text(encoding="utf-8") == history.to_csv()
    kept = place.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        History().save(place)
    assert place.read_bytes() == kept
    assert sorted(found.name for found in tmp_path.iterdir()) == ["RUN.CSV", "run.json"]


def test_a_history_is_not_saved_where_or_as_what_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'run\.txt'.*\.json or \.csv"):
        History().save(tmp_path / "run.txt")
    with pytest.raises(InputError, match=r"no folder .*nowhere"):
        History().save(tmp_path / "nowhere" / "run.csv")
    assert list(tmp_path.iterdir()) == []
