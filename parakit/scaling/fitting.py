"""Fitting a law of scaling to throughputs: parameters with intervals, predictions with bands, and their limits.

Noise is taken to be multiplicative, so logarithms are fitted; all repeats count, and the rate of one worker is a
parameter like the others: nothing is divided by one measured rate. Coefficients stay within their bounds, and what a
fit without bounds would say is told in words. Intervals of parameters are by profile likelihood, bands by a parametric
bootstrap whose noise is as uncertain as few repeats make it.

References
----------
Bates and Watts, "Nonlinear Regression Analysis and Its Applications", 1988 (profiles). Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError
from parakit.scaling.laws import Law, law_named, usl_peak
from parakit.scaling.least_squares import minimise

__all__ = ["SCENARIO_RATIO", "Fit", "check_points", "fit"]

Floats = npt.NDArray[np.float64]

#: Times the largest measured count beyond which a prediction is called a scenario.
SCENARIO_RATIO = 4.0
_DRAWS = 1000
_SEED = 0
_MOST_COUNT = 1e9
_FEW_COUNTS = 6
_LEAST_LOSS = 0.8  # of a draw: a fit without bounds may well be superlinear, but not without end
_TINY = 1e-9


def check_points(workers: Any, rates: Any) -> tuple[Floats, Floats]:
    """Counts and rates as arrays, sorted by counts.

    Raises
    ------
    InputError
        If they cannot be: other than whole numbers of at least 1, rates that are not above 0 and finite, or not as
        many of the one as of the other.
    """
    try:
        given = [np.asarray(list(values), object) for values in (workers, rates)]
        if any(isinstance(value, bool | np.bool_ | str) for values in given for value in values):
            raise TypeError
        counts, measured = (values.astype(np.float64) for values in given)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Worker counts and rates must be numbers, not {str(workers)[:60]} and {str(rates)[:60]}."
        ) from error
    if counts.shape != measured.shape or counts.ndim != 1:
        raise InputError(f"There are {counts.size} worker counts and {measured.size} rates; each rate has its count.")
    wrong = counts[~((counts >= 1) & (counts <= _MOST_COUNT) & (counts == np.floor(counts)))]
    if wrong.size:
        raise InputError(f"A worker count is {wrong[0]:g}; it must be a whole number from 1 to {_MOST_COUNT:g}.")
    wrong = measured[~((measured > 0) & np.isfinite(measured))]
    if wrong.size:
        raise InputError(f"A rate is {wrong[0]:g} samples a second; it must be above 0 and finite.")
    order = np.argsort(counts, kind="stable")
    return counts[order], measured[order]


def fit(law: str | Law, workers: Any, rates: Any, *, confidence: float = 0.95) -> Fit:
    """Fit a law to throughputs.

    Parameters
    ----------
    law : str
        "linear", "amdahl", "usl", "log" or "ring"; see `parakit.scaling.laws`.
    workers : sequence of int, (measurements,)
        With repeats, in any order.
    rates : sequence of float, (measurements,)
        Samples a second.
    confidence : float
        Of intervals and bands.

    Returns
    -------
    Fit

    Raises
    ------
    InputError
        If the points cannot be, or are too few for this law.
    """
    chosen = law if isinstance(law, Law) else law_named(law)
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence!r}; it must be between 0 and 1, such as 0.95.")
    counts, measured = check_points(workers, rates)
    _check_enough(chosen, counts)
    return Fit(chosen, counts, measured, confidence)


def _check_enough(law: Law, counts: Floats) -> None:
    different = len(np.unique(counts))
    if different < law.least_counts:
        raise InputError(
            f"The law {law.name!r} needs at least {law.least_counts} different worker counts; there are {different}.",
            cause="a law with more parameters than counts fits anything, and predicts nothing",
            remedy="measure more counts" + (", or fit 'amdahl'" if different > 1 and law.name == "usl" else ""),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A law fitted to throughputs; made by `fit`.

    Parameters
    ----------
    law : Law
    counts, rates : array, (measurements,)
    confidence : float
    """

    law: Law
    counts: Floats = field(repr=False)
    rates: Floats = field(repr=False)
    confidence: float = 0.95
    simulated: bool = False

    # --- the fit

    @cached_property
    def _solution(self) -> Floats:
        return _solve(self.law, self.counts, self.rates, bounded=True)[0]

    @cached_property
    def _free(self) -> Floats:
        """The coefficients of a fit without bounds."""
        return _solve(self.law, self.counts, self.rates, bounded=False)[0]

    @cached_property
    def _sum_of_squares(self) -> float:
        return _sum_of_squares(self.law, self.counts, self.rates, self._solution)

    @property
    def name(self) -> str:
        """Of the law."""
        return self.law.name

    @property
    def parameters(self) -> dict[str, float]:
        """The rate of one worker, "lambda", and the law's coefficients."""
        rate = math.exp(_log_rate(self.law, self.counts, self.rates, self._solution))
        return {"lambda": rate, **dict(zip(self.law.coefficients, self._solution.tolist(), strict=True))}

    @property
    def degrees_of_freedom(self) -> int:
        """Measurements less parameters."""
        return len(self.counts) - 1 - len(self.law.coefficients)

    @property
    def residual_sd(self) -> float:
        """Standard deviation of a measurement from the law, relative; NaN without degrees of freedom."""
        return math.sqrt(self._sum_of_squares / self.degrees_of_freedom) if self.degrees_of_freedom > 0 else math.nan

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """By profile likelihood: where the sum of squares stays below RSS (1 + F(1, df) / df).

        Empty without degrees of freedom.
        """
        if self.degrees_of_freedom < 1:
            return {}
        return {name: _profile(self, place) for place, name in enumerate(self.parameters)}

    # --- what follows

    def predict(self, n: Any) -> Any:
        """Throughput at some counts, in samples a second."""
        rate, *values = self.parameters.values()
        return self.law.throughput(n, rate, values)

    def speedup(self, n: Any) -> Any:
        """Throughput relative to the fitted one of one worker."""
        return self.predict(n) / self.parameters["lambda"]

    def ratio(self, n: float) -> float:
        """How far beyond the measured range a count is, as a multiple of its end."""
        return float(n / self.counts.max())

    def band(self, n: Any, kind: str = "mean") -> tuple[Any, Any]:
        """Where the throughput lies at some counts, with the fit's confidence.

        Parameters
        ----------
        n : int or array
        kind : {"mean", "next run"}
            Of the law itself, or of one more measurement.

        Returns
        -------
        low, high : float or array
            NaN without degrees of freedom.
        """
        if kind not in ("mean", "next run"):
            raise InputError(f"kind is {kind!r}; it must be 'mean' or 'next run'.")
        counts = np.atleast_1d(np.asarray(n, np.float64))
        if self.degrees_of_freedom < 1:
            empty = np.full(counts.shape, np.nan)
            return (empty[()], empty[()]) if np.ndim(n) else (math.nan, math.nan)
        logs = self._drawn(counts)
        if kind == "next run":
            logs = logs + self._noise(np.random.default_rng(_SEED + 1), counts.shape)
        tail = 50 * (1 - self.confidence)
        halves = np.exp(np.percentile(logs.reshape(2, -1, len(counts)), [tail, 100 - tail], axis=1))
        low, high = halves[0].min(axis=0), halves[1].max(axis=0)
        here = np.atleast_1d(self.predict(counts))
        low, high = np.minimum(low, here), np.maximum(high, here)
        return (low, high) if np.ndim(n) else (float(low[0]), float(high[0]))

    def _noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Noise of every draw, of a size that is itself drawn: what few residuals tell of it is uncertain."""
        freedom = self.degrees_of_freedom
        size = self.residual_sd * np.sqrt(freedom / generator.chisquare(freedom, (_DRAWS, *(1 for _ in shape))))
        drawn: Floats = size * generator.standard_normal((_DRAWS, *shape))
        return drawn

    def _drawn(self, counts: Floats) -> Floats:
        """Logarithms of the throughput by every draw, (draws, counts)."""
        parameters = self._draws
        losses = 1 + parameters[:, 1:] @ self.law.matrix(counts).T
        logs: Floats = parameters[:, :1] + np.log(counts) - np.log(np.maximum(losses, _LEAST_LOSS))
        return logs

    @cached_property
    def _draws(self) -> Floats:
        """Parameters of refits to drawn measurements: the logarithm of lambda, and the coefficients.

        Half of them are drawn around the fit and fitted within the bounds, half around the one without bounds and
        fitted without, and a band reaches around both: at a bound, the first alone would be too sure of it. Much more
        than N times the rate of one worker is predicted by neither.
        """
        generator = np.random.default_rng(_SEED)
        noise = self._noise(generator, self.counts.shape)
        half = _DRAWS // 2
        drawn = []
        for values, part, bounded in ((self._solution, noise[:half], True), (self._free, noise[half:], False)):
            rate = _log_rate(self.law, self.counts, self.rates, values)
            logs = rate + np.log(self.counts) - np.log(self.law.loss(self.counts, values)) + part
            drawn.append(_refit(self.law, self.counts, logs, bounded=bounded))
        return np.concatenate(drawn)

    @property
    def peak(self) -> float:
        """The count with the highest throughput; infinite where the law has none."""
        return usl_peak(*self._solution) if self.law.name == "usl" else math.inf

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What should be known before this fit is believed."""
        return tuple(_remarks(self))

    @property
    def words(self) -> str:
        """The parameters, in a sentence."""
        rate, *values = self.parameters.values()
        lost = {
            "linear": "nothing is lost", "amdahl": f"{_percent(values)} of the work is serial",
            "usl": f"{_percent(values)} of the work is serial, and each pair of workers costs "
            f"{(values[-1] if values else 0):.2g} of it", "log": f"each doubling costs {_percent(values)} of a step",
            "ring": f"an exchange costs {_percent(values)} of a step",
        }[self.law.name]  # fmt: skip
        return f"{'Simulated: ' * self.simulated}{rate:,.0f} samples/s with one worker; {lost}."

    def __repr__(self) -> str:
        values = ", ".join(f"{name} = {value:.4g}{self._interval(name)}" for name, value in self.parameters.items())
        return "\n".join([f"<Fit of {self.law.name!r}: {values}>", self.words, *self.remarks])

    def _interval(self, name: str) -> str:
        low, high = self.intervals.get(name, (math.nan, math.nan))
        return "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{value:.4g}</td><td>{interval}</td></tr>"
            for name, value in self.parameters.items()
            for interval in [self._interval(name)[2:-1] or "unknown"]
        )
        said = "".join(f"<li>{html.escape(text)}</li>" for text in (self.words, *self.remarks))
        percent = f"{100 * self.confidence:g} %"
        return (
            f"<p>Law of scaling: {html.escape(self.law.name)}, {html.escape(self.law.words)}</p><table><thead><tr>"
            f"<th>parameter</th><th>value</th><th>{percent} interval</th></tr></thead><tbody>{rows}</tbody></table>"
            f"<ul>{said}</ul>"
        )


