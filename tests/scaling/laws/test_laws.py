"""Laws of scaling: identities that hold for any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parakit.errors import InputError
from parakit.scaling.laws import laws
from parakit.scaling.laws.laws import LAWS, law_named

COUNTS = st.integers(2, 100_000)
FRACTIONS = st.floats(0.0, 1.0)
SMALL = st.floats(0.0, 0.5)
RATES = st.floats(1e-3, 1e9)


@given(n=COUNTS, sigma=SMALL, kappa=st.floats(0.0, 0.1))
def test_karp_flatt_of_an_exact_usl_curve_is_a_line(n: int, sigma: float, kappa: float) -> None:
    assert laws.karp_flatt(laws.usl(n, sigma, kappa), n) == pytest.approx(sigma + kappa * n, rel=1e-6, abs=1e-9)


@given(n=COUNTS, serial=FRACTIONS)
def test_amdahl_is_the_usl_without_pairs(n: int, serial: float) -> None:
    assert laws.amdahl(n, serial) == pytest.approx(laws.usl(n, serial, 0.0), rel=1e-9)
    assert laws.karp_flatt(laws.amdahl(n, serial), n) == pytest.approx(serial, rel=1e-6, abs=1e-9)


@given(n=COUNTS, serial=FRACTIONS)
def test_serial_fractions_convert_there_and_back(n: int, serial: float) -> None:
    parallel = laws.serial_fraction_of_parallel_run(serial, n)
    assert laws.serial_fraction_of_serial_run(parallel, n) == pytest.approx(serial, abs=1e-9)
    assert laws.gustafson(n, parallel) == pytest.approx(laws.amdahl(n, serial), rel=1e-6)


@given(n=COUNTS, sigma=SMALL, kappa=st.floats(1e-6, 0.1), rate=RATES)
def test_the_latency_form_is_inverted(n: int, sigma: float, kappa: float, rate: float) -> None:
    latency = laws.usl_latency(n, sigma, kappa, rate)
    assert laws.usl_workers_at_latency(latency, sigma, kappa, rate) == pytest.approx(n, rel=1e-6)


def test_the_latency_form_without_pairs_or_without_any_loss() -> None:
    latency = laws.usl_latency(40, 0.1, 0.0, 5.0)
    assert laws.usl_workers_at_latency(latency, 0.1, 0.0, 5.0) == pytest.approx(40)
    assert laws.usl_workers_at_latency(1.0, 0.0, 0.0) == math.inf


def test_the_latency_form_of_an_array_and_of_what_cannot_be() -> None:
    n = np.array([[1.0, 2.0], [30.0, 400.0]])
    found = laws.usl_workers_at_latency(laws.usl_latency(n, 0.05, 0.002, 7.0), 0.05, 0.002, 7.0)
    assert found == pytest.approx(n)
    # Faster than any number of workers answers, and where the root would be that of a number below 0.
    for latency, sigma, kappa in ((0.1, 0.05, 0.01), (0.0, 0.0, 2.0), (0.5, 0.0, 0.0), (0.1, 0.9, 0.0)):
        assert math.isnan(laws.usl_workers_at_latency(latency, sigma, kappa))
    mixed = laws.usl_workers_at_latency([0.01, laws.usl_latency(9, 0.1, 0.01)], 0.1, 0.01)
    assert math.isnan(mixed[0])
    assert mixed[1] == pytest.approx(9)


@given(n=st.integers(1, 10_000), sigma=st.floats(0.0, 1.0), kappa=st.floats(1e-12, 1.0))
def test_the_latency_form_keeps_its_digits_however_small_a_coefficient(n: int, sigma: float, kappa: float) -> None:
    found = laws.usl_workers_at_latency(laws.usl_latency(n, sigma, kappa), sigma, kappa)
    slope = abs(sigma - kappa + 2 * kappa * n) * n  # of the latency; where it is flat, digits are lost
    assert found == pytest.approx(n, rel=1e-9 + 1e-13 / slope)


def test_limits_of_the_usl() -> None:
    assert laws.usl_limit(0.05, 10.0) == pytest.approx(200.0)
    assert laws.usl_optimum(0.05) == pytest.approx(20.0)
    assert laws.usl_limit(0.0) == math.inf


@given(serial=FRACTIONS, kappa=st.floats(0.0, 10.0), rate=RATES)
def test_one_worker_has_a_speedup_of_one(serial: float, kappa: float, rate: float) -> None:
    assert laws.amdahl(1, serial) == pytest.approx(1.0)
    assert laws.gustafson(1, serial) == pytest.approx(1.0)
    assert laws.usl(1, serial, kappa, rate) == pytest.approx(rate)
    for name in LAWS:
        law = law_named(name)
        assert law.throughput(1, rate, [serial] * len(law.coefficients)) == pytest.approx(rate)


@given(sigma=SMALL, kappa=st.floats(1e-6, 0.1))
def test_the_peak_is_a_maximum(sigma: float, kappa: float) -> None:
    peak = laws.usl_peak(sigma, kappa)
    around = laws.usl(np.array([0.99, 1.0, 1.01]) * peak, sigma, kappa)
    assert around.argmax() == 1


def test_without_pairs_there_is_no_peak() -> None:
    assert laws.usl_peak(0.1, 0.0) == math.inf


@given(rate=RATES, n=COUNTS)
def test_speedup_and_efficiency(rate: float, n: int) -> None:
    assert laws.efficiency(rate * n, rate, n) == pytest.approx(1.0)
    assert laws.speedup(rate * n, rate) == pytest.approx(n)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_begins_at_the_rate_of_one_worker_and_loses_from_there(name: str) -> None:
    law = law_named(name)
    values = [0.01] * len(law.coefficients)
    assert law.throughput(1, 7.0, values) == pytest.approx(7.0)
    grid = np.arange(1, 200)
    losses = law.loss(grid, values)
    assert (np.diff(losses) >= 0).all()
    assert losses == pytest.approx(1 + law.matrix(grid) @ np.array(values))


def test_laws_of_a_steps_time() -> None:
    assert law_named("log").loss(8, [0.1]) == pytest.approx(1 + 0.1 * 3)
    assert law_named("Ring").loss(4, [0.1]) == pytest.approx(1 + 0.1 * 2 * 3 / 4)
    with pytest.raises(InputError, match=r"no law 'moore'.*\n.*'usl'"):
        law_named("moore")
