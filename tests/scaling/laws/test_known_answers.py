"""Known answers: every number of `known_answers.json` that a source prints, to the digits that it prints."""

from __future__ import annotations

import csv
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from parakit.costs import collectives
from parakit.costs.collectives import Link
from parakit.scaling.laws import laws
from parakit.scaling.laws.solver import minimise

DATA = Path(__file__).parents[2] / "data" / "scaling"
KNOWN = json.loads((DATA / "known_answers.json").read_text(), parse_float=Decimal)
USL = {case["name"]: case for case in KNOWN["usl"]["cases"]}


def is_printed(value: float, number: Decimal | int) -> bool:
    """Whether a value rounds to a number as it is printed; one unit of the last digit may be off by half."""
    exponent = Decimal(number).as_tuple().exponent
    assert isinstance(exponent, int)
    return abs(value - float(number)) <= 0.5001 * 10.0**exponent


def curve(name: str) -> tuple[Any, Any]:
    rows = list(csv.reader((DATA / name).read_text().splitlines()))[2:]
    return np.array([float(row[0]) for row in rows]), np.array([float(row[1]) for row in rows])


def additive(counts: Any, rates: Any, lower: float = 0.0) -> tuple[Any, Any, float]:
    """The USL by least squares of rates, as the sources fit it: sigma, kappa, lambda; their errors; residual error."""
    n, x = np.asarray(counts, np.float64), np.asarray(rates, np.float64)

    def jacobian(b: Any) -> Any:
        loss = 1 + b[0] * (n - 1) + b[1] * n * (n - 1)
        slope = -b[2] * n / loss**2
        return np.stack([slope * (n - 1), slope * n * (n - 1), n / loss], axis=1)

    start = np.array([0.02, 0.001, x[0] / n[0]])
    found = minimise(lambda b: laws.usl(n, b[0], b[1], b[2]) - x, jacobian, [start], lower=lower)
    slopes = jacobian(found.parameters)
    residual = math.sqrt(found.sum_of_squares / (len(n) - 3))
    return found.parameters, residual * np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes))), residual


def test_specsdm91() -> None:
    expected = USL["specsdm91"]["expect"]
    n, x = curve("usl_specsdm91.csv")
    (sigma, kappa, rate), errors, residual = additive(n, x)
    peak, fitted = laws.usl_peak(sigma, kappa), laws.usl(n, sigma, kappa, rate)
    computed = {
        "sigma": sigma, "kappa": kappa, "lambda": rate, "se_sigma": errors[0], "se_kappa": errors[1],
        "se_lambda": errors[2], "resid_se": residual, "df": len(n) - 3, "peak_N": peak,
        "peak_X": laws.usl(peak, sigma, kappa, rate), "limit_X": rate / sigma,
        "optimal_N": 1 / sigma,
    }  # fmt: skip
    assert set(computed) == set(expected) - {"fitted", "residuals"}
    for name, value in computed.items():
        assert is_printed(float(value), expected[name]), name
    assert all(map(is_printed, fitted, expected["fitted"]))
    assert all(map(is_printed, x - fitted, expected["residuals"]))


def test_the_raytracer_and_why_r_says_other_intervals() -> None:
    case = USL["raytracer rows 1..6"]
    n, x = curve("usl_raytracer.csv")
    found, errors, _ = additive(n[:6], x[:6])
    one_sided, right = t.ppf(0.95, 5), t.ppf(0.975, 3)
    for place, name in enumerate(("sigma", "kappa", "lambda")):
        assert found[place] == pytest.approx(float(case["expect"][name]), rel=float(case["rtol"]))
        for side, (theirs, correct) in enumerate(
            zip(case["R_confint_labelled_95"][name], case["correct_95_t_df_n_minus_3_ours"][name], strict=True)
        ):
            sign = 2 * side - 1
            assert is_printed(found[place] + sign * one_sided * errors[place], theirs)
            assert is_printed(found[place] + sign * right * errors[place], correct)


def test_the_raytracer_with_a_coefficient_at_its_bound_and_beyond() -> None:
    case = USL["raytracer all 11"]
    for key, lower in (("expect_ours", 0.0), ("unbounded_ours", -math.inf)):
        found = additive(*curve("usl_raytracer.csv"), lower)[0]
        for value, name in zip(found, ("sigma", "kappa", "lambda"), strict=True):
            assert is_printed(value, case[key][name]), (key, name)