def _percent(values: list[float]) -> str:
    percent = 100 * (values[0] if values else 0.0)
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _remarks(found: Fit) -> list[str]:
    different = len(np.unique(found.counts))
    said = []
    if different < _FEW_COUNTS:
        said.append(f"Only {different} different worker counts were measured, up to {found.counts.max():g}.")
    if found.degrees_of_freedom < 1:
        said.append("There are no more measurements than parameters, so nothing is known of the uncertainty.")
    for name, value in zip(found.law.coefficients, found._free, strict=True):
        if value < -_TINY:
            superlinear = ": the speedup is superlinear" if name == found.law.coefficients[0] else ""
            said.append(f"Without bounds, {name} would be {value:.2g}, below 0{superlinear}.")
    if found.law.name == "usl" and math.isinf(found.peak):
        said.append("No peak within the evidence: kappa is 0.")
    return said


# --- solving: the rate of one worker follows from the coefficients, so only those are searched for


def _log_rate(law: Law, counts: Floats, rates: Floats, values: Floats) -> float:
    return float(np.mean(np.log(rates / counts) + np.log(np.maximum(law.loss(counts, values), _TINY))))


def _sum_of_squares(law: Law, counts: Floats, rates: Floats, values: Floats) -> float:
    logs = np.log(rates / counts) + np.log(np.maximum(law.loss(counts, values), _TINY))
    return float(np.sum((logs - logs.mean()) ** 2))


