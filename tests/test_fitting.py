"""Fits of laws: certified and published answers, intervals and bands that hold what they say, and clear refusals."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parakit.errors import InputError
from parakit.scaling.choosing import compare
from parakit.scaling.fitting import fit
from parakit.scaling.laws import LAWS, usl
from parakit.scaling.least_squares import minimise
from tests.benchmarks.coverage import CASES, Case, cover

DATA = Path(__file__).parent / "data" / "scaling"
KNOWN = {case["name"]: case for case in json.loads((DATA / "known_answers.json").read_text())["usl"]["cases"]}


def curve(name: str) -> tuple[list[int], list[float]]:
    rows = list(csv.reader((DATA / name).read_text().splitlines()))[2:]
    return [int(row[0]) for row in rows], [float(row[1]) for row in rows]


# --- the solver, on NIST's certified data

MODELS: dict[str, Callable[[Any, Any], Any]] = {
    "BoxBOD": lambda b, x: b[0] * (1 - np.exp(-b[1] * x)),
    "Misra1a": lambda b, x: b[0] * (1 - np.exp(-b[1] * x)),
    "Hahn1": lambda b, x: (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3),
    "Thurber": lambda b, x: (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3),
    "Kirby2": lambda b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH17": lambda b, x: b[0] + b[1] * np.exp(-x * b[3]) + b[2] * np.exp(-x * b[4]),
    "Rat43": lambda b, x: b[0] / ((1 + np.exp(b[1] - b[2] * x)) ** (1 / b[3])),
}


def nist(name: str) -> tuple[Any, Any, Any, Any]:
    """The second start, certified values, and the data."""
    lines = (DATA / "nist_strd" / f"{name}.dat").read_text().splitlines()
    parameters = [re.split(r"\s+", line.strip())[2:] for line in lines if re.match(r"\s*b\d+ =", line)]
    first = next(i for i, line in enumerate(lines) if re.match(r"Data:\s+y\s+x", line)) + 1
    data = np.array([[float(cell) for cell in line.split()] for line in lines[first:] if line.strip()])
    starts, certified = (np.array([float(row[place]) for row in parameters]) for place in (1, 2))
    return starts, certified, data[:, 1], data[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_certified_values_to_five_digits(name: str) -> None:
    start, certified, x, y = nist(name)
    model = MODELS[name]

    def jacobian(b: Any) -> Any:
        # By complex steps, which are exact to the last digits.
        steps = [np.where(np.arange(len(b)) == place, 1e-30j, 0) for place in range(len(b))]
        return np.stack([model(b + step, x).imag / 1e-30 for step in steps], axis=1)

    found = minimise(lambda b: model(b, x) - y, jacobian, [start])
    digits = -np.log10(np.abs(found.parameters / certified - 1) + 1e-16)
    assert digits.min() >= 5, digits


# --- published coefficients. They minimise squares of rates, so the solver is asked for that.


@pytest.mark.parametrize("name", ["exact two-parameter", "specsdm91", "raytracer rows 1..6", "specsdm91 rounded"])
def test_published_coefficients(name: str) -> None:
    case = KNOWN[name]
    counts, rates = (case["N"], case["X"]) if "N" in case else curve(case["data"].split()[0])
    if "first 6" in case.get("data", ""):
        counts, rates = counts[:6], rates[:6]
    sigma, kappa, rate = additive(counts, rates)
    expected = case["expect"]
    assert (sigma, kappa, rate) == pytest.approx(
        (expected["sigma"], expected["kappa"], expected["lambda"]), rel=case["rtol"]
    )


def test_a_coefficient_at_its_bound() -> None:
    case = KNOWN["raytracer all 11"]
    sigma, kappa, rate = additive(*curve("usl_raytracer.csv"))
    assert (sigma, rate) == pytest.approx((case["expect_ours"]["sigma"], case["expect_ours"]["lambda"]), rel=1e-3)
    assert kappa == pytest.approx(0.0, abs=1e-6)


def additive(counts: Any, rates: Any) -> tuple[float, float, float]:
    """Sigma, kappa and lambda by least squares of rates within bounds."""
    n, x = np.asarray(counts, np.float64), np.asarray(rates, np.float64)

    def jacobian(b: Any) -> Any:
        loss = 1 + b[0] * (n - 1) + b[1] * n * (n - 1)
        slope = -b[2] * n / loss**2
        return np.stack([slope * (n - 1), slope * n * (n - 1), n / loss], axis=1)

    start = np.array([0.02, 0.001, x[0] / n[0]])
    found = minimise(lambda b: usl(n, b[0], b[1], b[2]) - x, jacobian, [start], lower=np.zeros(3))
    return tuple(found.parameters.tolist())


# --- fits


def noisy(counts: Any, repeats: int, sigma: float, kappa: float, seed: int = 0, noise: float = 0.02) -> Any:
    generator = np.random.default_rng(seed)
    n = generator.permutation(np.repeat(counts, repeats))
    return n.tolist(), (usl(n, sigma, kappa, 100.0) * np.exp(noise * generator.standard_normal(n.size))).tolist()


def test_an_exact_curve_gives_its_parameters_back_in_any_order() -> None:
    counts = [8, 1, 4, 2, 16, 3]
    found = fit("usl", counts, [float(usl(n, 0.03, 0.002, 50.0)) for n in counts])
    assert found.parameters == pytest.approx({"lambda": 50.0, "sigma": 0.03, "kappa": 0.002}, rel=1e-6)
    assert found.peak == pytest.approx(math.sqrt(0.97 / 0.002), rel=1e-5)
    assert found.speedup(8) == pytest.approx(usl(8, 0.03, 0.002), rel=1e-6)
    assert found.predict([1, 2]) == pytest.approx([50.0, usl(2, 0.03, 0.002, 50.0)], rel=1e-6)
    assert found.ratio(64) == 4.0


def test_intervals_are_where_the_sum_of_squares_says() -> None:
    found = fit("amdahl", *noisy([1, 2, 4, 8], 4, 0.05, 0.0))
    low, high = found.intervals["sigma"]
    assert low < found.parameters["sigma"] < high
    assert low < 0.05 < high
    narrow = fit("amdahl", *noisy([1, 2, 4, 8], 4, 0.05, 0.0), confidence=0.5).intervals["sigma"]
    assert low < narrow[0] < narrow[1] < high
    assert found.intervals["lambda"][0] < 100 < found.intervals["lambda"][1]


def test_an_interval_ends_at_the_bound_of_its_coefficient() -> None:
    found = fit("usl", *noisy([1, 2, 4, 8], 3, 0.05, 0.0, seed=1))
    assert found.intervals["kappa"][0] == 0.0
    assert found.intervals["kappa"][1] > 0


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=str)
def test_bands_hold_what_they_promise(case: Case) -> None:
    held, _ = cover(case, 100, seed=5)
    assert held >= 0.9


def test_a_band_for_the_next_run_is_wider_and_both_grow_with_distance() -> None:
    found = fit("amdahl", *noisy([1, 2, 4], 5, 0.05, 0.0))
    mean, run = found.band([4, 64]), found.band([4, 64], kind="next run")
    assert (run[0] < mean[0]).all()
    assert (run[1] > mean[1]).all()
    assert mean[1][1] / mean[0][1] > mean[1][0] / mean[0][0]
    assert found.band(4) == pytest.approx((mean[0][0], mean[1][0]))


def test_superlinear_data_are_told_of_not_hidden() -> None:
    counts = [1, 2, 3, 4, 6, 8] * 2
    found = fit("amdahl", counts, [100 * n**1.1 for n in counts])
    assert found.parameters["sigma"] == pytest.approx(0.0, abs=1e-6)
    assert any("superlinear" in remark for remark in found.remarks)
    assert "superlinear" in repr(found)


def test_no_peak_and_few_counts_are_said() -> None:
    found = fit("usl", *noisy([1, 2, 4, 8], 1, 0.05, 0.0, noise=0.0))
    assert found.peak > 1e3
    assert any("Only 4 different worker counts" in remark for remark in found.remarks)
    assert "<table>" in found._repr_html_()


def test_without_degrees_of_freedom_nothing_is_known_of_the_uncertainty() -> None:
    found = fit("amdahl", [1, 2], [100, 190])
    assert found.parameters["sigma"] == pytest.approx(2 / 1.9 - 1)
    assert found.intervals == {}
    assert all(map(math.isnan, found.band(4)))
    assert any("nothing is known of the uncertainty" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("law", "counts", "rates", "message"),
    [
        ("usl", [1, 2, 4], [1, 2, 3], "'usl' needs at least 4 different worker counts; there are 3"),
        ("amdahl", [2, 2], [1, 1], "at least 2 different worker counts; there are 1"),
        ("amdahl", [1, 2], [1, 0], "A rate is 0"),
        ("amdahl", [1, 2], [1, float("nan")], "A rate is nan"),
        ("amdahl", [1, 2], [1, -3], "A rate is -3"),
        ("amdahl", [1, 2], [1, float("inf")], "A rate is inf"),
        ("amdahl", [0, 2], [1, 2], "A worker count is 0"),
        ("amdahl", [1, 2.5], [1, 2], "A worker count is 2.5"),
        ("amdahl", [1, 10**10], [1, 2], "A worker count is 1e"),
        ("amdahl", [1, 2, 4], [1, 2], "3 worker counts and 2 rates"),
        ("amdahl", [True, 2], [1, 2], "must be numbers"),
        ("amdahl", ["1", 2], [1, 2], "must be numbers"),
        ("amdahl", 3, [1, 2], "must be numbers"),
        ("moore", [1, 2], [1, 2], "no law 'moore'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(law: str, counts: Any, rates: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(law, counts, rates)


def test_options_that_cannot_be() -> None:
    with pytest.raises(InputError, match="confidence"):
        fit("amdahl", [1, 2], [1, 2], confidence=95)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind"):
        fit("amdahl", [1, 2, 4], [1, 2, 3]).band(4, kind="median")


# --- choosing


def published() -> dict[tuple[str, ...], list[tuple[int, float]]]:
    groups: dict[tuple[str, ...], list[tuple[int, float]]] = {}
    for row in list(csv.reader((DATA / "nvidia_dle_scaling.csv").read_text().splitlines()))[2:]:
        groups.setdefault(tuple(row[:5]), []).append((int(row[5]), float(row[6])))
    return {name: sorted(points) for name, points in groups.items() if len(points) >= 3}


def test_published_curves_are_extrapolated_to_their_largest_count() -> None:
    errors, by_log = [], []
    for points in published().values():
        (*counts, largest), (*rates, truth) = zip(*points, strict=True)
        errors.append(abs(compare(counts, rates).predict(largest).rate / truth - 1))
        by_log.append(abs(fit("log", counts, rates).predict(largest) / truth - 1))
    print(f"{len(errors)} curves: mean error {100 * np.mean(errors):.2f} %, worst {100 * max(errors):.2f} %; by c + d "
          f"log2 N alone {100 * np.mean(by_log):.2f} % and {100 * max(by_log):.2f} %")  # fmt: skip
    assert len(errors) >= 10
    assert np.mean(errors) <= 0.05
    assert max(errors) <= 0.15
    assert np.mean(errors) <= np.mean(by_log) + 1e-12


def test_another_law_is_taken_where_the_usual_one_is_clearly_off() -> None:
    counts = [1, 2, 4, 8, 16, 32] * 2
    found = compare(counts, [float(usl(n, 0.02, 0.01, 100.0)) for n in counts])
    assert found.best == "usl"
    assert found.held_out["usl"] < 1e-3 < 0.05 < found.held_out["log"]
    assert found.predict(64).rate == pytest.approx(float(usl(64, 0.02, 0.01, 100.0)), rel=1e-3)


def test_a_prediction_reaches_around_all_plausible_laws_and_says_how_far_it_goes() -> None:
    found = compare(*noisy([1, 2, 3, 4, 6, 8], 3, 0.03, 0.0))
    near, far = found.predict(16), found.predict(64)
    assert near.low < near.rate < near.high
    assert not near.scenario
    assert far.scenario
    assert far.ratio == 8.0
    assert far.words.startswith("A scenario, not a prediction")
    assert "2 times as many as were measured" in near.words
    for name in found.plausible:
        assert far.low <= float(found.fits[name].predict(64)) <= far.high
    assert found.best in repr(found)
    assert "<table>" in found._repr_html_()


def test_few_counts_let_few_laws_compete() -> None:
    found = compare([1, 2, 1, 2], [100, 190, 101, 189])
    assert set(found.fits) == set(LAWS) - {"usl"}
    assert found.best == "log"
    assert all(math.isnan(error) for name, error in found.held_out.items() if name != "linear")
    assert set(found.plausible) == {"amdahl", "log", "ring"}  # linear is seen to be off
    with pytest.raises(InputError, match="One worker count only"):
        compare([2, 2], [1, 1.1])


def test_a_model_from_elsewhere_is_shown_beside() -> None:
    class Elsewhere:
        name = "mechanistic"

        def predict(self, n: Any) -> Any:
            return 100.0 * np.asarray(n) ** 0.9

    counts = [1, 2, 4, 8]
    found = compare(counts, [100.0 * n**0.9 for n in counts], extra=[Elsewhere()])
    assert found.held_out["mechanistic"] == pytest.approx(0.0, abs=1e-9)
    assert "mechanistic" in found.plausible
    assert found.best in LAWS
    low, high = found.envelope(64)
    assert low <= 100 * 64**0.9 <= high


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "4", None])
def test_predictions_for_no_number_of_workers(n: Any) -> None:
    with pytest.raises(InputError, match="whole number"):
        compare([1, 2, 4], [1, 2, 3]).predict(n)
