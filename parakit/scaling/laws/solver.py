"""Solving for a law's coefficients: least squares of logarithms, with none of them below 0.

Owns the fit to points, on each face of the bounds: with all coefficients free, and with each choice of them held at 0.
What fits best within the bounds lies inside of one face, so a coefficient at its bound is exactly 0. Refuses to judge.
The rate of one worker follows from the coefficients, so only those are searched for.

References
----------
Lawson and Hanson, "Solving Least Squares Problems", 1974 (bounds by sets of coefficients held at 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from parakit.scaling.laws.laws import Law
from parakit.scaling.laws.observations import Points

__all__ = ["ENDLESS", "Face", "faces", "free_coefficients", "in_parts", "minimise", "reaches", "squares"]

Floats = npt.NDArray[np.float64]

#: A coefficient that takes away more than this times the work, at the largest count, is taken for infinite.
ENDLESS = 1e6
_MOST_AT_ONCE = 100_000  # numbers, which a processor keeps at hand
_TINY = 1e-9
_LEAST_LOSS = 0.5  # of a fit without bounds: it may well be superlinear, but not without end
_FAR_OFF = 0.05  # so far off on average, the linear solution may lead astray
_NEWTON_STEPS, _SETTLED = 25, 1e-12  # the latter of a coefficient that is of the size of 1
_SAME = 1e-9  # relative, of sums of squares
_SAME_SQUARES = 1e-22  # of each measurement: what rounding leaves


@dataclass(frozen=True, eq=False)
class Face:
    """The best coefficients with some of them held at 0.

    Parameters
    ----------
    kept : tuple of int
        Places of those that are free.
    coefficients : array, (coefficients,)
    sum_of_squares : float
        Of the logarithms, over all measurements.
    """

    kept: tuple[int, ...]
    coefficients: Floats
    sum_of_squares: float


def reaches(law: Law, points: Points) -> Floats:
    """The largest value of each term, by which its coefficient is brought to the size of 1."""
    return np.asarray(np.maximum(law.matrix(points.counts).max(axis=0), _TINY))


def squares(law: Law, points: Points, coefficients: Floats) -> tuple[Floats, Floats]:
    """The sum of squares and the logarithm of lambda for each row of coefficients, (rows,) each."""
    matrix = law.matrix(points.counts).T
    parts = [_squares(points, 1 + part @ matrix) for part in in_parts(coefficients, len(points.counts))]
    off, rates = zip(*parts, strict=True)
    return np.concatenate(off), np.concatenate(rates)


def in_parts(rows: Floats, columns: int) -> list[Floats]:
    """Rows in parts, so that a table of them and so many columns stays small."""
    return np.array_split(rows, math.ceil(len(rows) * columns / _MOST_AT_ONCE) or 1)


def _squares(points: Points, losses: Floats) -> tuple[Floats, Floats]:
    """As `squares`; in the memory of the losses."""
    np.log(np.maximum(losses, _TINY, out=losses), out=losses)
    losses += points.logs
    rates = losses @ points.repeats / points.many
    losses -= rates[:, None]
    return np.square(losses, out=losses) @ points.repeats + points.within, rates


def free_coefficients(law: Law, points: Points) -> Floats:
    """What fits best if coefficients may be below 0, as they are where the speedup is superlinear."""
    return _solve(law, points, tuple(range(len(law.coefficients)))).coefficients


def faces(law: Law, points: Points) -> tuple[Face, ...]:
    """The best of each face that has it within the bounds; the best of all first, the simpler of equals."""
    many = len(law.coefficients)
    choices: Iterable[tuple[int, ...]] = (kept for size in range(many + 1) for kept in combinations(range(many), size))
    solved = [_solve(law, points, kept) for kept in choices]
    within = [face for face in solved if (face.coefficients >= 0).all()]
    least = min(face.sum_of_squares for face in within)
    enough = least * (1 + _SAME) + _SAME_SQUARES * points.many
    best = next(face for face in within if face.sum_of_squares <= enough)
    return (best, *(face for face in within if face is not best))


def _solve(law: Law, points: Points, kept: tuple[int, ...]) -> Face:
    values = np.zeros(len(law.coefficients))
    if kept:
        values[list(kept)] = _search(law, points, list(kept))
    return Face(kept, values, float(squares(law, points, values[None])[0][0]))


def _search(law: Law, points: Points, kept: list[int]) -> Floats:
    matrix, reach = law.matrix(points.counts)[:, kept], reaches(law, points)[kept]
    roots, share = np.sqrt(points.repeats), points.repeats / points.many

    def residuals(p: Floats) -> Floats:
        off = points.logs + np.log(np.maximum(1 + matrix @ p, _TINY))
        return np.asarray(roots * (off - share @ off))

    def jacobian(p: Floats) -> Floats:
        slope = matrix / np.maximum(1 + matrix @ p, _TINY)[:, None]
        return np.asarray(roots[:, None] * (slope - share @ slope))

    lower = -_LEAST_LOSS / len(kept) / reach
    upper = np.minimum(np.asarray(law.bounds)[kept], ENDLESS / reach)
    start, unit = _linear(points, matrix), np.minimum(1 / reach, upper)
    near = _by_gauss_newton(residuals, jacobian, start, unit)
    if near is not None and (near > lower).all() and (near < upper).all():
        off = residuals(near)
        if off @ off <= points.many * _FAR_OFF**2:
            return near
    solved = minimise(residuals, jacobian, [start, 0.05 / reach], lower=lower, upper=upper, scale=unit)
    return solved.parameters


def _by_gauss_newton(
    residuals: Callable[[Floats], Floats], jacobian: Callable[[Floats], Floats], start: Floats, unit: Floats
) -> Floats | None:
    """The solution, if a few whole steps lead there; ten times as fast as a solver that is prepared for all else."""
    values, off = start, residuals(start)
    for _ in range(_NEWTON_STEPS):
        step = np.linalg.lstsq(jacobian(values) * unit, -off, rcond=None)[0]
        values = values + step * unit
        if np.abs(step).max() <= _SETTLED * (1 + np.abs(values / unit).max()):
            return values
        before, off = off, residuals(values)
        if not off @ off < before @ before * (1 + _SAME) + _SAME_SQUARES:
            return None
    return None


def _linear(points: Points, matrix: Floats) -> Floats:
    """Nearly the solution: N / X is linear in the coefficients, so relative residuals of that are minimised."""
    inverse = np.exp(points.logs.mean() - points.logs)
    weights = np.sqrt(points.repeats) / inverse
    design = np.column_stack([np.ones_like(inverse), matrix]) * weights[:, None]
    best = np.linalg.lstsq(design, inverse * weights, rcond=None)[0]
    return np.asarray(best[1:] / max(float(best[0]), _TINY))


# --- least squares within bounds, whatever is fitted


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

    Every parameter is brought to the size of 1 first: unscaled, the same solver finds two correct digits of NIST's
    Hahn1.

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
