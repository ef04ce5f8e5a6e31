"""Choosing between laws of scaling: by how well each predicts the largest count from the others.

Owns the comparison, and the honest prediction that follows: the best law's, in a band that reaches around every law
that predicted about as well. Their spread is the uncertainty of the model; far beyond the measurements it prevails.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from parakit.errors import InputError
from parakit.scaling.fitting import SCENARIO_RATIO, Fit, check_points, fit
from parakit.scaling.laws import LAWS

__all__ = ["Comparison", "Prediction", "Predictor", "compare"]

_FEW_COUNTS = 4  # with fewer, what is held out says little
# What published curves of data-parallel training follow best; see Notes of `compare`.
_USUAL = ("log", "ring", "amdahl", "usl", "linear")
_AS_GOOD = 2.0  # times the least error is as good
_SURELY_GOOD = 0.03  # and so is this
_CLEARLY_OFF = 0.05  # so far off, the usual law gives way to one that is at most half as far off
_TIE = 0.002


class Predictor(Protocol):
    """A model that was not fitted here, such as a cost model."""

    @property
    def name(self) -> Any:
        """What it is called."""

    def predict(self, n: Any) -> Any:
        """Throughput at some counts."""


@dataclass(frozen=True)
class Prediction:
    """What a number of workers should bring.

    Attributes
    ----------
    workers : int
    rate, low, high : float
        Samples a second, by the best law, and from the lowest to the highest band of all plausible laws.
    speedup : float
        Relative to the best law's rate of one worker.
    ratio : float
        The number of workers as a multiple of the most that were measured.
    law : str
        The best one.
    """

    workers: int
    rate: float
    low: float
    high: float
    speedup: float
    ratio: float
    law: str
    simulated: bool = False

    @property
    def scenario(self) -> bool:
        """Whether this lies too far beyond what was measured to be called a prediction."""
        return self.ratio > SCENARIO_RATIO

    @property
    def words(self) -> str:
        """In a sentence or two."""
        many = "1 worker" if self.workers == 1 else f"{self.workers:,} workers"
        known = "" if math.isnan(self.low) else f" ({self.low:,.0f} to {self.high:,.0f})"
        far = f"{self.ratio:.3g} times as many as were measured"
        said = f"{self.rate:,.0f} samples/s{known} with {many}, {self.speedup:.3g} times one worker, by {self.law!r}"
        said = f"{'simulated, ' * self.simulated}{said}"
        if self.scenario:
            return f"A scenario, not a prediction: {said}; that is {far}."
        return f"{said}; {far}." if self.ratio > 1 else f"{said}."

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Laws fitted to the same measurements; made by `compare`.

    Attributes
    ----------
    best : str
        Name of the law that is believed most.
    fits : dict of str to Fit or Predictor
    held_out : dict of str to float
        Relative error of predicting the largest count from the others; NaN where too few are left.
    plausible : tuple of str
        Laws that predicted about as well as the best.
    largest : float
        The most workers that were measured.
    """

    best: str
    fits: dict[str, Any]
    held_out: dict[str, float]
    plausible: tuple[str, ...]
    largest: float
    simulated: bool = False

    def predict(self, n: int) -> Prediction:
        """What a number of workers should bring.

        Raises
        ------
        InputError
            If it is no whole number of at least 1.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise InputError(f"n is {n!r}; it must be a whole number of workers, at least 1.")
        chosen = self.fits[self.best]
        rate = float(chosen.predict(int(n)))
        low, high = self.envelope(int(n))
        return Prediction(
            int(n), rate, low, high, rate / float(chosen.predict(1)), float(n / self.largest), self.best,
            self.simulated,
        )  # fmt: skip

    def envelope(self, n: int) -> tuple[float, float]:
        """From the lowest to the highest of the bands of all plausible laws, in samples a second."""
        edges = [float(self.fits[name].predict(n)) for name in self.plausible]
        for name in self.plausible:
            if isinstance(self.fits[name], Fit):
                edges += [edge for edge in self.fits[name].band(n) if not math.isnan(edge)]
        return min(edges), max(edges)

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for name in sorted(self.fits, key=lambda name: (name != self.best, self.held_out.get(name, math.inf))):
            error = self.held_out.get(name, math.nan)
            mark = "best" if name == self.best else "plausible" if name in self.plausible else ""
            rows.append((name, "unknown" if math.isnan(error) else f"{100 * error:.1f} %", mark))
        return rows

    def __repr__(self) -> str:
        lines = [f"  {name:12} {error:>9}  {mark}".rstrip() for name, error, mark in self._rows()]
        what = "Comparison (simulated)" if self.simulated else "Comparison"
        return "\n".join([f"<{what}: error at {self.largest:g} workers, held out>", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        law = "law (simulated)" if self.simulated else "law"
        head = f"<th>{law}</th><th>error at {self.largest:g} workers, held out</th><th></th>"
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def compare(
    workers: Any,
    rates: Any,
    *,
    laws: Sequence[str] = LAWS,
    extra: Sequence[Predictor] = (),
) -> Comparison:
    """Fit several laws, and compare how well they predict what they have not seen.

    Parameters
    ----------
    workers : sequence of int, (measurements,)
    rates : sequence of float, (measurements,)
        Samples a second.
    laws : sequence of str
        Candidates; those that need more counts than there are do not take part.
    extra : sequence of Predictor
        More models, which have `name` and `predict`; of what they were made is not asked, so they are drawn and shown,
        and may be plausible, but are never the best.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the points cannot be, or there is one worker count only.

    Notes
    -----
    Chosen by the error at the largest count, which is left out of the fit; where errors are the same, by the corrected
    information criterion of Akaike. One count that is left out says little, though. Published curves of data-parallel
    training follow a step that grows with log2 N best, so that law is taken unless it is off by more than 5 % and
    another by at most half of that; and always where there are fewer than four counts.
    """
    counts, measured = check_points(workers, rates)
    different = np.unique(counts)
    if len(different) < 2:
        raise InputError(
            f"One worker count only was measured ({different[0] if different.size else 'none'}); nothing follows for "
            "others from it.",
            remedy="measure at least two, better six: pk.sweep(..., workers=[1, 2, 3, 4, 6, 8])",
        )
    fits: dict[str, Any] = {}
    for law in laws:
        try:
            fits[law] = fit(law, counts, measured)
        except InputError:
            if law not in LAWS:
                raise
    held_out = {law: _error(law, counts, measured) for law in fits}
    best = _best(fits, held_out, len(different))
    for model in extra:
        fits[model.name] = model
        held_out[model.name] = _off(model, counts, measured)
    return Comparison(best, fits, held_out, _plausible(held_out, best), float(counts.max()))


def _error(law: str, counts: Any, measured: Any) -> float:
    """Relative error at the largest count, of a fit to the others; NaN if they are too few."""
    seen = counts < counts.max()
    try:
        found = fit(law, counts[seen], measured[seen])
    except InputError:
        return math.nan
    return _off(found, counts[~seen], measured[~seen])


def _off(model: Predictor, counts: Any, measured: Any) -> float:
    """Relative error of a model at the largest count, whose measurements are averaged on logarithms."""
    largest = counts.max()
    truth = math.exp(np.log(measured[counts == largest]).mean())
    return float(abs(model.predict(largest) / truth - 1))


def _best(fits: dict[str, Fit], held_out: dict[str, float], different: int) -> str:
    known = {name: error for name, error in held_out.items() if not math.isnan(error)}
    if different < _FEW_COUNTS or not known:
        return next(name for name in (*_USUAL, *fits) if name in fits)
    least = min(known.values())
    if known.get(_USUAL[0], math.inf) <= max(_CLEARLY_OFF, _AS_GOOD * least):
        return _USUAL[0]
    tied = [name for name, error in known.items() if error <= least + _TIE]
    return min(tied, key=lambda name: _akaike(fits[name]))


def _akaike(found: Fit) -> float:
    """Corrected information criterion; infinite where there are too few measurements for the correction."""
    many, parameters = len(found.counts), len(found.parameters) + 1
    if many - parameters - 1 <= 0:
        return math.inf
    squares = max(found._sum_of_squares / many, 1e-300)
    return many * math.log(squares) + 2 * parameters + 2 * parameters * (parameters + 1) / (many - parameters - 1)


def _plausible(held_out: dict[str, float], best: str) -> tuple[str, ...]:
    known = [error for error in held_out.values() if not math.isnan(error)]
    if math.isnan(held_out[best]):  # so few counts that nobody can tell: all that are not seen to be off
        return tuple(name for name, error in held_out.items() if not error > _SURELY_GOOD)
    worst = max(_AS_GOOD * min(known), _SURELY_GOOD)
    return tuple(name for name, error in held_out.items() if name == best or error <= worst)
