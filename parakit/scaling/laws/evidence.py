"""Evidence for and against laws of scaling: what each foretells of larger counts, and how well it fits all of them.

Owns the errors and the criterion; refuses to weigh them against each other.

References
----------
Hurvich and Tsai, Biometrika 76 (1989) 297 (the corrected criterion). Dawid, J. R. Stat. Soc. A 147 (1984) 278
(prediction of each observation from those before it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.scaling.laws.fit import Fit
from parakit.scaling.laws.laws import Law
from parakit.scaling.laws.observations import Points
from parakit.scaling.laws.profile_likelihood import Region
from parakit.scaling.laws.solver import faces, squares

__all__ = ["akaike", "error_of", "held_out_counts", "is_explained", "predicted"]

Floats = npt.NDArray[np.float64]

_SEEN = 3  # counts that the first prediction rests on, where there are more
_ROUNDING = 1e-9  # relative: what is closer to a law than this is on it
_CONFIDENCE = 0.95


def held_out_counts(points: Points) -> Floats:
    """Counts that are predicted from those below: all from the fourth on, or else the largest."""
    return points.counts[min(_SEEN, len(points.counts) - 1) :]


def predicted(law: Law, points: Points, count: float) -> float:
    """The throughput at a count by a fit to those below it; NaN if these are fewer than the parameters."""
    below = points.below(count)
    if len(below.counts) < 1 + len(law.coefficients):
        return math.nan
    values = faces(law, below)[0].coefficients
    return float(law.throughput(count, math.exp(squares(law, below, values[None])[1][0]), values))


def error_of(predicted: Callable[[float], Any], points: Points) -> float:
    """The root of the mean square of the relative errors at the held-out counts, whose repeats are averaged."""
    asked = held_out_counts(points)
    truth = (np.exp(points.logs) * points.counts)[-len(asked) :]
    off = np.array([float(predicted(float(count))) for count in asked]) / truth - 1
    return float(np.sqrt(np.mean(off**2)))


def is_explained(law: Law, points: Points) -> bool:
    """Whether the scatter of repeats alone explains how far a law is off at the held-out counts.

    That scatter is in the counts below, from which the law follows, and in the count itself.
    """
    from scipy.stats import f

    if points.freedom < 1:
        return False
    excess = points.within / points.freedom * float(f.ppf(_CONFIDENCE, 1, points.freedom))
    for count in held_out_counts(points):
        below, place = points.below(count), int(np.searchsorted(points.counts, count))
        if len(below.counts) < 1 + len(law.coefficients):
            return False
        region = Region(law, below, faces(law, below), excess)
        low, high = region.edges(np.array([count]), new=1 / points.repeats[place])
        if not low[0] <= points.logs[place] + math.log(count) <= high[0]:
            return False
    return True


def akaike(found: Fit) -> float:
    """The corrected information criterion; infinite where there are too few measurements for the correction."""
    many, parameters = len(found.counts), len(found.parameters) + 1
    if many - parameters - 1 <= 0:
        return math.inf
    variance = max(found.sum_of_squares / many, _ROUNDING**2)
    return many * math.log(variance) + 2 * parameters + 2 * parameters * (parameters + 1) / (many - parameters - 1)
