"""The course of a run: bounded, honest, and the same however it is followed."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import time
from types import FunctionType, ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parakit as pk
from parakit.errors import InputError
from parakit.events.curve import Curve
from parakit.events.history import History
from parakit.events.records import (
    Baseline,
    Event,
    Requested,
    Resized,
    RunStart,
    Said,
    SegmentDone,
    StepDone,
    WorkerStep,
)
from parakit.events.summary import PLAIN, RunSummary
from parakit.plots.live import LivePicture
from parakit.widgets import report

RATES = {1: 1000.0, 2: 1800.0, 3: 1700.0, 4: 1500.0} | {size: 1200.0 + size for size in range(5, 21)}


def started(cores: int = 2) -> RunStart:
    return RunStart(0.0, "AllReduce()", ("worker 0",), "local", cores, 1, 1000, 640, 64, 64, 10**6, 10, 0)


def segments(
    sizes: list[int], first_step: int = 0, at: float = 0.0, generation: int = 0, steps: int = 2, seconds: float = 0.25
) -> list[Event]:
    """Segments at worker counts, a change of the count being a new generation; a rate is its count's, give or take."""
    events: list[Event] = []
    size_before = 0
    for number, size in enumerate(sizes):
        if size != size_before:
            generation += 1
            names = tuple(f"worker {rank}" for rank in range(size))
            events.append(Resized(at, first_step, generation, names, 3, 0.05, 0.1))
            size_before = size
        parts = tuple(WorkerStep(f"worker {rank}", 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 8) for rank in range(size))
        for step in range(steps):
            moment = at + seconds * (step + 1) / steps
            events.append(
                StepDone(moment, first_step + step, 0, 2.0 / (1 + first_step), 64, seconds / steps, 0.1, size,
                         generation, parts)
            )  # fmt: skip
        samples = round(RATES[size] * seconds * (1 + 0.1 * math.sin(number)))
        at += seconds
        events.append(SegmentDone(at, first_step, steps, seconds, 0.01, 0.001, samples, size, generation))
        first_step += steps
    return events


def followed(*events: Event) -> RunSummary:
    history = History()
    history.append(*events)
    return RunSummary.of(history)


def test_a_rate_is_the_median_over_segments_and_leaves_out_the_first_of_each_group() -> None:
    events = segments([1] * 9 + [2] * 7)
    summary = followed(started(), *events)
    for size in (1, 2):
        mine = [e for e in events if isinstance(e, SegmentDone) and e.world_size == size][1:]
        rates = sorted(e.samples / e.seconds for e in mine)
        assert summary.rates[size].segments == len(rates)
        assert summary.rates[size].median == pytest.approx(statistics.median(rates))
        assert summary.rates[size].low < summary.rates[size].median < summary.rates[size].high
    assert summary.speedup(2) == pytest.approx(summary.rates[2].median / summary.rates[1].median)
    assert summary.efficiency(2) == pytest.approx(summary.speedup(2) / 2)


def test_a_long_segment_weighs_more_than_a_short_one() -> None:
    def segment(at: float, seconds: float, rate: float) -> SegmentDone:
        return SegmentDone(at, 0, 1, seconds, 0.0, 0.0, round(rate * seconds), 1, 0)

    summary = followed(segment(1, 1, 100), segment(2, 0.1, 1000), segment(3, 0.1, 1000), segment(9, 5.0, 100))
    assert summary.rates[1].median < 200  # of the rates alone, the median would be 1000


def test_what_is_not_measured_is_no_number() -> None:
    summary = followed(started(), *segments([2] * 5))
    assert math.isnan(summary.speedup(2))
    assert math.isnan(summary.efficiency(1))
    assert summary.one is None
    assert summary.plain is None


def test_a_rival_gets_the_best_of_its_measurements() -> None:
    summary = followed(
        *(Baseline(at, PLAIN, 2, rate, rate, rate, 9) for at, rate in ((1, 500.0), (2, 900.0), (3, 80.0)))
    )
    assert summary.plain is not None
    assert summary.plain.samples_per_second == 900.0


def test_the_last_steps_are_those_of_the_present_group() -> None:
    summary = followed(started(), *segments([1] * 3 + [2]))
    assert {step.world_size for step in summary.recent()} == {2}
    workers, seconds = summary.shares()
    assert workers == ("worker 0", "worker 1")
    np.testing.assert_allclose(seconds, [[1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]] * 2)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.floats(-5, 5)), max_size=400), st.integers(4, 40))
