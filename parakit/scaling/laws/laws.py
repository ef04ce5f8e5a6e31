"""Laws of scaling: formulas that say how throughput grows with workers. Pure numbers; refuses to fit anything.

Symbols: N workers, X(N) samples a second, S speedup. Every law here is X(N) = lambda N / D(N), in which lambda is the
rate of one worker and D, at least 1, is what is lost. Each D is 1 plus a sum of terms that are linear in their
coefficients, which makes the laws easy to compare, and to fit.

References
----------
Amdahl, AFIPS SJCC 30 (1967) 483. Karp and Flatt, CACM 33 (1990) 539. Gunther, "Guerrilla Capacity Planning", 2007 (the
universal scalability law, USL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError

__all__ = ["LAWS", "Law", "efficiency", "find_law", "karp_flatt", "speedup", "usl", "usl_peak"]

Floats = npt.NDArray[np.float64]


def speedup(rate: Any, rate_of_one: Any) -> Any:
    """S = X(N) / X(1), with the same work a second counted on both sides."""
    return np.asarray(rate, np.float64)[()] / np.asarray(rate_of_one, np.float64)[()]


def efficiency(rate: Any, rate_of_one: Any, n: Any) -> Any:
    """E = X(N) / (N X(1)): the speedup per worker, for strong and for weak scaling alike."""
    return speedup(rate, rate_of_one) / np.asarray(n, np.float64)[()]


def karp_flatt(s: Any, n: Any) -> Any:
    """The experimentally determined serial fraction, (1/S - 1/N) / (1 - 1/N), for N > 1.

    Rising with N it tells of overhead, level of a serial part; below 0 of a superlinear speedup.
    """
    s, n = np.asarray(s, np.float64), np.asarray(n, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(n > 1, (1 / s - 1 / n) / (1 - 1 / n), np.nan)[()]


def usl(n: Any, sigma: float, kappa: float, rate_of_one: float = 1.0) -> Any:
    """Throughput by the USL: lambda N / (1 + sigma (N - 1) + kappa N (N - 1))."""
    n = np.asarray(n, np.float64)
    return (rate_of_one * n / (1 + sigma * (n - 1) + kappa * n * (n - 1)))[()]


def usl_peak(sigma: float, kappa: float) -> float:
    """The number of workers with the highest throughput, sqrt((1 - sigma) / kappa); infinite where kappa is 0."""
    return math.sqrt((1 - sigma) / kappa) if kappa > 0 and sigma < 1 else math.inf if kappa <= 0 else 1.0


@dataclass(frozen=True)
class Law:
    """X(N) = lambda N / (1 + sum of coefficient times term(N)).

    Parameters
    ----------
    name, words : str
    coefficients : tuple of str
        Names of the coefficients, none below 0.
    terms : tuple of callable
        One a coefficient; 0 at N = 1.
    bounds : tuple of float
        The largest that each coefficient can be.
    least_counts : int
        Different worker counts that a fit needs.
    """

    name: str
    words: str
    coefficients: tuple[str, ...]
    terms: tuple[Callable[[Floats], Floats], ...]
    bounds: tuple[float, ...]
    least_counts: int

    def loss(self, n: Any, values: Any) -> Floats:
        """D(N): 1 plus all terms."""
        counts = np.asarray(n, np.float64)
        total = np.ones_like(counts)
        for value, term in zip(values, self.terms, strict=True):
            total = total + value * term(counts)
        return total

    def matrix(self, n: Any) -> Floats:
        """The terms at some counts; float64, (counts, coefficients)."""
        counts = np.asarray(n, np.float64)
        return np.stack([term(counts) for term in self.terms], axis=-1) if self.terms else np.zeros((counts.size, 0))

    def throughput(self, n: Any, rate_of_one: float, values: Any) -> Any:
        """X(N)."""
        return (rate_of_one * np.asarray(n, np.float64) / self.loss(n, values))[()]


def _beyond_one(n: Floats) -> Floats:
    return n - 1


def _pairs(n: Floats) -> Floats:
    return n * (n - 1)


_LINEAR = Law("linear", "nothing is lost", (), (), (), 1)
_AMDAHL = Law("amdahl", "a part of the work is serial", ("sigma",), (_beyond_one,), (1.0,), 2)
_USL = Law("usl", "a serial part, and a cost between every pair", ("sigma", "kappa"), (_beyond_one, _pairs),
           (1.0, math.inf), 4)  # fmt: skip
_LOG = Law("log", "the time for a share grows with the logarithm of N: c + d log2 N, as in a tree", ("d over c",),
           (np.log2,), (math.inf,), 2)  # fmt: skip
_RING = Law("ring", "the time for a share grows as a ring's bandwidth: c + 2 d (N - 1) / N", ("d over c",),
            (lambda n: 2 * (n - 1) / n,), (math.inf,), 2)  # fmt: skip
_LAWS = {law.name: law for law in (_LINEAR, _AMDAHL, _USL, _LOG, _RING)}
#: Names of the laws.
LAWS = tuple(_LAWS)


def find_law(name: Any) -> Law:
    """A law by its name.

    Raises
    ------
    InputError
        If there is no such law.
    """
    if not isinstance(name, str) or name.lower() not in _LAWS:
        raise InputError(f"There is no law {name!r}.", remedy=f"choose one of {', '.join(map(repr, LAWS))}")
    return _LAWS[name.lower()]
