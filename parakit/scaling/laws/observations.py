"""Points of a study of scaling: worker counts with the throughputs that were measured there, checked and summed up.

Owns what every fit needs of them: one mean logarithm a count, and how repeats scatter around it. A fit of logarithms
needs no more, so ten thousand repeats cost as much as ten. Refuses to know of laws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError

__all__ = ["MOST_COUNT", "Points", "check_asked", "check_points"]

Floats = npt.NDArray[np.float64]

#: Worker counts beyond this are taken for a mistake.
MOST_COUNT = 1e9
_SHOWN = 60  # characters of what was given
_NO_NUMBERS = (bool, np.bool_, str, bytes, complex, np.complexfloating, type(None))


@dataclass(frozen=True, eq=False)
class Points:
    """Measurements by worker count; made by `of`.

    Parameters
    ----------
    counts : array, (counts,)
        Ascending, each once.
    logs : array, (counts,)
        The mean over repeats of log(rate / count).
    repeats : array, (counts,)
    within : float
        Sum of squares of the repeats around these means.
    """

    counts: Floats
    logs: Floats
    repeats: Floats
    within: float

    @classmethod
    def of(cls, counts: Floats, rates: Floats) -> Points:
        """Sum up measurements, (measurements,) each."""
        different, places = np.unique(counts, return_inverse=True)
        logs = np.log(rates) - np.log(counts)
        repeats = np.bincount(places).astype(np.float64)
        means = np.bincount(places, logs) / repeats
        return cls(different, means, repeats, float(np.sum((logs - means[places]) ** 2)))

    @property
    def many(self) -> int:
        """Measurements."""
        return int(self.repeats.sum())

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the scatter of repeats: measurements less counts."""
        return self.many - len(self.counts)

    def below(self, count: float) -> Points:
        """Those with fewer workers, by their means only: for laws that are to predict the others."""
        kept = self.counts < count
        return Points(self.counts[kept], self.logs[kept], self.repeats[kept], 0.0)


def check_points(workers: Any, rates: Any) -> tuple[Floats, Floats]:
    """Counts and rates as arrays, sorted by counts.

    Raises
    ------
    InputError
        If they cannot be: other than whole numbers of at least 1, rates that are not above 0 and finite, or not as
        many of the one as of the other.
    """
    try:
        counts, measured = (_numbers(values) for values in (workers, rates))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"Worker counts and rates must be numbers, not {_brief(workers)} and {_brief(rates)}.",
            cause="a number that is too large" if isinstance(error, OverflowError) else "",
        ) from error
    if counts.shape != measured.shape or counts.ndim != 1:
        raise InputError(f"There are {counts.size} worker counts and {measured.size} rates; each rate has its count.")
    wrong = counts[~((counts >= 1) & (counts <= MOST_COUNT) & (counts == np.floor(counts)))]
    if wrong.size:
        raise InputError(f"A worker count is {wrong[0]:g}; it must be a whole number from 1 to {MOST_COUNT:g}.")
    wrong = measured[~((measured > 0) & np.isfinite(measured))]
    if wrong.size:
        raise InputError(f"A rate is {wrong[0]:g} samples a second; it must be above 0 and finite.")
    order = np.argsort(counts, kind="stable")
    return counts[order], measured[order]


def check_asked(n: Any) -> Floats:
    """Counts for which something is asked, in their shape; between whole numbers is allowed, as on a curve.

    Raises
    ------
    InputError
        If they are no numbers, or below 1.
    """
    try:
        counts = _numbers(np.ravel(np.asarray(n, object))).reshape(np.shape(n))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"n is {_brief(n)}; it must be a number of workers, or several of them.") from error
    wrong = counts[~((counts >= 1) & (counts <= MOST_COUNT))]
    if wrong.size:
        raise InputError(f"n is {wrong[0]:g}; it must be a number of workers from 1 to {MOST_COUNT:g}.")
    return counts


def _numbers(values: Any) -> Floats:
    given = np.asarray(list(values), object)
    if any(isinstance(value, _NO_NUMBERS) for value in given.flat):
        raise TypeError("no numbers")
    return given.astype(np.float64)


def _brief(value: Any) -> str:
    try:
        text = str(value)
    except ValueError:  # a whole number of so many digits that Python does not write them
        text = f"a {type(value).__name__} too large to write"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
