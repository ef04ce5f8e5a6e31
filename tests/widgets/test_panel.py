"""The control room over real runs, driven as a notebook's front end would: its widgets are set and clicked."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import pytest
import torch
from ipywidgets.widgets import widget as widget_registry
from torch import nn
from torch.optim import lr_scheduler as schedules

import parakit as pk
from parakit.errors import (
    DataError,
    InputError,
    ModelError,
    ParakitError,
    PoolError,
    RunEnded,
    RunError,
    WorkerCountError,
)
from parakit.events.history import History
from parakit.events.records import Baseline, Requested, Resized, RunEnd, Said, SegmentDone
from parakit.events.summary import PLAIN, RunSummary
from parakit.plots import live
from parakit.widgets import Panel, baseline_schedule, report, tour
from parakit.widgets.controls import Controls
from parakit.widgets.tour import Itinerary, Steering, stops_up_to
from tests.events.test_summary import followed, segments, started
from tests.runs.test_exact import Slowed, wait_for
from tests.runs.test_run import FailsLate
from tests.waiting import until

LIMIT = 30
DIGITS = pk.datasets.digits().train


def net() -> nn.Module:
    torch.manual_seed(0)
    return Slowed(nn.Linear(64, 10))


def endless(on: pk.Workers, **how: Any) -> pk.Run:
    return pk.train(net(), DIGITS, on=on, **{"steps": 100_000} | how)


@contextmanager
def opened(*subject: Any, **how: Any) -> Iterator[Panel]:
    """A panel that is closed at the end; without baselines unless they are asked for."""
    room = pk.panel(*subject, **{"baselines": False} | how)
    try:
        yield room
    finally:
        room.close()
        if room.run is not None:
            room.run.stop()
            with suppress(RunError):
                room.run.wait(30, progress=False)  # the pool is free then


def status(room: Panel) -> str:
    return str(room._controls.status.value)


def closed(room: Panel) -> bool:
    return repr(room).startswith("<Panel (closed)")


def last_words(room: Panel) -> tuple[bytes | None, str]:
    return room._screen.last_words(room.run)


def asked(run: pk.Run, request: str = "resize") -> list[Any]:
    return [event.value for event in run.history.of(Requested) if event.request == request]


def said(room: Panel) -> set[str]:
    return {text for _, text in room._summary.log}


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "parakit-panel"]


@pytest.fixture(autouse=True)
def no_watcher_is_left() -> Iterator[None]:
    before = set(watchers())
    yield
    until(lambda: not set(watchers()) - before, 5)


@pytest.fixture
def short_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop takes as long as it takes to have a rate at all."""
    monkeypatch.setattr(tour, "_STAY_SECONDS", 0.3)
    monkeypatch.setattr(tour, "_ENOUGH_SEGMENTS", 2)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they show is tested elsewhere."""
    monkeypatch.setattr(live, "_DPI", 20)


# --- steering a run


@pytest.mark.dask
def test_a_slider_resizes_the_run_within_a_second_and_expresses_one_request(pool: pk.Workers) -> None:
    with opened(net(), DIGITS, on=pool, workers=1, steps=100_000) as room:
        controls = room._controls
        controls.start.click()
        run = room.run
        assert run is not None
        wait_for(run, lambda: run.step > 0)
        for control, count in ((controls.workers, 2), (controls.workers_box, 1), (controls.workers, 2)):
            began = time.monotonic()
            control.value = count
            assert controls.workers.value == controls.workers_box.value == count
            wait_for(run, lambda count=count: run.world_size == count)
            assert time.monotonic() - began < 2  # a second, on a machine with nothing else to do
        assert asked(run) == [2, 1, 2]
        until(lambda: "Training: 2 workers active" in status(room))


def test_a_learning_rate_in_the_box_is_used_by_the_next_steps(inline: pk.Workers) -> None:
    with opened(net(), DIGITS, on=inline, steps=100_000, learning_rate=0.2) as room:
        assert room._controls.learning_rate.value == 0.2
        run = room.start()
        wait_for(run, lambda: run.step > 2)
        room._controls.learning_rate.value = 0.03
        wait_for(run, lambda: run.history.steps[-1].learning_rate == 0.03)
        assert run.history.steps[0].learning_rate == 0.2
        assert asked(run, "learning rate") == [0.03]
        room._controls.learning_rate.value = -3
        assert "number above 0" in status(room)
        assert "-3" in status(room)  # what was typed
        assert room._controls.learning_rate.value == 0.03  # what is used, and not what was refused
        assert asked(run, "learning rate") == [0.03]


def test_buttons_pause_resume_and_stop(inline: pk.Workers) -> None:
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        controls = room._controls
        run = room.start()
        wait_for(run, lambda: run.step > 0)
        controls.pause.click()
        until(lambda: controls.pause.description == "Resume")
        assert run.status == "paused"
        until(lambda: "Paused: 1 worker active" in status(room))
        stood = run.step
        time.sleep(0.3)
        assert run.step == stood
        controls.pause.click()
        until(lambda: controls.pause.description == "Pause")
        wait_for(run, lambda: run.step > stood)
        controls.stop.click()
        until(lambda: closed(room) and not watchers())
        assert room._summary.log[-1][1] == f"Stopped after step {run.step:,} of 100,000"
        assert run.stopped_early
        assert [event.request for event in run.history.of(Requested)] == ["pause", "resume", "stop"]
        assert "(closed)" in repr(room)


@pytest.mark.dask
def test_a_tour_visits_every_count_and_comes_home(pool: pk.Workers, short_stays: None) -> None:
    run = endless(pool, workers=2)
    with opened(run) as room:
        room._controls.tour.click()
        until(lambda: re.search("Visiting every worker count: [134] now, then back to 2", status(room)))
        assert room._controls.workers.value == 2  # the request is the same as before
        until(lambda: asked(run) == [1, 2, 3, 4, 2], LIMIT)
        wait_for(run, lambda: run.world_size == 2)
        until(lambda: set(room._summary.rates) == {1, 2, 3, 4})
        assert room._controls.workers.value == 2
        assert "3 workers asked for by the panel" in said(room)
        assert "3 workers asked for" not in said(room)


def test_a_request_by_hand_ends_a_tour(inline: pk.Workers, short_stays: None) -> None:
    run = endless(inline)
    with opened(run) as room:
        room.tour()
        assert room._live is not None
        assert room._live.steering.trip is not None
        room._controls.workers.value = 3
        assert room._live.steering.trip is None
        wait_for(run, lambda: run.world_size == 3)
        time.sleep(0.6)
        assert run.target == 3
        assert any("ended by hand" in text for _, text in room._summary.log)


def test_code_that_resizes_moves_the_slider_and_ends_a_tour(inline: pk.Workers) -> None:
    run = endless(inline)
    with opened(run) as room:
        room.tour()
        until(lambda: asked(run) or run.target == 1)
        run.resize(5)
        until(lambda: room._controls.workers.value == 5)
        assert room._live is not None
        assert room._live.steering.trip is None
        assert asked(run)[-1] == 5
        assert room._controls.workers_box.value == 5


def test_one_worker_is_measured_first_and_then_the_wanted_count_trains(inline: pk.Workers, short_stays: None) -> None:
    with opened(net(), DIGITS, on=inline, workers=3, steps=100_000, baselines=True) as room:
        run = room.start()
        assert run.target == 1
        assert room._controls.workers.value == 3
        until(lambda: "Timing plain PyTorch; training waits: 3 workers asked for, 1 active" in status(room))
        assert run.measuring
        assert "3 workers asked for; first 1 worker is measured" in said(room)
        room._controls.workers.value = 4  # waits for the end of the measurement
        assert run.target == 1
        asked_at = next(at for at, text in room._summary.log if text.startswith("4 workers asked for; first 1"))
        assert not run.history.of(Baseline)
        assert abs(run.elapsed_seconds - asked_at) < 0.5
        wait_for(run, lambda: run.world_size == 4)
        assert asked(run) == [4]
        until(lambda: 1 in room._summary.rates and 4 in room._summary.rates)
        assert run.history.of(Baseline)
        assert not run.measuring
        assert room._summary.speedup(4) > 0
        assert {"A measurement of plain PyTorch asked for by the panel", "4 workers asked for by the panel"} <= said(
            room
        )


def test_without_baselines_nothing_is_measured(inline: pk.Workers) -> None:
    with opened(net(), DIGITS, on=inline, workers=2, steps=100_000) as room:
        run = room.start()
        wait_for(run, lambda: run.step > 30)
        assert run.plan.workers == 2
        assert not run.history.of(Requested)
        assert not run.history.of(Baseline)
        until(lambda: "–: not measured yet" in room._controls.summary.value)


def test_a_tour_first_visits_the_counts_right_after_the_start(inline: pk.Workers, short_stays: None) -> None:
    with opened(net(), DIGITS, on=inline, workers=2, steps=100_000, tour=True) as room:
        run = room.start()
        until(lambda: asked(run) == [1, 2], LIMIT)
        wait_for(run, lambda: run.world_size == 2 and room._live.steering.trip is None)
        assert set(room._summary.rates) >= {1, 2}


# --- what the controls say


def test_controls_that_cannot_be_used_say_why(inline: pk.Workers) -> None:
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        controls = room._controls
        for control in (controls.pause, controls.stop, controls.tour, controls.save):
            assert control.disabled
            assert "press Start first" in control.tooltip
        for control in (controls.start, controls.workers, controls.strategy, controls.batch_size, controls.close):
            assert not control.disabled
        run = room.start()
        until(lambda: controls.start.disabled)
        assert "run the cell again" in controls.start.tooltip
        for control in (controls.strategy, controls.batch_size, controls.epochs):
            assert control.disabled
            assert "fixed while a run goes on" in control.tooltip
        for control in (controls.pause, controls.stop, controls.tour, controls.save, controls.workers):
            assert not control.disabled
        run.pause()
        until(lambda: controls.pause.description == "Resume")
        assert controls.strategy.disabled
        assert not controls.workers.disabled
        controls.show_state("over")
        for control in (controls.pause, controls.stop, controls.tour, controls.workers, controls.workers_box):
            assert control.disabled
            assert control.tooltip == "the run is over"
        assert not controls.save.disabled
        assert not controls.close.disabled


class Rateless(torch.optim.Optimizer):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_an_optimizer_without_a_rate_has_no_rate_to_set(inline: pk.Workers) -> None:
    with opened(net(), DIGITS, on=inline, optimizer=Rateless, steps=100_000) as room:
        assert room._controls.learning_rate.disabled
        assert "no learning rate" in room._controls.learning_rate.tooltip
        run = room.start()
        wait_for(run, lambda: run.step > 0)
        room._controls.learning_rate.value = 0.5
        assert "the optimizer has none" in status(room)
        assert run.status == "running"


def test_the_controls_begin_with_the_options_and_their_values_count(inline: pk.Workers) -> None:
    own = pk.strategies.MapReduce()
    with opened(net(), DIGITS, on=inline, workers=3, strategy=own, batch_size=100, epochs=7) as room:
        controls = room._controls
        assert controls.strategy.options == ("MapReduce", "AllReduce")
        assert (controls.workers.value, controls.batch_size.value, controls.epochs.value) == (3, 100, 7)
        assert controls.batch_size.max == len(DIGITS[0] if isinstance(DIGITS, tuple) else DIGITS.pixels)
        controls.strategy.value = "AllReduce"
        controls.batch_size.value = 200
        controls.epochs.value = 2
        controls.workers.value = 2
        controls.start.click()
        run = room.run
        assert run is not None
        run.wait(LIMIT, progress=False)
        start = run.plan.start
        assert (start.strategy, start.batch_size, run.plan.workers) == ("AllReduce()", 200, 2)
        assert run.steps == 2 * start.steps_per_epoch
        assert not asked(run)


def test_an_own_strategy_trains_as_it_was_given(inline: pk.Workers) -> None:
    own = pk.strategies.MapReduce()
    with opened(net(), DIGITS, on=inline, strategy=own, steps=3) as room:
        assert room.start().wait(LIMIT, progress=False).plan.job.strategy is own


SCHEDULES: dict[str, Any] = {
    "one cycle": partial(schedules.OneCycleLR, max_lr=0.5, total_steps=50),
    "warming up": partial(schedules.LinearLR, start_factor=0.1, total_iters=4),
    "from nothing": partial(schedules.LambdaLR, lr_lambda=lambda epoch: epoch / 4),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_as_it_does_without_a_panel(inline: pk.Workers, name: str) -> None:
    how = {"scheduler": SCHEDULES[name], "scheduler_every": "step", "steps": 6}
    plain = pk.train(net(), DIGITS, on=inline, **how).wait(LIMIT, progress=False)
    with opened(net(), DIGITS, on=inline, **how) as room:
        room._controls.start.click()
        assert room.run is not None, status(room)
        room.run.wait(LIMIT, progress=False)
        rates = [step.learning_rate for step in room.run.history.steps]
    assert rates == [step.learning_rate for step in plain.history.steps]


@pytest.mark.parametrize("baselines", [True, False])
def test_more_workers_than_a_smaller_batch_has_chunks_are_refused_at_the_start(
    inline: pk.Workers, baselines: bool
) -> None:
    with opened(net(), DIGITS, on=inline, workers=8, steps=100_000, baselines=baselines) as room:
        room._controls.batch_size.value = 4
        room._controls.start.click()
        assert room.run is None
        assert "8 workers cannot share 4 chunks" in status(room)
        room._controls.workers.value = 2
        room._controls.start.click()
        assert "cannot share" not in status(room)
        run = room.run
        assert run is not None
        room._controls.workers.value = 5
        if not baselines:
            assert "5 workers cannot share 4 chunks" in status(room)
            assert room._controls.workers.value == 2


def test_errors_are_shown_as_text(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:

        def fail(*_: Any) -> None:
            raise RuntimeError("<script>alert('no')</script> & <img src=x onerror=go()>")

        monkeypatch.setattr(History, "save", fail)
        room._controls.save.click()
        assert "RuntimeError: &lt;script&gt;alert(" in status(room)
        assert "<script" not in status(room)
        assert "<img" not in status(room)
        room._controls.stop.click()  # there is nothing to stop, and no trouble any more
        assert "alert" not in status(room)


def test_names_and_messages_of_a_run_are_shown_as_text() -> None:
    summary = followed(started(), *segments([1] * 5), Said(99.0, "worker <b>one</b> & <script>x</script> is lost"),
                      RunEnd(99.5, "failed", 7, "<img src=x onerror=go()>"))  # fmt: skip
    log = report.log_html(summary.log)
    assert "&lt;script&gt;" in log
    assert not re.search(r"<(?!/?(ul|li)\b)", log)
    summary = report.summary_html(summary, ["<iframe>"])
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td|div)\b)", summary)
    assert "&lt;iframe&gt;" in summary


def test_the_last_text_has_short_lines() -> None:
    rates = {1: 12.5e6, 2: 11.5e6, 3: 10.5e6}
    events = [
        SegmentDone(0.25 * n, n, 1, 0.25, 0.0, 0.0, round(rates[count] / 4), count, count)
        for n, count in enumerate([1] * 4 + [2] * 4 + [3] * 4)
    ]
    saved = "Saved parakit-history-20261125-020342.json and parakit-history-20261125-020342.csv in notebooks/"
    summary = followed(started(), *events, Baseline(98.0, PLAIN, 128, 11e6, 9e6, 30e6, 9), Said(99.0, saved))
    text = report.summary_text(summary, ["The model is in .run.model. " * 7, "/a/path/" + "x" * 200])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 78
    assert lines.count("") == 1
    table = {line.split()[0]: line.split() for line in lines if line.lstrip().startswith(("1", "3", "plain"))}
    assert table["3*"][-1] == "0.95×"
    assert table["plain?"][-1] == "1.00×"
    assert "*: more workers than cores" in lines
    assert "?: uncertain, quartiles more than 1.5 times apart" in lines
    assert saved in " ".join(text.split())


def test_a_headline_says_what_training_waits_for() -> None:
    history = History()
    run = SimpleNamespace(status="running", history=history, world_size=4, measuring=True)
    assert report.headline(run, 2, " (why)").startswith("Starting")
    history.append(*segments([4]))
    assert report.headline(run, 2, " (why)", touring=True) == (
        "Timing plain PyTorch; training waits: 2 workers asked for, 4 active"
    )
    run.status = "paused"
    assert report.headline(run, 4) == "Timing plain PyTorch; the run is paused: 4 workers active"
    run.measuring = False
    assert report.headline(run, 4, " (why)", touring=True) == "Paused: 4 workers active (why)"
    run.status = "running"
    assert report.headline(run, 2, " (why)", touring=True) == "Visiting every worker count: 4 now, then back to 2"
    assert report.headline(run, 2, " (why)") == "Training: 2 workers asked for, 4 active (why)"


def test_what_the_panel_says_has_its_place_in_the_order_of_time() -> None:
    summary = followed(started(), Said(1.0, "first"), Said(9.0, "last"))
    summary.log.append((5.0, "in between"))
    for text in (report.summary_text(summary, []), report.log_html(summary.log)):
        places = [text.index(word) for word in ("first", "in between", "last")]
        assert places in (sorted(places), sorted(places, reverse=True))


def test_a_table_marks_what_is_crowded_and_what_is_uncertain() -> None:
    summary = followed(started(), *segments([1] * 5 + [3] * 5), Baseline(98.0, PLAIN, 2, 900.0, 500.0, 999.0, 9))
    first = [row[0] for row in report.table_rows(summary)]
    assert first == ["1", "3*", "plain PyTorch, 2 cores?"]
    summary = report.summary_html(summary)
    assert "*: more workers than cores; ?: uncertain, quartiles more" in summary
    assert "not measured" not in summary


def test_no_line_of_the_page_begins_with_a_sign_of_per_cent(inline: pk.Workers) -> None:
    summary = report.summary_html(followed(started(), *segments([1] * 5)))
    assert "&nbsp;%" in summary
    assert " %" not in summary
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        room.start()
        until(lambda: "efficiency 100&nbsp;%" in room._controls.progress.value)


def test_a_table_has_room_for_the_rows_that_are_to_come(inline: pk.Workers) -> None:
    height = re.compile(r"min-height:([\d.]+)em")
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        ready = height.findall(room._controls.summary.value)  # before the start
        assert float(ready[0]) == 1.75 * 6  # names, counts 1 to 4, and plain PyTorch
        assert "min-height:1.6em" in room._controls.progress.value
        room.start()
        until(lambda: room._summary.rates)
        until(lambda: "100&nbsp;%" in room._controls.summary.value)
        assert height.findall(room._controls.summary.value) == ready


@pytest.mark.dask
def test_the_axes_before_the_start_are_those_of_the_run(pool: pk.Workers) -> None:
    with opened(net(), DIGITS, on=pool, steps=100_000, workers=1) as room:
        speedup = room._screen.picture.live._plots[2].ax
        ready = speedup.get_xlim(), speedup.get_ylim()
        run = room.start()
        until(lambda: 1 in room._summary.rates)
        until(lambda frames=room.frames: room.frames > frames + 1)
        assert (speedup.get_xlim(), speedup.get_ylim()) == ready
        assert run.status == "running"


def test_picture_and_table_show_one_look(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float]] = []
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        draw, write = room._screen.picture.live.frame, report.summary_html

        def frame(summary: RunSummary) -> bytes:
            shown.append(("picture", summary.seconds))
            return draw(summary)

        def summary(summary: RunSummary, *rest: Any, **how: Any) -> str:
            shown.append(("table", summary.seconds))
            return write(summary, *rest, **how)

        monkeypatch.setattr(room._screen.picture.live, "frame", frame)
        monkeypatch.setattr(report, "summary_html", summary)
        room.start()
        until(lambda: len(shown) > 9)
    pictures = [place for place, (what, _) in enumerate(shown[:-1]) if what == "picture"]
    assert len(pictures) > 3
    assert all(shown[place + 1] == ("table", shown[place][1]) for place in pictures)


def test_a_rival_that_is_uncertain_is_timed_again(inline: pk.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_schedule, "_EVERY_SECONDS", 0.2)
    run = endless(inline)
    measured = []

    def measure() -> None:
        measured.append(run.elapsed_seconds)
        certain = len(measured) > 2
        run.history.append(Baseline(run.elapsed_seconds, PLAIN, 2, 300.0 + certain, 100 + 200 * certain, 400.0, 9))

    monkeypatch.setattr(run, "measure_baseline", measure)
    with opened(run, baselines=True) as room:
        until(lambda: room._summary.plain is not None and not room._summary.uncertain)
        time.sleep(0.6)
    assert len(measured) in (3, 4)  # once more after the visit to one worker, if that came later


def test_a_run_that_fails_says_why_in_the_panel(inline: pk.Workers) -> None:
    with opened(FailsLate("<b>broken</b>"), DIGITS, on=inline, steps=100) as room:
        run = room.start()
        until(lambda: closed(room))
        assert run.status == "failed"
        _, text = last_words(room)
        assert "Failed after step" in text
        assert "FloatingPointError: <b>broken</b>" in " ".join(text.split())  # plain text, which nobody renders
        with pytest.raises(RunError):
            room.tour()
    with opened(run) as again:
        assert closed(again)
        assert "Failed after step" in last_words(again)[1]


# --- beginning and end


def test_saved_files_load_again(inline: pk.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        run = room.start()
        wait_for(run, lambda: run.step > 5)
        room._controls.save.click()
        saved = sorted(tmp_path.iterdir())
        assert [file.suffix for file in saved] == [".csv", ".json"]
        loaded = History.from_json(saved[1].read_text())
        assert loaded.steps == run.history.steps[: len(loaded.steps)]
        assert len(saved[0].read_text().splitlines()) > 5
        assert any(saved[1].name in text for _, text in room._summary.log)
        (tmp_path / "deeper").mkdir()
        as_json, as_csv = room.save(tmp_path / "deeper")
        assert json.loads(as_json.read_text())
        assert as_csv.parent == tmp_path / "deeper"
        with pytest.raises(InputError, match="no folder"):
            room.save(tmp_path / "nowhere")
        run.stop()
        run.wait(LIMIT, progress=False)
        assert room.save(tmp_path)[0].is_file()  # also after the end


def test_closing_stops_the_run_that_the_panel_started(inline: pk.Workers, nothing_left: None) -> None:
    room = pk.panel(net(), DIGITS, on=inline, steps=100_000, baselines=False)
    run = room.start()
    wait_for(run, lambda: run.step > 0)
    room._controls.close.click()
    assert run.stopped_early
    assert not watchers()
    text = last_words(room)[1]
    assert "so its run was stopped" in text
    room.close()
    room.close()
    assert last_words(room)[1] == text
    with pytest.raises(RunError, match="has its run already"):
        room.start()


def test_closing_leaves_a_given_run_going(inline: pk.Workers) -> None:
    run = endless(inline)
    with opened(run) as room:
        wait_for(run, lambda: run.step > 0)
        room.close()
        assert not watchers()
        assert "the run goes on" in last_words(room)[1]
        held = run.step
        wait_for(run, lambda: run.step > held)


def test_closing_in_mid_tour_brings_the_run_home(inline: pk.Workers) -> None:
    run = endless(inline, workers=3)
    with opened(run) as room:
        room.tour()
        until(lambda: run.target == 1)
        room.close()
        assert run.target == 3


def test_closing_before_the_start_leaves_nothing_and_starts_nothing(inline: pk.Workers) -> None:
    room = pk.panel(net(), DIGITS, on=inline)
    assert repr(room) == "<Panel: no run yet>"
    assert not room.history.steps
    room.close()
    assert repr(room) == "<Panel (closed): no run yet>"
    assert last_words(room) == (None, "\n".join(room._remarks))
    with pytest.raises(RunError, match="closed before its run was started"):
        room.start()
    room._controls.start.click()
    assert room.run is None


def test_a_closed_panel_leaves_no_widget_behind(inline: pk.Workers) -> None:
    before = set(widget_registry._instances)
    room = pk.panel(net(), DIGITS, on=inline, steps=3, baselines=False)  # without a box for epochs
    run = room.start().wait(LIMIT, progress=False)
    until(lambda: closed(room))
    room.close()
    pk.panel(run)
    left = [widget_registry._instances[name] for name in set(widget_registry._instances) - before]
    assert not [type(widget).__name__ for widget in left]


def test_starting_twice_is_refused_in_words(inline: pk.Workers) -> None:
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:
        room._controls.start.click()
        run = room.run
        room._controls.start.click()
        assert room.run is run
        assert "has its run already" in status(room)
        with pytest.raises(RunError, match="it is running"):
            room.start()
        assert run is not None
        assert run.status == "running"


@pytest.mark.parametrize("stopped", [True, False])
def test_a_panel_over_a_run_that_has_ended_is_a_picture(inline: pk.Workers, stopped: bool) -> None:
    run = endless(inline) if stopped else endless(inline, steps=3)
    if stopped:
        wait_for(run, lambda: run.step > 0)
        run.stop()
    run.wait(LIMIT, progress=False)
    room = pk.panel(run)
    assert not watchers()
    picture, text = last_words(room)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert text.startswith("Stopped after step" if stopped else "Finished after step 3 of 3")
    assert not asked(run, "measure")
    with pytest.raises(RunError):
        room.tour()
    with pytest.raises(RunError):
        room.start()
    room.close()
    assert "was closed" not in last_words(room)[1]


def test_a_pool_that_closes_ends_the_run_and_its_panel(nothing_left: None) -> None:
    with pk.connect("inline") as workers:
        room = pk.panel(net(), DIGITS, on=workers, steps=100_000, baselines=False)
        run = room.start()
        wait_for(run, lambda: run.step > 0)
    until(lambda: closed(room))
    assert run.stopped_early
    assert "Stopped after step" in last_words(room)[1]


def test_a_pool_that_closed_before_the_start_is_told(inline: pk.Workers) -> None:
    with pk.connect("inline") as workers:
        room = pk.panel(net(), DIGITS, on=workers, steps=3)
    room._controls.start.click()
    assert "This pool is closed" in status(room)
    with pytest.raises(PoolError):
        room.start()
    assert "Starting" not in status(room)
    room.close()
    with pytest.raises(PoolError):
        pk.panel(net(), DIGITS, on=workers)


def test_a_busy_pool_is_told_and_the_panel_starts_later(inline: pk.Workers) -> None:
    run = endless(inline)
    with opened(net(), DIGITS, on=inline, steps=3) as room:
        room._controls.start.click()
        assert "This pool is busy" in status(room)
        assert room.run is None
        run.stop()
        run.wait(LIMIT, progress=False)
        room._controls.start.click()
        assert room.run is not None
        assert room.run.wait(LIMIT, progress=False).status == "finished"


def test_a_newer_panel_over_a_run_takes_the_place_of_the_older(inline: pk.Workers) -> None:
    run = endless(inline, workers=2)
    with opened(run) as older, opened(run) as newer:
        assert closed(older)
        assert "A newer panel took its place; the run goes on" in last_words(older)[1]
        assert len(watchers()) == 1
        newer._controls.workers.value = 3
        wait_for(run, lambda: run.world_size == 3)
        assert asked(run) == [3]
        newer.close()
        assert run.status == "running"


def test_a_newer_panel_inherits_the_run_that_the_older_one_started(inline: pk.Workers) -> None:
    older = pk.panel(net(), DIGITS, on=inline, steps=100_000, baselines=False)
    run = older.start()
    newer = pk.panel(run, baselines=False)
    assert closed(older)
    older.close()
    assert run.status == "running"
    newer.close()
    assert run.stopped_early


def test_a_newer_panel_over_a_model_stops_the_run_of_the_older(inline: pk.Workers) -> None:
    older = pk.panel(net(), DIGITS, on=inline, steps=100_000, baselines=False)
    run = older.start()
    wait_for(run, lambda: run.step > 0)
    with opened(net(), DIGITS, on=inline, steps=3) as newer:
        assert run.stopped_early
        assert f"its run stopped at step {run.step}" in newer._controls.progress.value
        assert newer.start().wait(LIMIT, progress=False).status == "finished"


# --- blocking


def test_a_blocking_panel_returns_when_its_run_has_ended(inline: pk.Workers, nothing_left: None) -> None:
    room = pk.panel(net(), DIGITS, on=inline, steps=40, baselines=False, block=True)
    assert room.run is not None
    assert room.run.status == "finished"
    assert room.run.step == 40
    assert "(closed)" in repr(room)
    assert room._summary.end is not None


@pytest.mark.dask
def test_after_a_blocking_panel_the_pool_is_free(pool: pk.Workers) -> None:
    for _ in range(2):
        pk.panel(net(), DIGITS, on=pool, workers=2, steps=2, baselines=False, block=True)
    assert pk.train(net(), DIGITS, on=pool, steps=1).wait(LIMIT, progress=False).status == "finished"


def test_a_blocking_panel_over_a_run_follows_it_to_its_end(inline: pk.Workers) -> None:
    run = endless(inline, steps=60)
    room = pk.panel(run, block=True, baselines=False)
    assert run.step == 60
    assert room._summary.last is not None
    assert room._summary.last.step == 59
    assert pk.panel(run, block=True).run is run  # it has ended, so there is nothing to wait for


@pytest.mark.parametrize("owned", [True, False])
def test_an_interrupt_ends_the_wait_and_only_a_run_of_its_own(inline: pk.Workers, owned: bool) -> None:
    subject = (net(), DIGITS) if owned else (endless(inline),)
    how = {"on": inline, "steps": 100_000} if owned else {}
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pk.panel(*subject, baselines=False, block=True, **how)
    finally:
        timer.join(5)
    if owned:
        assert endless(inline, steps=1).wait(LIMIT, progress=False).step == 1  # the pool is free again
    else:
        run = subject[0]
        held = run.step
        wait_for(run, lambda: run.step > held)
        run.stop()
        run.wait(LIMIT, progress=False)


def test_hands_free_panels_start_tour_and_end_by_themselves(
    inline: pk.Workers, short_stays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAKIT_HANDS_FREE", "1")
    room = pk.panel(net(), DIGITS, on=inline, workers=2, steps=260, baselines=False)
    assert room.run is not None
    assert room.run.status == "finished"
    assert asked(room.run)[:1] == [1]
    assert len(room.run.history.of(Resized)) > 1
    monkeypatch.setenv("PARAKIT_HANDS_FREE", "0")
    with opened(net(), DIGITS, on=inline) as waiting:
        assert waiting.run is None


# --- mistakes, at the call


class Strange:
    def __repr__(self) -> str:
        return "<a strange thing>"


MODEL_MISTAKES: dict[str, tuple[type[ParakitError], dict[str, Any]]] = {
    "epochs=0": (InputError, {"epochs": 0}),
    "epochs=-1": (InputError, {"epochs": -1}),
    "epochs=2.5": (InputError, {"epochs": 2.5}),
    "epochs=True": (InputError, {"epochs": True}),
    "steps=0": (InputError, {"steps": 0}),
    "steps and epochs": (InputError, {"steps": 5, "epochs": 5}),
    "batch_size=0": (InputError, {"batch_size": 0}),
    "batch_size=1e9": (DataError, {"batch_size": 10**9}),
    "batch_size='8'": (InputError, {"batch_size": "8"}),
    "workers=0": (WorkerCountError, {"workers": 0}),
    "workers=1.5": (WorkerCountError, {"workers": 1.5}),
    "workers=True": (WorkerCountError, {"workers": True}),
    "workers=1000": (WorkerCountError, {"workers": 1000}),
    "learning_rate=0": (InputError, {"learning_rate": 0}),
    "learning_rate=nan": (InputError, {"learning_rate": float("nan")}),
    "learning_rate='0.1'": (InputError, {"learning_rate": "0.1"}),
    "strategy": (InputError, {"strategy": "AllReduce"}),
    "optimizer": (ModelError, {"optimizer": 3}),
    "chunks=0": (InputError, {"chunks": 0}),
    "limit_seconds=0": (InputError, {"limit_seconds": 0}),
    "on": (InputError, {"on": "inline"}),
    "data": (ParakitError, {"data": "digits"}),
}


@pytest.mark.parametrize("name", MODEL_MISTAKES)
def test_what_cannot_be_trained_is_refused_when_the_panel_is_made(inline: pk.Workers, name: str) -> None:
    kind, mistake = MODEL_MISTAKES[name]
    before = set(widget_registry._instances)
    given = {"data": DIGITS, "on": inline} | mistake
    with pytest.raises(kind):
        pk.panel(net(), given.pop("data"), **given)
    assert set(widget_registry._instances) == before


@pytest.mark.parametrize("subject", [None, 3, "model", Strange(), nn.Linear, History(), [1, 2]], ids=repr)
def test_what_is_neither_a_run_nor_a_model_is_refused(inline: pk.Workers, subject: Any) -> None:
    with pytest.raises(InputError, match=r"pk\.panel cannot show"):
        pk.panel(subject)
    with pytest.raises(InputError, match=r"pk\.panel cannot show"):
        pk.panel(subject, DIGITS, on=inline)


def test_a_model_needs_data_and_workers(inline: pk.Workers) -> None:
    with pytest.raises(InputError, match="without workers"):
        pk.panel(net(), DIGITS)
    with pytest.raises(InputError, match=r"pk\.panel\(model, data, on=workers\)"):
        pk.panel(net(), on=inline)
    with pytest.raises(TypeError, match="epoch"):
        pk.panel(net(), DIGITS, on=inline, epoch=3)


def test_a_run_takes_no_options(inline: pk.Workers) -> None:
    run = endless(inline, steps=1).wait(LIMIT, progress=False)
    for given in ({"data": DIGITS}, {"on": inline}, {"workers": 2}, {"epochs": 3}, {"batch_size": 8}):
        with pytest.raises(InputError, match=f"{next(iter(given))} cannot be given for a run that has begun"):
            pk.panel(run, **given)
    assert pk.panel(run, epochs=None).run is run


# --- who decides the worker count


@pytest.mark.parametrize(
    ("most", "stops"),
    [(1, [1]), (2, [1, 2]), (8, [*range(1, 9)]), (9, [*range(1, 10)]), (16, [*range(1, 9), 16]),
     (17, [*range(1, 9), 16, 17]), (64, [*range(1, 9), 16, 32, 64])],
)  # fmt: skip
def test_a_tour_stops_at_every_small_count_and_then_at_doublings(most: int, stops: list[int]) -> None:
    assert stops_up_to(most) == stops


class Pretended:
    """A run as far as steering sees one: it takes requests and grants them at once."""

    def __init__(self, target: int, most: int = 8) -> None:
        self.target, self.most, self.status, self.requests = target, most, "running", []

    def resize(self, count: int) -> None:
        if self.status == "finished":
            raise RunEnded("over")
        if count > self.most:
            raise WorkerCountError("too many")
        self.requests.append(count)
        self.target = count


def measured(*counts: int) -> RunSummary:
    return followed(started(), *segments([count for count in counts for _ in range(9)]))


def test_an_itinerary_goes_on_when_a_count_was_measured_for_long_enough() -> None:
    trip = Itinerary([1, 2], "see", yields=True)
    summary = RunSummary()
    assert trip.next(0.0, summary) == 1
    assert trip.left == (1, 2)
    assert trip.next(1.0, measured(1)) == 2  # 8 segments of a quarter of a second
    assert trip.left == (2,)
    assert trip.next(2.0, measured(1)) == 2
    assert trip.next(3.0, measured(1, 2)) is None
    assert trip.left == ()


def test_an_itinerary_measures_anew_what_was_measured_before_it() -> None:
    trip, before = Itinerary([1], "see", yields=True), measured(1)
    assert trip.next(0.0, before) == 1
    assert trip.next(50.0, before) == 1
    assert trip.next(61.0, before) is None  # no longer than a minute at a stop


def test_steering_follows_a_trip_and_comes_home() -> None:
    run = Pretended(3)
    steer = Steering(run, 3)  # type: ignore[arg-type]
    steer.travel(Itinerary([1, 2], "see", yields=True))
    steer.look(100.0, RunSummary())
    assert run.requests == [1]
    steer.look(101.0, measured(1))
    steer.look(102.0, measured(1))
    assert run.requests == [1, 2]
    steer.look(103.0, measured(1, 2))
    assert run.requests == [1, 2, 3]
    assert steer.trip is None
    assert steer.wanted == 3
    steer.look(104.0, measured(1, 2))
    assert run.requests == [1, 2, 3]


def test_time_in_which_a_run_is_paused_is_no_time_at_a_stop() -> None:
    run = Pretended(3)
    steer = Steering(run, 3)  # type: ignore[arg-type]
    steer.travel(Itinerary([1, 2], "see", yields=True))
    steer.look(0.0, RunSummary())
    run.status = "paused"
    for now in range(1, 200):
        steer.look(float(now), RunSummary())
    run.status = "running"
    steer.look(200.0, RunSummary())
    assert steer.trip is not None
    assert steer.trip.left == (1, 2)
    steer.look(262.0, RunSummary())
    assert steer.trip.left == (2,)


def test_a_resize_by_others_ends_a_trip_and_is_the_new_request() -> None:
    run = Pretended(3)
    steer = Steering(run, 3)  # type: ignore[arg-type]
    steer.travel(Itinerary([1, 2], "see", yields=True))
    steer.look(0.0, RunSummary())
    run.resize(5)
    steer.look(1.0, RunSummary())
    assert steer.trip is None
    assert steer.wanted == 5
    assert run.requests == [1, 5]


def test_a_person_ends_a_trip_that_yields_and_waits_for_one_that_does_not() -> None:
    run = Pretended(3)
    steer = Steering(run, 3)  # type: ignore[arg-type]
    steer.travel(Itinerary([1, 2], "see", yields=True))
    assert steer.ask(4)
    assert steer.trip is None
    assert not steer.ask(4)
    assert run.requests == [4]
    steer.travel(Itinerary([1], "measure", yields=False))
    steer.look(0.0, RunSummary())
    assert not steer.ask(6)
    assert run.target == 1
    steer.look(1.0, measured(1))
    assert run.requests == [4, 1, 6]
    with pytest.raises(WorkerCountError):
        steer.ask(99)
    assert steer.wanted == 6


class Slow(Itinerary):
    """Takes its time to say where to go."""

    asked, answered = threading.Event(), threading.Event()

    def next(self, now: float, summary: RunSummary) -> int | None:
        self.asked.set()
        self.answered.wait(5)
        return super().next(now, summary)


def test_a_request_by_hand_outlasts_the_next_stop_of_a_trip_that_it_ends() -> None:
    run = Pretended(3)
    steer = Steering(run, 3)  # type: ignore[arg-type]
    steer.travel(Slow([1, 2], "see", yields=True))
    looking = threading.Thread(target=steer.look, args=(0.0, RunSummary()))
    looking.start()
    assert Slow.asked.wait(5)
    asking = threading.Thread(target=steer.ask, args=(5,))
    asking.start()
    asking.join(0.1)  # not before the other thread is ready
    Slow.answered.set()
    looking.join(5)
    asking.join(5)
    assert run.target == steer.wanted == 5
    assert steer.trip is None


def test_a_stop_that_cannot_be_had_sends_the_run_home() -> None:
    run = Pretended(2, most=3)
    steer = Steering(run, 2)  # type: ignore[arg-type]
    steer.travel(Itinerary([3, 4], "see", yields=True))
    steer.look(0.0, RunSummary())
    assert run.target == 3
    steer.look(1.0, measured(3))
    assert steer.trip is None
    assert run.requests == [3, 2]


def test_a_request_that_proves_impossible_gives_way_to_what_there_is() -> None:
    run = Pretended(1, most=3)
    steer = Steering(run, 8)  # type: ignore[arg-type]
    steer.travel(Itinerary([1], "measure", yields=False))
    steer.look(0.0, RunSummary())
    steer.look(1.0, measured(1))
    assert steer.trip is None
    assert steer.wanted == run.target == 1


def test_a_trip_over_a_run_that_ended_ends_quietly() -> None:
    run = Pretended(3)
    steer = Steering(run, 3)  # type: ignore[arg-type]
    steer.travel(Itinerary([1, 2], "see", yields=True))
    run.status = "finished"
    steer.look(0.0, RunSummary())
    steer.go_home()
    assert steer.trip is None
    assert run.requests == []


def test_requests_by_hand_survive_a_thread_that_shows_the_present_one() -> None:
    """The thread of a panel shows what is wanted while a person moves the slider: no request may be lost by that."""
    from parakit.widgets.controls import Settings

    controls = Controls(Settings(1, 64, {"AllReduce": None}, 8, 100, 0.1, 5), None)
    wanted, heard, going = [1], [], True

    def request(count: int) -> None:
        heard.append(count)
        wanted[0] = count

    def show() -> None:
        while going:
            controls.show_workers(lambda: wanted[0])

    controls.on_workers(request)
    thread = threading.Thread(target=show)
    thread.start()
    try:
        counts = [1 + n * 7 % 64 for n in range(1, 400)]
        for count in counts:
            controls.workers.value = count
    finally:
        going = False
        thread.join(5)
    assert heard == counts
    controls.shut()


def test_the_dashboard_link_and_the_widgets_are_plain(inline: pk.Workers) -> None:
    from parakit.widgets.controls import Settings

    controls = Controls(Settings(1, 4, {"AllReduce": None}, 8, 100, None, None), '/proxy?a=1&b="><script>')
    link = controls.box.children[-1]
    assert isinstance(link, ipywidgets.HTML)
    assert "<script" not in link.value
    assert "a=1&amp;b=" in link.value
    controls.shut()


def test_a_frame_that_cannot_be_drawn_is_told_and_the_run_goes_on(
    inline: pk.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(net(), DIGITS, on=inline, steps=100_000) as room:

        def fail(summary: RunSummary) -> bytes:
            raise OverflowError("no such number")

        monkeypatch.setattr(room._screen.picture.live, "frame", fail)
        run = room.start()
        until(lambda: "The picture could not be drawn: OverflowError" in status(room))
        assert run.status == "running"
        assert room.frames == 1
