"""Laws of scaling: identities that hold for any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parakit.errors import InputError
from parakit.scaling.laws import laws
from parakit.scaling.laws.laws import LAWS, find_law

COUNTS = st.integers(2, 100_000)
FRACTIONS = st.floats(0.0, 1.0)
SMALL = st.floats(0.0, 0.5)
RATES = st.floats(1e-3, 1e9)


@given(n=COUNTS, sigma=SMALL, kappa=st.floats(0.0, 0.1))
def test_karp_flatt_of_an_exact_usl_curve_is_a_line(n: int, sigma: float, kappa: float) -> None:
    assert laws.karp_flatt(laws.usl(n, sigma, kappa), n) == pytest.approx(sigma + kappa * n, rel=1e-6, abs=1e-9)


@given(n=COUNTS, serial=FRACTIONS)
def test_without_pairs_the_usl_is_amdahls_law(n: int, serial: float) -> None:
    assert laws.usl(n, serial, 0.0) == pytest.approx(1 / (serial + (1 - serial) / n), rel=1e-9)
    assert laws.karp_flatt(laws.usl(n, serial, 0.0), n) == pytest.approx(serial, rel=1e-6, abs=1e-9)


@given(serial=FRACTIONS, kappa=st.floats(0.0, 10.0), rate=RATES)
def test_one_worker_has_a_speedup_of_one(serial: float, kappa: float, rate: float) -> None:
    assert laws.usl(1, serial, kappa, rate) == pytest.approx(rate)
    for name in LAWS:
        law = find_law(name)
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
    law = find_law(name)
    values = [0.01] * len(law.coefficients)
    assert law.throughput(1, 7.0, values) == pytest.approx(7.0)
    grid = np.arange(1, 200)
    losses = law.loss(grid, values)
    assert (np.diff(losses) >= 0).all()
    assert losses == pytest.approx(1 + law.matrix(grid) @ np.array(values))


def test_laws_of_a_steps_time() -> None:
    assert find_law("log").loss(8, [0.1]) == pytest.approx(1 + 0.1 * 3)
    assert find_law("Ring").loss(4, [0.1]) == pytest.approx(1 + 0.1 * 2 * 3 / 4)
    with pytest.raises(InputError, match=r"no law 'moore'.*\n.*'usl'"):
        find_law("moore")
