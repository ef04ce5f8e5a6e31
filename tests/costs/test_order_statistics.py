"""Waiting for the slowest: against tables of order statistics, and against draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parakit.costs import order_statistics
from parakit.errors import InputError, WorkerCountError

ROWS: list[dict[str, float]] = json.loads(
    (Path(__file__).parents[1] / "data" / "order_statistics_max.json").read_text(encoding="utf-8")
)["rows"]  # fmt: skip
DRAWS = 200_000


def column(name: str) -> list[float]:
    return [row[name] for row in ROWS]


def test_known_answers() -> None:
    known = column("E_max_std_normal")
    assert order_statistics.maximum_normal(column("N")) == pytest.approx(known, abs=6e-7)
    assert order_statistics.maximum_normal(100) == pytest.approx(
        dict(zip(column("N"), known, strict=True))[100], abs=6e-7
    )


def test_a_hundred_workers_meet_a_rare_straggler_most_of_the_time() -> None:
    assert order_statistics.straggler_probability(100, 0.01) == pytest.approx(0.634, abs=5e-4)  # Dean and Barroso: 63 %
    assert order_statistics.straggler_probability([1, 2], 0.5).tolist() == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize(("spread", "probability", "times"), [(0.1, 0.02, 3.0), (0.3, 0.2, 1.5), (0.02, 0.3, 8.0)])
@pytest.mark.parametrize("n", [1, 4, 32])
def test_stragglers_as_drawn(n: int, spread: float, probability: float, times: float) -> None:
    generator = np.random.default_rng(0)
    drawn = 1 + spread * generator.standard_normal((DRAWS // n, n))
    drawn *= np.where(generator.random(drawn.shape) < probability, times, 1.0)
    largest = drawn.max(axis=1)
    error = largest.std() / np.sqrt(len(largest))
    assert order_statistics.maximum_with_stragglers(n, spread, probability, times) == pytest.approx(
        largest.mean(), abs=5 * error
    )


def test_without_stragglers_or_spread_little_is_left_to_wait_for() -> None:
    counts = np.array([1, 8, 64])
    assert order_statistics.maximum_with_stragglers(counts, 0.1, 0.0, 3.0) == pytest.approx(
        1 + 0.1 * order_statistics.maximum_normal(counts)
    )
    assert order_statistics.maximum_with_stragglers(counts, 0.0, 0.1, 3.0) == pytest.approx(1 + 2 * (1 - 0.9**counts))
    assert order_statistics.maximum_with_stragglers(counts, 0.0, 0.0, 3.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("probability", [-0.1, 1.0, 2, "often", None, True, float("nan")])
def test_what_is_no_probability_is_refused(probability: Any) -> None:
    with pytest.raises(InputError, match="from 0 to below 1"):
        order_statistics.straggler_probability(2, probability)


def test_no_workers_are_refused() -> None:
    with pytest.raises(WorkerCountError):
        order_statistics.maximum_normal(0)
