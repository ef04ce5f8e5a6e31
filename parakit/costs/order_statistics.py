"""Waiting for the slowest: how long the last of N workers takes, when each takes a little longer or shorter.

Pure: expectations of the largest of N independent draws. A synchronous step ends with its last worker, so its time is
such an expectation, and it grows with N although nobody became slower.

References
----------
Dean, Barroso: "The tail at scale", Commun. ACM 56 (2013) 74.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.costs.collectives import Counts, like_given, worker_counts
from parakit.errors import InputError

__all__ = ["maximum_normal", "maximum_with_stragglers", "straggler_probability"]

Floats = npt.NDArray[np.float64]

# The trapezoidal rule converges faster than any power of the step for what is smooth and dies away at both ends.
_REACH, _PER_UNIT = 10.0, 64


@lru_cache(maxsize=1)
def _normal_grid() -> tuple[Floats, Floats, Floats]:
    """Places, density times step, and the logarithm of the distribution below each place."""
    x = np.arange(-_REACH * _PER_UNIT, _REACH * _PER_UNIT + 1) / _PER_UNIT
    weights = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) / _PER_UNIT
    below = np.log([0.5 * math.erfc(-place / math.sqrt(2)) for place in x])
    return x, weights, below


def maximum_normal(n: Counts) -> Any:
    """Expected largest of N standard normal numbers, c_N = N times the integral of x phi(x) Phi(x)^(N - 1).

    Parameters
    ----------
    n : int or array

    Returns
    -------
    float, or float64 array of the shape of n
        In standard deviations above the mean: 0 for one, 0.5642 for two, 3.24 for a thousand.
    """
    counts = worker_counts(n)
    return like_given(n, np.vectorize(_largest_normal, otypes=[float])(counts))


@lru_cache(maxsize=4096)
def _largest_normal(count: float) -> float:
    x, weights, below = _normal_grid()
    return float((x * weights * np.exp(math.log(count) + (count - 1) * below)).sum())


def straggler_probability(n: Counts, probability: float) -> Any:
    """How likely at least one of N workers is slow, if each is with a probability: 1 - (1 - p)^N."""
    check_probability("probability", probability)
    return like_given(n, -np.expm1(worker_counts(n) * math.log1p(-probability)))


def check_probability(name: str, value: Any) -> None:
    """Refuse what is no probability below 1."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value < 1:
        raise InputError(f"{name} is {value!r}; it must be a number from 0 to below 1.", remedy=f"such as {name}=0.01")


def maximum_with_stragglers(n: Counts, spread: float, probability: float, times: float) -> Any:
    """Expected largest of N times of mean 1, of which some are several times as long.

    Each is normal, of mean 1 and standard deviation `spread`; with the probability given it is multiplied by `times`.

    Parameters
    ----------
    n : int or array
    spread : float
        Relative standard deviation.
    probability : float
        That a worker straggles in a step.
    times : float
        How many times as long it takes then; at least 1.

    Returns
    -------
    float, or float64 array of the shape of n
        As a multiple of the mean of a worker that does not straggle.
    """
    check_probability("probability", probability)
    counts = worker_counts(n)
    if probability == 0 or times == 1:
        return like_given(n, 1 + spread * np.asarray(maximum_normal(counts)))
    if spread == 0:
        return like_given(n, 1 + (times - 1) * np.asarray(straggler_probability(counts, probability)))
    return like_given(n, _maximum_of_mixture(counts, spread, probability, times))


def _maximum_of_mixture(counts: Floats, spread: float, probability: float, times: float) -> Floats:
    """The integral of 1 - F(x)^N over x > a, plus a, with a so low that F is 0 below."""
    x, _, below = _normal_grid()
    high = times * (1 + _REACH * spread)
    low = min(1 - _REACH * spread, times * (1 - _REACH * spread))
    places = np.linspace(low, high, 4001)
    usual = np.interp((places - 1) / spread, x, np.exp(below))
    slow = np.interp((places - times) / (times * spread), x, np.exp(below))
    within = np.clip((1 - probability) * usual + probability * slow, 0.0, 1.0)
    beyond = 1 - within ** counts[..., None]  # from 1 down to 0: the ends count half
    return np.asarray(low + (beyond.sum(axis=-1) - 0.5) * (places[1] - places[0]), np.float64)
