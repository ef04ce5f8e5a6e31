"""Least squares within bounds, with every parameter brought to the size of 1 first.

Owns the solving; refuses to know what is fitted. Unscaled, the same solver finds two correct digits of NIST's Hahn1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Solution", "minimise"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """Parameters, and the sum of squared residuals there."""

    parameters: Floats
    sum_of_squares: float


def minimise(
    residuals: Callable[[Floats], Floats],
    jacobian: Callable[[Floats], Floats],
    starts: Sequence[Floats],
    *,
    lower: Floats | float = -np.inf,
    upper: Floats | float = np.inf,
    scale: Floats | None = None,
) -> Solution:
    """The best of the solutions that some starts lead to.

    Parameters
    ----------
    residuals, jacobian : callable
        Of the parameters; (residuals,) and (residuals, parameters).
    starts : sequence of array, (parameters,)
    lower, upper : array or float
        Of the parameters.
    scale : array, (parameters,), optional
        What is taken for 1. Default: the size of the first start, or 1 where that is 0.
    """
    from scipy.optimize import least_squares

    first = np.asarray(starts[0], np.float64)
    unit = np.where(first == 0, 1.0, np.abs(first)) if scale is None else np.asarray(scale, np.float64)
    low, high = (np.broadcast_to(np.asarray(bound, np.float64), first.shape) / unit for bound in (lower, upper))

    def solve(start: Floats) -> Solution:
        inside = np.clip(np.asarray(start, np.float64) / unit, low, high)
        found = least_squares(
            lambda p: residuals(p * unit), inside, jac=lambda p: jacobian(p * unit) * unit, bounds=(low, high),
            method="trf", x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000,
        )  # fmt: skip
        return Solution(found.x * unit, float(2 * found.cost))

    return min((solve(start) for start in starts), key=lambda solution: solution.sum_of_squares)
