"""The gradient noise scale: against gradients whose noise scale is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parakit.errors import InputError
from parakit.events.noise_scale import NoiseEstimator, NoiseScale, statistical_efficiency, time_to_target_speedup

SIZE = 400
TRUE = np.full(SIZE, 0.1)  # squared length 4
SIGMA = 0.5  # trace 100: a noise scale of 25


def drawn(generator: Any, counts: list[int], true: np.ndarray = TRUE, sigma: float = SIGMA) -> Any:
    """Squared norms of the workers' mean gradients over their samples, and of the global one."""
    rows = np.array(counts)
    with np.errstate(divide="ignore"):
        noise = np.where(rows > 0, sigma / np.sqrt(rows), 0.0)
    means = true + noise[:, None] * generator.standard_normal((len(counts), SIZE))
    means[rows == 0] = 0.0
    whole = rows @ means / rows.sum()
    return (means**2).sum(axis=1), counts, float((whole**2).sum())


def estimated(counts: list[int], steps: int = 400, decay: float = 0.99, **how: Any) -> NoiseScale:
    generator, estimator = np.random.default_rng(1), NoiseEstimator(decay)
    for step in range(steps):
        found = estimator.update(step, *drawn(generator, counts, **how))
    return found


@pytest.mark.parametrize("counts", [[8, 8], [8, 8, 8, 8], [1, 2, 3, 50], [5, 0, 7]])
def test_a_known_noise_scale_is_found_with_any_shares(counts: list[int]) -> None:
    found = estimated(counts)
    assert found.settled
    assert found.trace == pytest.approx(100, rel=0.03)
    assert found.gradient_squared == pytest.approx(4, rel=0.08)
    assert found.noise_scale == pytest.approx(25, rel=0.1)
    assert found.critical_batch_size == found.noise_scale
    assert found.relative_error is not None
    assert 0 < found.relative_error < 0.1
    assert "about 2" in found.words


def test_equal_shares_give_the_published_estimators() -> None:
    norms, counts, whole = drawn(np.random.default_rng(2), [16, 16, 16, 16])
    found = NoiseEstimator().update(0, norms, counts, whole)
    small, big = 16, 64
    assert found.gradient_squared == pytest.approx((big * whole - small * norms.mean()) / (big - small))
    assert found.trace == pytest.approx((norms.mean() - whole) / (1 / small - 1 / big))


def test_unequal_shares_are_unbiased_step_by_step() -> None:
    generator = np.random.default_rng(3)
    each = [NoiseEstimator().update(0, *drawn(generator, [1, 4, 59])) for _ in range(3000)]
    for name, true in (("trace", 100.0), ("gradient_squared", 4.0)):
        values = np.array([getattr(found, name) for found in each])
        assert values.mean() == pytest.approx(true, abs=4 * values.std() / np.sqrt(len(values)))


def test_standard_errors_are_those_of_repeats() -> None:
    generator = np.random.default_rng(4)
    ends = []
    for _ in range(60):
        estimator = NoiseEstimator(0.95)
        for step in range(120):
            found = estimator.update(step, *drawn(generator, [8, 8]))
        ends.append(found)
    spread = np.std([found.gradient_squared for found in ends])
    assert np.mean([found.gradient_squared_error for found in ends]) == pytest.approx(spread, rel=0.3)


def test_what_is_not_settled_is_said_in_words() -> None:
    assert "20 more steps" in NoiseEstimator().latest.words
    early = estimated([8, 8], steps=5)
    assert not early.settled
    assert early.noise_scale is early.critical_batch_size is early.relative_error is None
    assert "15 more steps" in early.words
    drowned = estimated([8, 8], true=np.zeros(SIZE))
    assert drowned.noise_scale is None
    assert "drowns" in str(drowned)
    quiet = estimated([8, 8], sigma=0.0)
    assert quiet.noise_scale is None
    assert "hardly differ" in quiet.words
    for found in (early, drowned, quiet):
        assert "nan" not in found.words


def test_steps_that_teach_nothing_are_left_out() -> None:
    estimator = NoiseEstimator()
    assert estimator.update(0, [4.0], [8], 4.0).steps == 0
    assert estimator.update(1, [4.0, 0.0], [8, 0], 4.0).steps == 0
    assert estimator.update(2, [4.0, np.nan], [8, 8], 4.0).steps == 0
    assert estimator.update(3, [4.0, 5.0], [8, 8], np.inf).steps == 0
    assert estimator.update(4, [4.0, 5.0], [8, 8], 3.0).step == 4


@pytest.mark.parametrize(
    ("norms", "counts", "whole"), [([1.0, 2.0], [1], 1.0), ([-1.0, 2.0], [1, 1], 1.0), ([1.0, 2.0], [1, 1], -1.0)]
)
def test_what_cannot_be_is_refused(norms: Any, counts: Any, whole: float) -> None:
    with pytest.raises(InputError):
        NoiseEstimator().update(0, norms, counts, whole)


def test_a_bad_decay_or_batch_is_refused() -> None:
    for decay in (1.0, -0.1, "slow", True):
        with pytest.raises(InputError, match="decay"):
            NoiseEstimator(decay)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="critical batch"):
        statistical_efficiency(8, 0.0)
    with pytest.raises(InputError, match="rate with one worker"):
        time_to_target_speedup(8.0, 0.0, 8, 8, 100.0)


def test_efficiency_and_time_to_target() -> None:
    assert statistical_efficiency(100, 100.0) == 0.5
    assert statistical_efficiency([0, 300], 100.0).tolist() == [1.0, 0.25]
    # Steps and examples obey (S / S_min - 1) (E / E_min - 1) = 1 where S = S_min (1 + B_crit / B), E = S B.
    batch, critical = 37.0, 100.0
    steps, examples = 1 + critical / batch, 1 / statistical_efficiency(batch, critical)
    assert (steps - 1) * (examples - 1) == pytest.approx(1)
    assert time_to_target_speedup(8.0, 1.0, 256, 256, 100.0) == 8.0
    weak = time_to_target_speedup(8.0, 1.0, 8 * 256, 256, 1024.0)
    assert weak == pytest.approx(8 * (1 + 256 / 1024) / (1 + 2048 / 1024))
