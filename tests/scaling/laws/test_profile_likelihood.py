"""Bands of fits: they hold what they promise, also at a bound, and are what the sum of squares says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import f

from parakit.scaling.laws.fit import Fit, fit
from parakit.scaling.laws.laws import usl
from tests.benchmarks.coverage import CASES, Case, cover
from tests.scaling.laws.test_fit import noisy


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[6]], ids=str)
def test_bands_hold_what_they_promise_and_no_more(case: Case) -> None:
    held, width = cover(case, 100, seed=5)
    assert held >= 0.9
    assert width < case.widest


def excess(found: Fit, parameters: Any) -> float:
    """How much the sum of squares exceeds the least, as a multiple of what an F test allows."""
    rate, *values = parameters
    logs = np.log(found.rates) - np.log(found.law.throughput(found.counts, rate, values))
    allowed = found.noise_sd**2 * f.ppf(found.confidence, 1, found.degrees_of_freedom)
    return float((np.sum(logs**2) - found.sum_of_squares) / allowed)


def farthest(found: Fit, n: int, sign: int) -> float:
    """The edge of the band by another method: the largest (or least) throughput that the sum of squares allows."""
    best = np.array(list(found.parameters.values()))
    size = np.array([best[0], 0.05, 0.005][: len(best)])

    def throughput(p: Any) -> float:
        return float(np.log(found.law.throughput(n, p[0] * size[0], p[1:] * size[1:])))

    solutions = [
        minimize(
            lambda p: -sign * throughput(p), start, method="SLSQP", options={"ftol": 1e-12, "maxiter": 500},
            bounds=[(1e-3, None)] + [(0.0, None)] * (len(best) - 1),
            constraints={"type": "ineq", "fun": lambda p: 1 - excess(found, p * size)},
        )
        for start in (best / size, best / size + 0.02, best / size * 0.9 + 0.001)
    ]  # fmt: skip
    good = [throughput(each.x) for each in solutions if excess(found, each.x * size) <= 1 + 1e-6]
    return math.exp(sign * max(sign * value for value in good))


@pytest.mark.parametrize(("sigma", "kappa"), [(0.05, 0.002), (0.05, 0.0), (0.0, 0.002), (0.0, 0.0)])
@pytest.mark.parametrize("law", ["amdahl", "usl", "log"])
def test_a_band_ends_where_the_sum_of_squares_says(law: str, sigma: float, kappa: float) -> None:
    found = fit(law, *noisy([1, 2, 4, 8], 3, sigma, kappa, seed=3))
    for n in (1, 8, 32):
        low, high = found.band(n)
        assert low == pytest.approx(farthest(found, n, -1), rel=3e-3)
        assert high == pytest.approx(farthest(found, n, 1), rel=3e-3)


def test_a_next_run_scatters_around_the_law() -> None:
    # With many measurements the law itself is known, and what is left is a normal quantile of the noise.
    found = fit("amdahl", *noisy([1, 2, 4, 8], 2000, 0.05, 0.0, noise=0.03))
    low, high = found.band(4, kind="next run")
    assert math.log(high / low) / 2 == pytest.approx(1.96 * 0.03, rel=0.03)


def test_what_the_measurements_do_not_limit_is_said_and_bounds_nothing_else() -> None:
    counts = [8, 16, 32]
    found = fit("log", counts, [100.0, 150.0, 235.0])
    assert found.intervals["d over c"][1] == math.inf
    assert found.intervals["lambda"][1] == math.inf
    assert any("do not limit lambda and d over c from above" in remark for remark in found.remarks)
    low, high = found.band([1, 8, 64])
    assert math.isinf(high[0])
    assert np.isfinite(high[1:]).all()
    assert (high[1:] / low[1:] < 20).all()


def test_a_band_never_exceeds_what_the_law_allows() -> None:
    # A rate per worker cannot grow, so however uncertain a law is, its band is limited by that of fewer workers.
    for seed in range(8):
        found = fit("usl", *noisy([2, 3, 4, 6], 1, 0.1, 0.01, seed=seed, noise=0.2))
        low, high = found.band([6, 60])
        assert high[1] <= 10 * high[0] * (1 + 1e-9)
        assert low[1] <= high[1]


def test_many_counts_are_banded_as_few_are() -> None:
    counts = np.arange(1, 221)
    rates = usl(counts, 0.02, 1e-4, 50.0) * np.exp(0.05 * np.random.default_rng(2).standard_normal(220))
    found = fit("usl", counts, rates)
    low, high = found.band(900)
    assert low == pytest.approx(farthest(found, 900, -1), rel=5e-3)
    assert high == pytest.approx(farthest(found, 900, 1), rel=5e-3)
