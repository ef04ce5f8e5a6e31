"""Laws of scaling: known answers, and identities that hold for any numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parakit.errors import InputError
from parakit.scaling import laws
from parakit.scaling.laws import LAWS, law_named

KNOWN = json.loads((Path(__file__).parent / "data" / "scaling" / "known_answers.json").read_text())
COUNTS = st.integers(2, 100_000)
FRACTIONS = st.floats(0.0, 1.0)
SMALL = st.floats(0.0, 0.5)
RATES = st.floats(1e-3, 1e9)


def test_karp_flatt_of_a_textbook() -> None:
    for n, s, expected in KNOWN["karp_flatt"]["pairs"]:
        assert laws.karp_flatt(s, n) == pytest.approx(expected, abs=5e-5)


def test_gustafsons_own_numbers() -> None:
    known = KNOWN["gustafson"]
    n = known["N"]
    fractions = known["implied_s_prime=(N-S)/(N-1)"]
    for name, s in (("beam", 1021), ("wave", 1020), ("flow", 1016)):
        assert (n - s) / (n - 1) == pytest.approx(fractions[name], abs=5e-8)
        assert laws.gustafson(n, fractions[name]) == pytest.approx(s, abs=1e-3)
    assert laws.amdahl(n, 0.004) == pytest.approx(known["Amdahl_speedup_s=0.004"], abs=0.05)
    assert laws.amdahl(n, 0.008) == pytest.approx(known["Amdahl_speedup_s=0.008"], abs=0.05)


def test_the_usl_at_printed_digits() -> None:
    cases = {case["name"]: case for case in KNOWN["usl"]["cases"]}
    assert laws.usl_peak(0.001, 1e-5) == pytest.approx(cases["identities"]["expect"]["peak_N(0.001,1e-5)"], abs=5e-5)
    expected = cases["specsdm91 rounded"]["expect"]
    rates = [laws.usl(n, expected["sigma"], expected["kappa"], expected["lambda"]) for n in (1, 2, 3)]
    assert rates == pytest.approx([expected["X_at_1"], expected["X_at_2"], expected["X_at_3"]], rel=3e-6)
    assert math.floor(laws.usl_peak(expected["sigma"], expected["kappa"])) == expected["floor_peak_N"]


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


def test_the_latency_form_without_pairs() -> None:
    latency = laws.usl_latency(40, 0.1, 0.0, 5.0)
    assert laws.usl_workers_at_latency(latency, 0.1, 0.0, 5.0) == pytest.approx(40)
    assert laws.usl_workers_at_latency(1.0, 0.0, 0.0) == math.inf


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
