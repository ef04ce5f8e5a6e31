"""Points of a study of scaling: what cannot be is refused in words, and sums hold all that a fit needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parakit.errors import InputError
from parakit.scaling.laws.observations import Points, check_asked, check_points


def test_points_are_sorted_and_summed_up_by_count() -> None:
    counts, rates = check_points([4, 1, 4, 2], [8.0, 3.0, 4.5, 5])
    assert counts.tolist() == [1, 2, 4, 4]
    assert rates.tolist() == [3.0, 5.0, 8.0, 4.5]
    points = Points.of(counts, rates)
    assert points.counts.tolist() == [1, 2, 4]
    assert points.logs == pytest.approx([np.log(3), np.log(2.5), np.log(1.5)])
    assert points.within == pytest.approx(2 * np.log(4 / 3) ** 2)
    assert (points.many, points.freedom) == (4, 1)
    below = points.below(4)
    assert (below.counts.tolist(), below.many, below.within) == ([1, 2], 2, 0.0)


@pytest.mark.parametrize(
    ("counts", "rates", "message"),
    [
        ([1, 10**400], [1, 2], "must be numbers, not .*\n.*too large"),
        ([1, 10**5000], [1, 2], "must be numbers"),
        ([1, 2], [1, 10**400], "must be numbers"),
        ([1, 2j], [1, 2], "must be numbers"),
        ([1, b"2"], [1, 2], "must be numbers"),
        ([1, None], [1, 2], "must be numbers"),
        ([[1, 2], [3, 4]], [1, 2], "4 worker counts and 2 rates"),
        ([1, float("nan")], [1, 2], "A worker count is nan"),
        ([1, 1e10], [1, 2], r"A worker count is 1e\+10"),
        ([1, -1], [1, 2], "A worker count is -1"),
    ],
)
def test_points_that_cannot_be(counts: Any, rates: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_points(counts, rates)


@pytest.mark.parametrize("n", [0, -1, 0.5, float("nan"), float("inf"), True, "4", None, [1, 0], [[2, -3]], 10**400, 1j])
def test_counts_that_nothing_is_said_of(n: Any) -> None:
    with pytest.raises(InputError, match="number of workers"):
        check_asked(n)


def test_counts_keep_their_shape() -> None:
    assert check_asked(3).shape == ()
    assert check_asked([[1, 2.5]]).tolist() == [[1, 2.5]]
    assert check_asked(np.int64(7)) == 7
    assert check_asked(range(1, 4)).tolist() == [1, 2, 3]
    assert check_asked([]).size == 0
