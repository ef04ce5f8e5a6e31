"""Pictures of studies and of cost models: what they show is what was measured, or what the model says."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parakit.costs.model import CostModel
from parakit.errors import InputError
from parakit.plots.labels import label_points
from parakit.plots.study import picture, scaling_efficiency, scaling_speedup
from parakit.scaling.study.records import About, Measurement
from parakit.scaling.study.study import Scaling

COSTS = CostModel(sample_seconds=1e-3, batch_size=256, nbytes=4_000_000, network="1GbE", control_seconds=0.01)


class Law:
    """A law with a band, as fits have."""

    def predict(self, n: Any) -> Any:
        return 1000.0 * n / (1 + 0.05 * (n - 1))

    def band(self, n: Any) -> tuple[Any, Any]:
        return 0.9 * self.predict(n), 1.1 * self.predict(n)


def study(counts: tuple[int, ...] = (1, 2, 4), cores: int = 4, *, plain: bool = True, **more: Any) -> Scaling:
    found = []
    for block, weather in enumerate((1.0, 0.5, 0.8)):
        for n in counts:
            rate = 1000 * weather * n**0.8 * (1 + 0.05 * (block - 1) * (n > 1))
            found.append(Measurement(n, block, block, rate, 0.1, 5, 0.5, cores=cores))
        for threads, rate in ((1, 1250.0), (cores, 2000.0)) if plain else ():
            found.append(Measurement(0, block, block, rate * weather, 0.1, 5, 0.5, kind="plain", threads=threads,
                                     cores=cores))  # fmt: skip
    return Scaling(found, About(cores=cores, **more))


def axes() -> Axes:
    return Figure(figsize=(7, 4), dpi=60, layout="constrained").subplots()


def drawn(ax: Axes) -> Axes:
    """Rendered, so that limits, texts and legends are where they will be seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.savefig(io.BytesIO(), format="png")
    return ax


def points(ax: Axes) -> np.ndarray:
    lone = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    return np.array([(line.get_xdata()[0], line.get_ydata()[0]) for line in lone], float)


def named(ax: Axes, name: str) -> Any:
    return next(line for line in ax.lines if line.get_label() == name)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


STUDIES = {
    "usual": study,
    "far": lambda: study((1, 2, 4, 8, 16, 32, 64), 64),
    "one count": lambda: study((1,)),
    "without one worker": lambda: study((2, 4)),
    "without rivals": lambda: study(plain=False),
    "crowded": lambda: study((1, 2, 4), 2),
    "crowded far": lambda: study((1, 2, 32), 2),
    "nothing": lambda: Scaling([], stopped="interrupted."),
    "many counts": lambda: study(tuple(range(1, 15)), 14),
    "simulated": lambda: study(plain=False, pool="far away", simulated=True),
}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("draw", [scaling_speedup, scaling_efficiency])
def test_every_study_can_be_drawn_without_a_warning(name: str, draw: Any) -> None:
    ax = axes()
    assert draw(STUDIES[name](), ax) is ax
    drawn(ax)


@pytest.mark.parametrize("most", [None, 8, 64])
def test_points_stand_at_the_medians_and_bars_reach_the_quartiles(most: int | None) -> None:
    made = study()
    for draw, power in ((scaling_speedup, 0), (scaling_efficiency, 1)):
        ax = draw(made, axes(), most=most)
        expected = [(n, made.speedup(n).median / n**power) for n in (1, 2, 4)]
        np.testing.assert_allclose(points(ax), expected)
        bars = [np.asarray(line.get_ydata(), float) for line in ax.lines if list(line.get_xdata()) == [4, 4]]
        four = made.speedup(4)
        np.testing.assert_allclose(bars, [np.array([four.low, four.high]) / 4**power])


def test_rivals_stand_at_their_own_speed() -> None:
    made = study()
    level = np.asarray(named(scaling_speedup(made, axes()), "plain PyTorch, 4 cores").get_ydata(), float)
    np.testing.assert_allclose(level, 2.0)
    line = named(scaling_efficiency(made, axes()), "plain PyTorch, 4 cores")
    np.testing.assert_allclose(np.asarray(line.get_ydata()) * np.asarray(line.get_xdata()), 2.0)
    assert legend(scaling_speedup(study(plain=False), axes())) == ["ideal"]


@pytest.mark.parametrize("given", [True, False])
def test_fits_are_drawn_with_their_bands_relative_to_one_worker(given: bool) -> None:
    made = study()
    made.fits.update({} if given else {"usl": Law()})
    ax = scaling_speedup(made, axes(), fits={"usl": Law()} if given else None, most=8)
    at, values = (np.asarray(part, float) for part in named(ax, "usl").get_data())
    unit = made.row(1).rate.median
    np.testing.assert_allclose(values, Law().predict(at) / unit)
    assert at.max() == 8
    (band,) = [c for c in ax.collections if c.get_alpha() == 0.18]
    top = band.get_paths()[0].get_extents().y1
    assert top == pytest.approx(1.1 * Law().predict(8) / unit)