def test_a_curve_is_bounded_and_in_order(values: list[tuple[int, float]], most: int) -> None:
    curve = Curve(most)
    for at, (size, value) in enumerate(values):
        curve.add(float(at), value, size)
    points = curve.points
    assert len(points) <= most + 1
    assert (np.diff(points[:, 0]) > 0).all()
    assert set(points[:, 2]) <= {float(size) for size, _ in values}
    if values:
        assert min(v for _, v in values) - 1e-9 <= points[:, 1].min()
        assert points[:, 1].max() <= max(v for _, v in values) + 1e-9


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), max_size=6), st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=25))
def test_following_in_pieces_gives_what_following_at_once_gives(cuts: list[int], sizes: list[int]) -> None:
    events = [started(), *segments(sizes)]
    history, summary = History(), RunSummary()
    places = sorted({0, len(events), *(cut for cut in cuts if cut < len(events))})
    for begin, end in itertools.pairwise(places):
        history.append(*events[begin:end])
        assert summary.follow(history)
        assert not summary.follow(history)
    at_once = followed(*events)
    assert summary.rates == at_once.rates
    assert list(summary.log) == list(at_once.log)
    np.testing.assert_array_equal(summary.loss.points, at_once.loss.points)
    np.testing.assert_array_equal(summary.rate.points, at_once.rate.points)


@pytest.mark.parametrize("wrong", [None, 3, "history", [1, 2]])
def test_what_has_no_course_is_refused_in_words(wrong: object) -> None:
    with pytest.raises(InputError, match="no course of a run"):
        RunSummary.of(wrong)


def test_a_real_run_has_a_course(inline: pk.Workers) -> None:
    import torch

    digits = pk.datasets.digits()
    run = pk.train(torch.nn.Linear(64, 10), digits.train, on=inline, epochs=30).wait(progress=False)
    summary = RunSummary.of(run)
    assert summary.last is not None
    assert summary.last.step == run.steps - 1
    assert summary.log[-1][1] == f"Finished after step {run.steps}"
    assert summary.end is not None


def segment(at: float, seconds: float, rate: float, size: int = 1, generation: int = 0) -> SegmentDone:
    return SegmentDone(at, 0, 1, seconds, 0.0, 0.0, round(rate * seconds), size, generation)


def test_quartiles_of_unequal_segments_as_computed_by_hand() -> None:
    # Seconds 1, 2 and 1 of 4: their middles lie at 1/8, 1/2 and 7/8.
    summary = followed(segment(1, 1, 9), segment(2, 1, 100), segment(4, 2, 200), segment(5, 1, 400))
    rate = summary.rates[1]
    assert rate.segments == 3
    assert rate.median == pytest.approx(200)
    assert rate.low == pytest.approx(100 + 100 / 3)
    assert rate.high == pytest.approx(200 + 400 / 3)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=40))
def test_quartiles_of_equal_segments_are_those_of_numpy(samples: list[int]) -> None:
    summary = followed(*(segment(n, 1.0, rate) for n, rate in enumerate([77, *samples], 1)))
    rate = summary.rates[1]
    expected = np.quantile(samples, [0.25, 0.5, 0.75], method="hazen")
    assert (rate.low, rate.median, rate.high) == pytest.approx(tuple(expected))
    assert rate.low <= rate.median <= rate.high


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 9)), min_size=2, max_size=20))
def test_a_median_halves_the_time(pairs: list[tuple[int, int]]) -> None:
    summary = followed(*(segment(10.0 * n, s, rate) for n, (rate, s) in enumerate([(5, 1), *pairs], 1)))
    median = summary.rates[1].median
    total = sum(seconds for _, seconds in pairs)
    assert sum(s for rate, s in pairs if rate < median - 1e-6) <= total / 2 + max(s for _, s in pairs)
    assert sum(s for rate, s in pairs if rate > median + 1e-6) <= total / 2 + max(s for _, s in pairs)


def test_a_count_that_was_left_and_comes_back_leaves_out_a_first_segment_again() -> None:
    visits = [(1, 1), (2, 2), (1, 3)]
    summary = followed(
        *(segment(10 * g + n, 1.0, 9.0 if n == 0 else 100.0, size, g) for size, g in visits for n in range(3))
    )
    assert summary.rates[1].segments == 4
    assert summary.rates[1].low == summary.rates[1].high == 100
    assert summary.seconds_at == {1: 4.0, 2: 2.0}
    # One segment that counts is no rate yet.
    assert followed(segment(1, 1, 5), segment(2, 1, 5)).rates == {}


def test_rates_rest_on_the_newest_segments() -> None:
    summary = followed(*(segment(n, 1.0, 100.0 if n < 1000 else 300.0) for n in range(1, 1500)))
    assert summary.rates[1].low == summary.rates[1].high == 300
    assert summary.rates[1].segments == 400


