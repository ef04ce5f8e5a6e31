"""Pictures: what they show is what the history holds."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from PIL import Image

import parakit as pk
from parakit.errors import InputError
from parakit.events.history import History
from parakit.events.records import PHASES, Baseline, Event, Resized, SegmentDone, StepDone, WorkerStep
from parakit.events.summary import PLAIN, RunSummary
from parakit.plots import live
from parakit.plots.live import LivePicture
from tests.events.test_summary import followed, segments, started

DRAWN = ("loss", "throughput", "speedup", "breakdown", "timeline")


def history_of(*events: Event) -> History:
    history = History()
    history.append(*events)
    return history


def with_losses(*losses: float) -> History:
    part = (WorkerStep("worker 0", 0.1, 0.1, 0.1, 0.0, 0.1, 0.0, 8),)
    steps = [StepDone(1.0 + n, n, 0, loss, 8, 0.5, 0.1, 1, 0, part) for n, loss in enumerate(losses)]
    return history_of(started(), *steps)


HISTORIES: dict[str, Callable[[], History]] = {
    "nothing": History,
    "a start": lambda: history_of(started()),
    "one step": lambda: with_losses(2.0),
    "a loss that is no number": lambda: with_losses(2.0, float("nan"), float("inf"), 1.0),
    "only losses that are no numbers": lambda: with_losses(float("nan"), float("nan")),
    "negative losses": lambda: with_losses(-1.0, -2.0, 0.5),
    "no loss at all": lambda: with_losses(0.0, 0.0),
    "losses next to the largest numbers": lambda: with_losses(1.0, 9e99, 1e299, 1.7e308, float("inf")),
    "only losses next to the largest numbers": lambda: with_losses(1.7e308, 1e308),
    "negative losses next to the largest numbers": lambda: with_losses(-1.7e308, 1.0, 1e308),
    "losses next to nothing": lambda: with_losses(5e-324, 1e-310, 0.1),
    "a loss that does not change": lambda: with_losses(0.5, 0.5, 0.5),
    "twenty counts": lambda: history_of(started(), *segments([n for n in range(1, 21) for _ in range(4)])),
    "many changes": lambda: history_of(started(), *segments([1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 1, 1])),
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("plot", DRAWN)
def test_every_plot_takes_every_history_without_a_warning(plot: str, name: str) -> None:
    ax = Figure(dpi=30).subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(pk.plots, plot)(HISTORIES[name](), ax) is ax
        ax.figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("name", HISTORIES)
def test_the_live_picture_takes_every_history(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_DPI", 30)
    picture, summary = LivePicture(4), RunSummary.of(HISTORIES[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.frame(summary).startswith(b"\x89PNG")
        assert picture.still(summary).startswith(b"\x89PNG")


def test_a_plot_without_axes_makes_a_figure_that_a_notebook_shows() -> None:
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    ax = pk.plots.loss(with_losses(2.0, 1.0))
    assert set(pyplot.get_fignums()) - before == {ax.figure.number}
    pyplot.close(ax.figure)


@pytest.mark.parametrize("plot", DRAWN)
@pytest.mark.parametrize("wrong", [None, 7, "run"])
def test_what_cannot_be_drawn_is_refused(plot: str, wrong: Any) -> None:
    with pytest.raises(InputError):
        getattr(pk.plots, plot)(wrong, Figure().subplots())


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4"])
def test_wrong_counts_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="whole number"):
        pk.plots.timeline(History(), Figure().subplots(), steps=wrong)
    with pytest.raises(InputError, match="whole number"):
        pk.plots.speedup(History(), Figure().subplots(), most=wrong)


def test_points_stand_at_the_measured_speedups_and_the_rival_at_its_own() -> None:
    history = history_of(started(), *segments([1] * 5 + [2] * 5 + [4] * 5), Baseline(99.0, PLAIN, 2, 1500.0, 1, 2, 9))
    summary = RunSummary.of(history)
    ax = pk.plots.speedup(history, Figure().subplots())
    points = next(c for c in ax.collections if isinstance(c, PathCollection)).get_offsets()
    expected = [(n, summary.speedup(n)) for n in (1, 2, 4)]
    np.testing.assert_allclose(points, expected)
    assert summary.one is not None
    assert any(np.allclose(line.get_ydata(), 1500.0 / summary.one.median, atol=0.01) for line in ax.lines)
    assert "relative to 1 worker" in ax.get_ylabel()


def test_bars_are_as_long_as_the_phases() -> None:
    history = history_of(started(), *segments([2] * 4))
    ax = pk.plots.breakdown(history, Figure().subplots())
    widths = [patch.get_width() for patch in ax.patches]
    assert len(widths) == 2 * len(PHASES)
    assert widths[:6] == pytest.approx([1, 2, 3, 4, 5, 6])  # milliseconds
    assert [label.get_text() for label in ax.get_yticklabels()] == ["worker 0", "worker 1"]


def test_the_curves_hold_the_losses_by_worker_count() -> None:
    history = history_of(started(), *segments([1] * 3 + [2] * 3))
    ax = pk.plots.loss(history, Figure().subplots())
    one, two = (np.asarray(line.get_ydata(), float) for line in ax.lines)
    losses = history.losses
    np.testing.assert_allclose(one[:6], losses[:6])
    np.testing.assert_allclose(two[6:], losses[6:])
    assert np.isnan(one[6:]).all()


def paused() -> History:
    """Two pieces with four seconds between them, the second at another count."""
    return history_of(started(), *segments([1] * 3), *segments([2] * 3, 6, 4.75, 1))


@pytest.mark.parametrize("plot", ["loss", "throughput"])
def test_a_curve_is_broken_where_nothing_was_trained(plot: str) -> None:
    ax = getattr(pk.plots, plot)(paused(), Figure().subplots())
    one, two = ax.lines
    for line, first, last in ((one, 0.0, 0.75), (two, 4.75, 5.5)):
        at, values = line.get_data()
        drawn = np.asarray(at)[np.isfinite(values)]
        assert first < drawn.min() < drawn.max() <= last


def test_a_gap_within_one_count_breaks_its_line() -> None:
    ax = pk.plots.loss(history_of(started(), *segments([1] * 3), *segments([1] * 3, 6, 4.75, 0)), Figure().subplots())
    (line,) = ax.lines
    at, values = map(np.asarray, line.get_data())
    (gap,) = np.flatnonzero(np.isnan(values))
    assert at[gap - 1] < 1 < 4 < at[gap + 1]


def test_a_lone_step_between_two_gaps_is_a_dot() -> None:
    part = (WorkerStep("worker 0", 0.1, 0.1, 0.1, 0.0, 0.1, 0.0, 8),)
    steps = [StepDone(at, n, 0, 1.0, 8, 0.5, 0.1, 1, 0, part) for n, at in enumerate((1.0, 1.5, 9.0, 19.0, 19.5))]
    (line,) = pk.plots.loss(history_of(started(), *steps), Figure().subplots()).lines
    at, values = map(np.asarray, line.get_data())
    assert [at[place] for place in line.get_markevery()] == [9.0]
    assert line.get_marker() == "."
    assert np.isfinite(values).sum() == 5


def test_against_steps_the_curve_is_whole_and_does_not_know_of_time() -> None:
    history = paused()
    ax = pk.plots.loss(history, Figure().subplots(), against="step")
    one, two = ax.lines
    at, values = map(np.asarray, two.get_data())
    np.testing.assert_array_equal(at, [step.step for step in history.steps])
    np.testing.assert_array_equal(np.isfinite(values), at >= 5)  # it begins where the other one ends
    np.testing.assert_allclose(values[6:], history.losses[6:])
    assert not np.isfinite(np.asarray(one.get_ydata())[6:]).any()
    assert ax.get_xlabel() == "step"
    assert ax.get_xlim() == (0, 11)


@pytest.mark.parametrize("wrong", ["minutes", "", None, 3])
def test_a_curve_is_drawn_against_seconds_or_steps(wrong: Any) -> None:
    with pytest.raises(InputError, match="'seconds', 'step'"):
        pk.plots.loss(History(), Figure().subplots(), against=wrong)


def test_an_uncertain_rival_is_marked_in_both_legends_until_it_is_certain() -> None:
    history, summary, picture = history_of(started(), *segments([1] * 6)), RunSummary(), LivePicture(4)
    for rival, marked in (((1000.0, 300.0, 2000.0), True), ((1500.0, 1400.0, 1600.0), False)):
        history.append(Baseline(history.steps[-1].at_seconds + 1 - 0.5 * marked, PLAIN, 2, *rival, 9))
        summary.follow(history)
        picture.frame(summary)
        for plot in picture._plots[1:3]:
            names = [text.get_text() for text in plot.ax.get_legend().get_texts()]
            assert ("plain PyTorch, 2 cores (uncertain)" in names) == marked
            assert ("plain PyTorch, 2 cores" in names) != marked


def test_legends_do_not_reach_into_the_plot_beside() -> None:
    summary = followed(started(16), *segments(list(range(1, 21)) * 4), Baseline(99.0, PLAIN, 16, 1500.0, 1, 2000, 9))
    picture = LivePicture(20)
    picture.still(summary)
    right = [plot.ax.get_legend().get_window_extent().x1 for plot in picture._plots]
    beside = [plot.ax.get_legend().get_window_extent().x0 for plot in picture._plots]
    assert right[0] < beside[1]
    assert right[2] < beside[3]
    assert max(right) <= 1000


def test_the_last_picture_fits_what_there_is() -> None:
    summary = followed(started(), *segments([1] * 130))
    picture = LivePicture(4)
    picture.frame(summary)
    growing = [plot.ax.get_xlim()[1] for plot in picture._plots]
    picture.still(summary)
    fitting = [plot.ax.get_xlim()[1] for plot in picture._plots]
    assert growing[:2] == [45, 45]
    assert fitting[:2] == pytest.approx([32.5, 32.5], abs=0.5)
    picture.frame(summary)
    assert [plot.ax.get_xlim()[1] for plot in picture._plots[:2]] == [45, 45]


def test_labels_stand_on_white() -> None:
    ax = pk.plots.speedup(history_of(started(), *segments([1] * 5 + [2] * 5)), Figure().subplots())
    labels = [text for text in ax.texts if text.get_text().endswith("×")]
    assert len(labels) == 2
    assert all(label.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) for label in labels)


def test_a_live_frame_looks_like_the_last_picture() -> None:
    summary = followed(started(), *segments([1] * 9 + [2] * 9), Baseline(99.0, PLAIN, 2, 1500.0, 1, 2, 9))
    picture = LivePicture(4)
    frame, still = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float)
                    for png in (picture.frame(summary), picture.still(summary)))  # fmt: skip
    assert frame.shape == still.shape
    assert np.abs(frame - still).mean() < 2.0
    assert tuple(frame[2, 2]) == (255, 255, 255)


def test_frames_show_news_and_rarely_draw_everything_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    history, summary, picture = history_of(started(), *segments([1] * 6)), RunSummary(), LivePicture(4)
    summary.follow(history)
    before = picture.frame(summary)
    drawn = []
    whole = picture._draw_background
    monkeypatch.setattr(picture, "_draw_background", lambda: (drawn.append(1), whole()))
    at, step = 1.5, 12
    for _ in range(40):
        history.append(*[e for e in segments([1], step, at, 1) if isinstance(e, StepDone)])
        at, step = at + 0.25, step + 2
        summary.follow(history)
        after = picture.frame(summary)
        assert after != before
        before = after
    assert len(drawn) <= 8


@pytest.mark.parametrize("plot", DRAWN)
def test_a_real_run_can_be_drawn_while_it_goes_on_and_afterwards(plot: str, run_on_two: pk.Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = getattr(pk.plots, plot)(run_on_two, Figure().subplots())
        ax.figure.savefig(io.BytesIO(), format="png")
    again = getattr(pk.plots, plot)(run_on_two.history, ax=Figure().subplots())
    for line, other in zip(ax.lines, again.lines, strict=True):
        np.testing.assert_array_equal(np.asarray(line.get_ydata(), float), np.asarray(other.get_ydata(), float))
    assert [patch.get_width() for patch in ax.patches] == [patch.get_width() for patch in again.patches]


@pytest.fixture(scope="module")
def run_on_two() -> Iterator[pk.Run]:
    import torch

    with pk.connect("inline") as workers:
        data = pk.datasets.digits().train
        yield pk.train(torch.nn.Linear(64, 10), data, on=workers, workers=2, steps=40).wait(30, progress=False)


@pytest.mark.parametrize("plot", DRAWN)
def test_what_cannot_be_drawn_leaves_no_empty_figure_in_the_notebook(plot: str) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    with pytest.raises(InputError):
        getattr(pk.plots, plot)("no run")
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("plot", DRAWN)
def test_every_plot_makes_one_figure_of_its_own(plot: str) -> None:
    from matplotlib import pyplot

    before = set(pyplot.get_fignums())
    ax = getattr(pk.plots, plot)(history_of(started(), *segments([1, 1, 1])))
    assert len(set(pyplot.get_fignums()) - before) == 1
    pyplot.close(ax.figure)


def test_names_of_workers_are_not_typeset() -> None:
    part = (WorkerStep("gpu $\\frac$ $a_1$", 0.1, 0.1, 0.1, 0.0, 0.1, 0.0, 8),)
    history = history_of(started(), StepDone(1.0, 0, 0, 1.0, 8, 0.5, 0.1, 1, 0, part))
    for draw in (pk.plots.breakdown, pk.plots.timeline):
        ax = draw(history, Figure().subplots())
        ax.figure.savefig(io.BytesIO(), format="png")
        assert [label.get_text() for label in ax.get_yticklabels()] == ["gpu $\\frac$ $a_1$"]
    LivePicture(1).frame(RunSummary.of(history))


def test_the_throughput_is_that_of_the_segments() -> None:
    history = history_of(started(), *segments([1] * 3 + [3] * 3), Baseline(99.0, PLAIN, 2, 4321.0, 1, 2, 9))
    ax = pk.plots.throughput(history, Figure().subplots())
    one, three, plain = ax.lines
    rates = [segment.samples / segment.seconds for segment in history.of(SegmentDone)]
    np.testing.assert_allclose(np.asarray(one.get_ydata(), float)[:3], rates[:3])
    np.testing.assert_allclose(np.asarray(three.get_ydata(), float)[3:], rates[3:])
    assert set(plain.get_ydata()) == {4321.0}
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] > 4321
    assert one.get_linestyle() != three.get_linestyle()


def test_spreads_reach_from_quartile_to_quartile() -> None:
    history = history_of(started(), *segments([1] * 9 + [2] * 9))
    summary = RunSummary.of(history)
    ax = pk.plots.speedup(history, Figure().subplots(), most=12)
    assert summary.one is not None
    (spread,) = (found for found in ax.collections if isinstance(found, LineCollection))
    for segment, rate in zip(spread.get_segments(), summary.rates.values(), strict=True):
        expected = [(rate.world_size, value / summary.one.median) for value in (rate.low, rate.high)]
        np.testing.assert_allclose(segment, expected)
    assert ax.get_xlim()[1] == pytest.approx(12.6)


def test_without_one_worker_there_is_no_speedup_and_that_is_said() -> None:
    ax = pk.plots.speedup(history_of(started(), *segments([2] * 5)), Figure().subplots())
    (points,) = (found for found in ax.collections if isinstance(found, PathCollection))
    assert len(points.get_offsets()) == 0
    assert [text.get_text() for text in ax.texts] == ["not measured yet: 1 worker and plain PyTorch"]


def test_a_timeline_lays_the_phases_of_a_step_one_after_the_other() -> None:
    history = history_of(started(), *segments([2] * 4))
    ax = pk.plots.timeline(history, Figure().subplots(), steps=3)
    bars = [path.get_extents() for collection in ax.collections for path in collection.get_paths()]
    assert len(bars) == 3 * 2 * len(PHASES)
    assert sum(bar.width for bar in bars) == pytest.approx(3 * 2 * 21)  # milliseconds
    first = sorted((bar for bar in bars if bar.y0 < 0 and bar.x0 < 100), key=lambda bar: bar.x0)
    assert first[0].x0 == pytest.approx(0)
    for bar, after in itertools.pairwise(first):
        assert bar.x1 == pytest.approx(after.x0)
    assert len(ax.lines) == 3
    assert ax.get_xlim()[1] == pytest.approx(3 * 125)


def test_a_loss_that_crosses_nothing_changes_the_scale_and_back() -> None:
    picture = LivePicture(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for losses, scale in (((1.0, 2.0), "log"), ((1.0, -2.0), "linear"), ((3.0, 2.0), "log"), ((0.0,), "linear")):
            picture.frame(RunSummary.of(with_losses(*losses)))
            assert picture._plots[0].ax.get_yscale() == scale


def test_a_picture_has_its_size_and_a_frame_after_the_last_one_is_whole() -> None:
    few, many = (followed(started(), *segments([1] * n + [2] * n)) for n in (5, 60))
    picture = LivePicture(4)
    picture.frame(few)
    picture.still(many)
    picture.frame(many)
    frame = picture.frame(many)  # with a label at the present count only, as live frames have
    assert Image.open(io.BytesIO(frame)).size == (1000, 660)
    assert Image.open(io.BytesIO(picture.still(many))).size == (1000, 660)
    fresh = LivePicture(4)
    fresh.frame(few)
    assert frame == fresh.frame(many)
    assert len(frame) < 40_000


def test_steady_training_leaves_the_limits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    history, summary, picture = history_of(started(), *segments([1] * 8 + [2] * 8)), RunSummary(), LivePicture(4)
    summary.follow(history)
    before, drawn, limits = picture.frame(summary), [], set()
    whole = picture._draw_background
    monkeypatch.setattr(picture, "_draw_background", lambda: (drawn.append(1), whole()))
    at, step = 4.0, 32
    for _ in range(50):
        news = [event for event in segments([2], step, at, 1) if not isinstance(event, Resized)]
        history.append(*news)
        at, step = at + 0.25, step + 2
        summary.follow(history)
        after = picture.frame(summary)
        assert after != before
        before = after
        limits.add(tuple(plot.ax.get_ylim() for plot in picture._plots))
    assert len(drawn) <= 10
    assert len(limits) <= 4  # the loss falls by half decades