def test_predictions_with_bounds_of_their_own_are_drawn_too() -> None:
    class Prediction:
        def __init__(self, n: int) -> None:
            self.rate, self.low, self.high = 900.0 * n, 800.0 * n, 1000.0 * n

    class Comparison:
        predict = staticmethod(Prediction)

    ax = scaling_speedup(study(), axes(), fits={"all": Comparison()})
    values = np.asarray(named(ax, "all").get_ydata(), float)
    np.testing.assert_allclose(values, 900 * np.arange(1, 5) / 800)
    with pytest.raises(InputError, match="predict"):
        scaling_speedup(study(), axes(), fits={"all": 3})


def test_axes_are_logarithmic_where_counts_span_far() -> None:
    near, far = scaling_speedup(study(), axes()), scaling_speedup(STUDIES["far"](), axes())
    assert (near.get_xscale(), far.get_xscale(), far.get_yscale()) == ("linear", "log", "log")
    drawn(far)
    ticks = [text.get_text() for text in far.get_xticklabels()]
    assert {"1", "2", "4", "64"} <= set(ticks)
    assert far.get_xlim()[0] < 1 < 64 < far.get_xlim()[1]


def test_crowded_counts_are_hollow_and_shaded() -> None:
    ax = scaling_speedup(study((1, 2, 4), 2), axes())
    assert "more than cores" in legend(ax)
    hollow = [line.get_markerfacecolor() == "white" for line in ax.lines if line.get_marker() == "o"]
    assert hollow == [False, False, True]
    assert "more than cores" not in legend(scaling_speedup(study(), axes()))


def test_what_is_simulated_incomplete_or_missing_says_so() -> None:
    assert scaling_speedup(STUDIES["simulated"](), axes()).get_ylabel().endswith("(simulated)")
    assert scaling_efficiency(STUDIES["simulated"](), axes()).get_ylabel().endswith("(simulated)")
    half = scaling_speedup(STUDIES["nothing"](), axes())
    texts = [text.get_text() for text in half.texts]
    assert "incomplete" in texts
    assert any("one worker was not measured" in text for text in texts)


@pytest.mark.parametrize("name", ["usual", "crowded", "far"])
def test_legends_stay_within_the_picture(name: str) -> None:
    made = STUDIES[name]()
    made.fits.update({"usl": Law(), "amdahl": Law()})
    figure = Figure(figsize=(9.6, 4.0), dpi=60, layout="constrained")
    left, right = figure.subplots(1, 2)
    scaling_speedup(made, left)
    scaling_efficiency(made, right)
    drawn(left)
    first, second = (ax.get_legend().get_window_extent() for ax in (left, right))
    assert first.x1 <= second.x0
    assert second.x1 <= figure.bbox.x1
    for ax in (left, right):
        assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1
        assert ax.get_window_extent().height > 0.5 * figure.bbox.height


def labels(ax: Axes) -> list[Any]:
    return [text for text in ax.texts if text.get_text().endswith(("×", " %")) and text.get_visible()]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("width", [8.4, 9.6])
@pytest.mark.parametrize("name", ["usual", "one count", "without rivals", "crowded", "crowded far", "simulated", "six"])
def test_labels_cover_no_curve_no_point_and_no_label(name: str, width: float, fitted: bool) -> None:
    made = study((1, 2, 3, 4, 6, 8), 8) if name == "six" else STUDIES[name]()
    made.fits.update({"usl": Law()} if fitted else {})
    figure = Figure(figsize=(width, 4.0), dpi=100, layout="constrained")
    both = figure.subplots(1, 2)
    for ax, draw in zip(both, (scaling_speedup, scaling_efficiency), strict=True):
        draw(made, ax)
    drawn(both[0])
    for ax in both:
        boxes = [text.get_window_extent() for text in labels(ax)]
        assert len(boxes) == len(made.workers) or (name, width) == ("six", 8.4)
        for place, box in enumerate(boxes):
            assert box.x0 >= ax.bbox.x0
            assert box.x1 <= ax.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:place])
            assert not any(box.contains(*ax.transData.transform(point)) for point in points(ax))
        covered = sum(
            bool(line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False))
            for line in ax.lines for box in boxes
        )  # fmt: skip
        # Where curves lie close beside each other, some of a label has to be on one.
        assert covered <= (2 if name in ("six", "crowded far") or width == 8.4 else 0)


def test_a_label_that_has_no_place_of_its_own_is_left_out() -> None:
    ax = axes()
    ax.plot([0, 1], [0, 1])
    label_points(ax, [(0.5, 0.5, f"{number} %") for number in range(60)])
    drawn(ax)
    boxes = [text.get_window_extent() for text in labels(ax)]
    assert 0 < len(boxes) < 60
    assert not any(box.overlaps(other) for place, box in enumerate(boxes) for other in boxes[:place])


def test_the_picture_is_a_png_of_both() -> None:
    assert picture(study()).startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "8"])
def test_wrong_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="most is"):
        scaling_speedup(study(), axes(), most=wrong)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: scaling_speedup(3),
        lambda: scaling_efficiency(study(), fits={"usl": 3}),
    ],
)
def test_what_cannot_be_drawn_leaves_no_empty_figure(draw: Any) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    with pytest.raises(InputError):
        draw()
    assert pyplot.get_fignums() == before


def test_without_axes_a_figure_is_made() -> None:
    from matplotlib import pyplot

    ax = scaling_speedup(study())
    assert ax.figure.number in pyplot.get_fignums()
    pyplot.close(ax.figure)