@pytest.mark.parametrize("name", ["exact two-parameter", "specsdm91 rounded"])
def test_rounded_curves(name: str) -> None:
    case = USL[name]
    found = additive([float(n) for n in case["N"]], [float(x) for x in case["X"]])[0]
    for value, key in zip(found, ("sigma", "kappa", "lambda"), strict=True):
        assert value == pytest.approx(float(case["expect"][key]), rel=float(case["rtol"]))
    expected = {key: value for key, value in case["expect"].items() if key.startswith("X_at")}
    for key, value in expected.items():
        n = int(key.removeprefix("X_at_"))
        given = [float(case["expect"][part]) for part in ("sigma", "kappa", "lambda")]
        assert laws.usl(n, *given) == pytest.approx(float(value), rel=3e-6)
    if expected:
        assert math.floor(laws.usl_peak(found[0], found[1])) == case["expect"]["floor_peak_N"]


def test_identities() -> None:
    expected = USL["identities"]["expect"]
    assert is_printed(laws.usl_peak(0.001, 1e-5), expected["peak_N(0.001,1e-5)"])


def test_what_another_library_gets_wrong() -> None:
    sigma, kappa, rate = 0.02671591, 7.690945e-4, 995.6486  # of its example: a count at a rate, without kappa
    second = KNOWN["usl"]["fixtures_NOT_to_copy"][1]
    assert "asserted 15.35, true lower root 19.92 (X(15.35)=9842)" in second
    assert laws.usl(15.35, sigma, kappa, rate) == pytest.approx(9842, abs=0.5)
    assert laws.usl(19.92, sigma, kappa, rate) == pytest.approx(11048, rel=1e-4)


def test_karp_flatt() -> None:
    for n, s, expected in KNOWN["karp_flatt"]["pairs"]:
        assert is_printed(laws.karp_flatt(float(s), n), expected)


def test_amdahl() -> None:
    known = KNOWN["gustafson"]  # whose paper has its figures for comparison
    assert is_printed(laws.usl(known["N"], 0.004, 0.0), known["Amdahl_speedup_s=0.004"])
    assert is_printed(laws.usl(known["N"], 0.008, 0.0), known["Amdahl_speedup_s=0.008"])


@pytest.mark.parametrize("p", [2, 4, 7, 8, 100, 1024])
def test_costs_as_mpich_states_them(p: int) -> None:
    known, link, nbytes = KNOWN["mpich_costs"], Link(20e-6, 1e-9, 0.2e-9), 4_000_000
    group = 2 ** math.floor(math.log2(p))  # its (p-1)/p is meant for the group that takes part in all rounds
    values = {"alpha": 20e-6, "beta": 1e-9, "gamma": 0.2e-9, "n": nbytes, "lg": math.log2, "floor": math.floor}
    stated = known["rabenseifner_pow2" if group == p else "rabenseifner_nonpow2"]
    assert collectives.halving_doubling(p, nbytes, link) == pytest.approx(formula(stated, values | {"p": group}))
    if group == p:
        assert collectives.recursive_doubling(p, nbytes, link) == pytest.approx(
            formula(known["recursive_doubling"], values | {"p": p})
        )


def formula(text: str, values: dict[str, Any]) -> float:
    """A formula of the file, of which we know what it says."""
    text = text.replace("floor(lg p)", "floor(lg(p))")
    return float(eval(text, {"__builtins__": {}}, values))


@pytest.mark.parametrize(("n", "microseconds", "gigabytes"), [(8, 8142.6, 230.77), (16, 35215, 57.17)])
def test_bus_bandwidth_is_that_of_a_ring(n: int, microseconds: float, gigabytes: float) -> None:
    assert f"n={n}, {microseconds:g} us -> {gigabytes} GB/s" in KNOWN["nccl_tests"]["check"]
    size, seconds = 2.0**30, microseconds * 1e-6
    bus = size / seconds * 2 * (n - 1) / n
    assert bus / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert collectives.ring(n, size, Link(0.0, 1 / bus, 0.0)) == pytest.approx(seconds)