def _solve(
    law: Law, counts: Floats, rates: Floats, *, bounded: bool, fixed: tuple[int, float] | None = None
) -> tuple[Floats, float]:
    """Coefficients, and the sum of squares there; one of them may be fixed, or else the logarithm of lambda (-1)."""
    many = len(law.coefficients)
    searched = [place for place in range(many) if fixed is None or place != fixed[0]]
    values = np.zeros(many)
    if fixed is not None and fixed[0] >= 0:
        values[fixed[0]] = fixed[1]
    logs, matrix = np.log(rates / counts), law.matrix(counts)
    if not searched:
        return values, _free_rate_squares(logs, matrix, values, fixed)
    reach = np.array([max(_TINY, float(matrix[:, place].max())) for place in searched])
    lower = np.zeros(len(searched)) if bounded else -0.5 / len(searched) / reach
    upper = np.array([law.bounds[place] if bounded else np.inf for place in searched])

    def losses(p: Floats) -> Floats:
        values[searched] = p
        return np.maximum(1 + matrix @ values, _TINY)

    def residuals(p: Floats) -> Floats:
        off = logs + np.log(losses(p))
        return np.asarray(off - (fixed[1] if fixed is not None and fixed[0] < 0 else off.mean()))

    def jacobian(p: Floats) -> Floats:
        slope = matrix[:, searched] / losses(p)[:, None]
        return np.asarray(slope if fixed is not None and fixed[0] < 0 else slope - slope.mean(axis=0))

    starts = [np.minimum(upper, start / reach) for start in (1.0, 0.05, 10.0)]
    found = minimise(residuals, jacobian, starts, lower=lower, upper=upper)
    values[searched] = found.parameters
    return (
        _settled_at_bounds(residuals, values, searched, found.sum_of_squares)
        if bounded
        else (values, found.sum_of_squares)
    )