def test_the_last_steps_are_bounded_in_time_and_in_number() -> None:
    summary = followed(started(), *segments([1] * 40))
    assert [step.step for step in summary.recent(5)] == [75, 76, 77, 78, 79]
    newest = summary.recent()[-1].at_seconds
    assert all(step.at_seconds >= newest - 3.0 for step in summary.recent())
    assert len(summary.recent()) == 25  # of an eighth of a second
    assert len(followed(started(), *segments([1] * 400)).recent(10_000)) == 96
    assert RunSummary().recent() == ()
    assert RunSummary().shares()[0] == ()
    assert RunSummary().seconds == 0.0


def test_a_log_keeps_its_newest_lines() -> None:
    summary = followed(*(Said(float(n), f"remark {n}") for n in range(1000)))
    assert len(summary.log) == 200
    assert summary.log[-1] == (999.0, "remark 999")


def test_a_course_of_a_course_is_itself() -> None:
    summary = followed(started())
    assert RunSummary.of(summary) is summary


@given(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=600), st.integers(1, 30))
def test_a_curve_is_bounded_whatever_the_worker_counts(sizes: list[int], most: int) -> None:
    curve = Curve(most)
    for at, size in enumerate(sizes):
        curve.add(float(at), 1.0, size)
        points = curve.points
        assert len(points) <= max(2, most) + 1
        assert (np.diff(points[:, 0]) > 0).all()
    if sizes:
        assert points[-1, 2] == sizes[-1]
        assert 0 <= points[0, 0] <= points[-1, 0] <= len(sizes) - 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=700), st.integers(2, 40))
def test_a_curve_loses_no_value_while_the_worker_count_stays(values: list[float], most: int) -> None:
    curve = Curve(most)
    for at, value in enumerate(values):
        curve.add(float(at), value, 1)
    points = curve.points
    assert curve.each & (curve.each - 1) == 0  # a power of two
    full, rest = divmod(len(values), curve.each)
    assert len(points) == full + (rest > 0)
    for number, (at, value, *_) in enumerate(points):
        mine = values[number * curve.each : (number + 1) * curve.each]
        assert value == pytest.approx(sum(mine) / len(mine), abs=1e-6)
        assert at == pytest.approx(number * curve.each + (len(mine) - 1) / 2)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(40, 60))
def test_a_curve_averages_across_no_gap(lengths: list[int], most: int) -> None:
    curve, at = Curve(most), 0.0
    for piece, length in enumerate(lengths):  # the value is the number of the piece, so that a mixture shows
        for place in range(length):
            gap = 3.0 if place == 0 and piece else 0.01
            at += 0.1 + gap
            curve.add(at, float(piece), 1, at, gap)
    points = curve.points
    assert len(points) <= most + 1
    assert set(points[:, 1]) == set(map(float, range(len(lengths))))
    np.testing.assert_allclose(points[:, 3], points[:, 0])
    assert curve.longest_gap_seconds == 0.5
    first_of_piece = np.append(False, np.diff(points[:, 1]) > 0)
    np.testing.assert_array_equal(points[:, 4] > curve.longest_gap_seconds, first_of_piece)


def test_a_curve_of_all_too_many_pauses_keeps_the_longer_ones_apart() -> None:
    curve = Curve(60)
    for number in range(10_000):
        gap = 60.0 if number in (3000, 7000) else 1.0
        curve.add(float(number), float((number >= 3000) + (number >= 7000)), 1, number, gap)
    points = curve.points
    assert len(points) <= 61
    assert 1 <= curve.longest_gap_seconds < 60
    assert set(points[:, 1]) == {0.0, 1.0, 2.0}
    assert (points[:, 4] > curve.longest_gap_seconds).sum() == 2


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.floats(0, 9)), max_size=300), st.integers(2, 30))
def test_a_curve_with_pauses_is_bounded(values: list[tuple[int, float]], most: int) -> None:
    curve = Curve(most)
    for at, (size, gap) in enumerate(values):
        curve.add(float(at), 1.0, size, at, gap)
        assert len(curve.points) <= max(2, most) + 1
    assert (np.diff(curve.points[:, 0]) > 0).all()


def test_time_without_training_is_a_gap_of_both_curves() -> None:
    before, after = segments([1] * 3), segments([1] * 3, 6, 5.0, 0)
    summary = followed(started(), *before, Requested(0.8, "pause", None), *after)
    for curve in (summary.loss, summary.rate):
        breaks = curve.points[:, 4] > curve.longest_gap_seconds
        assert breaks.sum() == 1
        place = int(np.flatnonzero(breaks)[0])
        assert curve.points[place - 1, 0] < 1 < 5 < curve.points[place, 0]
        assert curve.points[place, 4] == pytest.approx(4.25, abs=0.2)


