"""Waiting for the slowest: how long the last of N workers takes, when each takes a little longer or shorter.

Pure: expectations of the largest of N independent draws. A synchronous step ends with its last worker, so its time is
such an expectation, and it grows with N although nobody became slower.

References
----------
Dean, Barroso: "The tail at scale", Commun. ACM 56 (2013) 74. Chen, Pan, Monga, Bengio, Jozefowicz: "Revisiting
distributed synchronous SGD", arXiv:1604.00981 (2016), for backup workers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.costs.collectives import Counts, like_given, worker_counts
from parakit.errors import InputError

__all__ = [
    "backup_workers_exponential", "backup_workers_normal", "harmonic", "maximum_bound", "maximum_exponential",
    "maximum_normal", "maximum_with_stragglers", "straggler_probability",
]  # fmt: skip

Floats = npt.NDArray[np.float64]

# The trapezoidal rule converges faster than any power of the step for what is smooth and dies away at both ends.
_REACH, _PER_UNIT = 10.0, 64
_EXACT_HARMONICS = 32


@lru_cache(maxsize=1)
def _normal_grid() -> tuple[Floats, Floats, Floats, Floats]:
    """Places, density times step, and the logarithms of the distribution below and above each place."""
    x = np.arange(-_REACH * _PER_UNIT, _REACH * _PER_UNIT + 1) / _PER_UNIT
    weights = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) / _PER_UNIT
    below = np.log([0.5 * math.erfc(-place / math.sqrt(2)) for place in x])
    return x, weights, below, below[::-1]


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
    return like_given(n, np.vectorize(lambda count: _order_normal(count, count), otypes=[float])(counts))


@lru_cache(maxsize=4096)
def _order_normal(rank: float, count: float) -> float:
    """Expected number of a rank, from 1 (smallest) up, among standard normal ones."""
    x, weights, below, above = _normal_grid()
    ways = math.lgamma(count + 1) - math.lgamma(rank) - math.lgamma(count - rank + 1)
    return float((x * weights * np.exp(ways + (rank - 1) * below + (count - rank) * above)).sum())


def harmonic(n: Counts) -> Any:
    """1 + 1/2 + ... + 1/N; 0 for 0."""
    counts = np.asarray(n, np.float64)
    table = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, _EXACT_HARMONICS))])
    small = table[np.clip(counts, 0, _EXACT_HARMONICS - 1).astype(np.int64)]
    large = np.maximum(counts, 1.0)
    series = np.log(large) + np.euler_gamma + 1 / (2 * large) - 1 / (12 * large**2) + 1 / (120 * large**4)
    return like_given(n, np.where(counts < _EXACT_HARMONICS, small, series))


def maximum_exponential(n: Counts, *, least_seconds: float = 0.0, mean_seconds: float = 1.0) -> Any:
    """Expected largest of N times that are a fixed part plus an exponential one: t0 + H_N times the mean of that."""
    worker_counts(n)
    return like_given(n, least_seconds + np.asarray(harmonic(n)) * mean_seconds)


def maximum_bound(n: Counts) -> Any:
    """The most, in standard deviations, that the expected largest of N can lie above the mean, whatever the law.

    (N - 1) / sqrt(2 N - 1), for any law of finite variance (Gumbel 1954; Hartley, David 1954).
    """
    counts = worker_counts(n)
    return like_given(n, (counts - 1) / np.sqrt(2 * counts - 1))


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
    x, _, below, _ = _normal_grid()
    high = times * (1 + _REACH * spread)
    low = min(1 - _REACH * spread, times * (1 - _REACH * spread))
    places = np.linspace(low, high, 4001)
    usual = np.interp((places - 1) / spread, x, np.exp(below))
    slow = np.interp((places - times) / (times * spread), x, np.exp(below))
    within = np.clip((1 - probability) * usual + probability * slow, 0.0, 1.0)
    beyond = 1 - within ** counts[..., None]  # from 1 down to 0: the ends count half
    return np.asarray(low + (beyond.sum(axis=-1) - 0.5) * (places[1] - places[0]), np.float64)


def backup_workers_exponential(
    n: Counts, backups: int, *, least_seconds: float = 0.0, mean_seconds: float = 1.0
) -> Any:
    """Expected time until the first N of N + b workers are done: t0 + (H_(N + b) - H_b) times the mean.

    Parameters
    ----------
    n : int or array
        Workers whose gradients are waited for.
    backups : int
        Workers beyond these, whose late gradients are thrown away (Chen, Pan et al. 2016).
    least_seconds, mean_seconds : float
        Of a worker: a fixed part, and the mean of the exponential part.
    """
    counts = worker_counts(n)
    last = np.asarray(harmonic(counts + backups)) - float(harmonic(backups))
    return like_given(n, least_seconds + last * mean_seconds)


def backup_workers_normal(n: Counts, backups: int) -> Any:
    """Expected N-th of N + b standard normal numbers, in standard deviations above the mean."""
    counts = worker_counts(n)
    nth = np.vectorize(lambda count: _order_normal(count, count + backups), otypes=[float])
    return like_given(n, nth(counts))