def _settled_at_bounds(
    residuals: Callable[[Floats], Floats], values: Floats, searched: list[int], squares: float
) -> tuple[Floats, float]:
    """A solver that works inside of the bounds comes close to 0: what fits as well at 0 is 0."""
    settled = values[searched]
    for place in range(len(searched)):
        tried = settled.copy()
        tried[place] = 0.0
        if float(np.sum(residuals(tried) ** 2)) <= squares * (1 + 1e-4):
            settled = tried
    values[searched] = settled
    return values, min(squares, float(np.sum(residuals(settled) ** 2)))


def _free_rate_squares(logs: Floats, matrix: Floats, values: Floats, fixed: tuple[int, float] | None) -> float:
    off = logs + np.log(np.maximum(1 + matrix @ values, _TINY))
    return float(np.sum((off - (fixed[1] if fixed is not None and fixed[0] < 0 else off.mean())) ** 2))


def _profile(found: Fit, place: int) -> tuple[float, float]:
    """The interval of lambda (place 0), or of a coefficient."""
    from scipy.optimize import brentq
    from scipy.stats import f

    freedom = found.degrees_of_freedom
    allowed = found._sum_of_squares * (1 + f.ppf(found.confidence, 1, freedom) / freedom) + _TINY**2
    values = list(found.parameters.values())
    best = math.log(values[0]) if place == 0 else values[place]

    def excess(value: float) -> float:
        squares = _solve(found.law, found.counts, found.rates, bounded=True, fixed=(place - 1, value))[1]
        return float(squares - allowed)

    def edge(direction: int, limit: float) -> float:
        step = direction * max(abs(best) * 0.05, 0.01 if place == 0 else 1e-6)
        inner, outer = best, best + step
        while abs(outer) < 1e6 and direction * (limit - outer) > 0 and excess(outer) < 0:
            inner, outer, step = outer, outer + 2 * step, 2 * step
        if direction * (limit - outer) <= 0:
            outer = limit
            if not math.isfinite(outer) or excess(outer) < 0:
                return outer
        return float(brentq(excess, inner, outer, xtol=1e-12, rtol=1e-9))

    least, most = (-math.inf, math.inf) if place == 0 else (0.0, found.law.bounds[place - 1])
    low, high = (best if best <= least else edge(-1, least)), edge(1, most)
    return (math.exp(low), math.exp(high)) if place == 0 else (low, high)


def _refit(law: Law, counts: Floats, logs: Floats, *, bounded: bool) -> Floats:
    """The logarithm of lambda and the coefficients that fit each row of logarithms of throughputs.

    N / X is linear in the coefficients, so weighted linear least squares with coefficients of at least 0 are solved for
    all rows at once; weighted by the fit of the round before, their relative residuals are those of the logarithms.
    """
    inverse = counts / np.exp(logs)
    design = np.column_stack([np.ones_like(counts), law.matrix(counts)])
    weights = 1 / inverse
    best = np.zeros((len(logs), design.shape[1]))
    for _ in range(3):
        best = _linear(design, inverse, weights, bounded=bounded)
        weights = 1 / np.maximum(best @ design.T, _TINY)
    coefficients = best[:, 1:] / best[:, :1]
    limits = np.asarray(law.bounds)
    return np.column_stack([-np.log(np.maximum(best[:, 0], _TINY)), np.minimum(coefficients, limits)])


def _linear(design: Floats, wanted: Floats, weights: Floats, *, bounded: bool) -> Floats:
    """Weighted least squares, row by row, in which all but the first coefficient are at least 0, if bounded.

    There are few, so every choice of those that are 0 is solved, and the best that fits is taken.
    """
    rows, size = wanted.shape[0], design.shape[1]
    best, least = np.zeros((rows, size)), np.full(rows, np.inf)
    for mask in range(1 << (size - 1)):
        kept = [0] + [place for place in range(1, size) if mask >> (place - 1) & 1]
        weighted = weights[:, :, None] * design[None, :, kept]
        target = (weights * wanted)[:, :, None]
        normal = weighted.transpose(0, 2, 1) @ weighted
        ridge = 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(len(kept))
        solved = np.linalg.solve(normal + ridge, weighted.transpose(0, 2, 1) @ target)[:, :, 0]
        off = ((weighted @ solved[:, :, None] - target)[:, :, 0] ** 2).sum(axis=1)
        better = (off < least) & (((solved[:, 0] > 0) & (solved[:, 1:] >= 0).all(axis=1)) | (not bounded))
        filled = np.zeros((rows, size))
        filled[:, kept] = solved
        best[better], least[better] = filled[better], off[better]
    return best