def test_steps_that_a_long_history_has_thinned_out_are_no_gap() -> None:
    kept = [event for event in segments([1] * 40) if isinstance(event, StepDone)][::8]
    points = followed(started(), *kept).loss.points
    assert len(points) == len(kept)
    assert (points[:, 4] < 0.5).all()
    assert list(points[:, 3]) == [step.step for step in kept]


def test_a_rival_is_uncertain_while_its_quartiles_lie_far_apart() -> None:
    assert not RunSummary().uncertain
    assert RunSummary().rival == ""
    summary = followed(Baseline(1.0, PLAIN, 2, 300.0, 100.0, 400.0, 9))
    assert summary.uncertain
    assert summary.rival == "plain PyTorch, 2 cores (uncertain)"
    summary = followed(Baseline(1.0, PLAIN, 2, 300.0, 100.0, 400.0, 9), Baseline(2.0, PLAIN, 2, 310.0, 300.0, 330.0, 9))
    assert not summary.uncertain
    assert summary.rival == "plain PyTorch, 2 cores"


def test_the_log_tells_requests_that_no_person_has() -> None:
    history, summary = History(), RunSummary()
    summary.unasked = [("resize", 2), ("measure", None)]
    history.append(*(Requested(at, "resize", count) for at, count in ((1.0, 3), (2.0, 2), (3.0, 2))))
    history.append(Requested(4.0, "measure", None))
    summary.follow(history)
    assert [text for _, text in summary.log] == [
        "3 workers asked for", "2 workers asked for by the panel", "2 workers asked for",
        "A measurement of plain PyTorch asked for by the panel",
    ]  # fmt: skip
    assert not summary.unasked


def test_each_visit_of_a_tour_stays_on_the_curve() -> None:
    curve = Curve(60)
    for at in range(20_000):
        curve.add(float(at), 1.0, 1 + at // 5 if at < 40 else 1)
    assert set(curve.points[:, 2]) == set(range(1, 9))
    assert len(curve.points) <= 61


def test_a_curve_takes_no_more_room_however_many_values_are_joined() -> None:
    curve = Curve(20)
    for at in range(100_000):
        curve.add(float(at), 1.0, 1)
    assert curve.each > 4000
    assert held_by(curve) < 10_000


def test_an_hour_of_events_costs_no_memory_and_no_speed() -> None:
    # 14,400 segments of a quarter of a second, of 20 steps each; 2, 3 and 4 workers in turn.
    slices, per_slice, steps_each = 24, 600, 20
    accounts = {
        n: tuple(WorkerStep(f"worker {r}", 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 8) for r in range(n)) for n in (2, 3, 4)
    }
    history, summary, picture = History(), RunSummary(), LivePicture(4)
    history.append(started())
    frames, step, held = [], 0, []
    for number in range(slices):
        size, at = 2 + number % 3, 0.25 * per_slice * number
        names = tuple(part.worker for part in accounts[size])
        history.append(Requested(at + 1e-4, "resize", size), Resized(at + 1e-3, step, number, names, 9, 0.1, 0.2))
        for segment_number in range(per_slice):
            at += 0.25
            history.append(
                *(
                    StepDone(at - 0.24 + 0.012 * n, step + n, 0, 9.0 / (9 + number), 64, 0.012, 0.1, size, number,
                             accounts[size])
                    for n in range(steps_each)
                ),
                SegmentDone(at, step, steps_each, 0.25, 0.01, 0.001, 900 + segment_number % 100, size, number),
            )  # fmt: skip
            step += steps_each
        summary.follow(history)
        began = time.thread_time()
        picture.frame(summary)
        report.summary_html(summary)
        report.log_html(summary.log)
        frames.append(time.thread_time() - began)
        if number + 1 in (slices // 4, slices):
            held.append(held_by(summary, picture))
    assert history.total > 300_000
    assert summary.rates[4].segments == 400
    assert held[0] > 100_000  # not nothing: the measure sees what there is
    assert held[1] - held[0] < 500_000, f"{held[0]} bytes after a quarter of an hour, {held[1]} after an hour"
    assert statistics.median(frames[-5:]) < 3 * statistics.median(frames[1:6])


def held_by(*roots: object) -> int:
    """Bytes of all that can be reached from some objects, events and the code of libraries excepted."""
    found: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        thing = waiting.pop()
        if id(thing) not in found and not isinstance(thing, Event | WorkerStep | type | ModuleType | FunctionType):
            found[id(thing)] = thing
            waiting.extend(gc.get_referents(thing))
    return sum(map(sys.getsizeof, found.values()))
