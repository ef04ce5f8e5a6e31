"""Fitting a law of scaling to throughputs: parameters with intervals, predictions with bands, and their limits.

Noise is taken to be multiplicative, so logarithms are fitted; all repeats count, and the rate of one worker is a
parameter like the others: nothing is divided by one measured rate. Coefficients stay within their bounds, and what a
fit without bounds would say is told in words. Intervals and bands are by profile likelihood; see
`parakit.scaling.laws.profile_likelihood`.

References
----------
Bates and Watts, "Nonlinear Regression Analysis and Its Applications", 1988 (profiles; lack of fit in chapter 1).
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError
from parakit.formatting import html_grid
from parakit.scaling.laws.laws import LAWS, Law, find_law, usl_peak
from parakit.scaling.laws.observations import Points, check_asked, check_points
from parakit.scaling.laws.profile_likelihood import Region
from parakit.scaling.laws.solver import Face, faces, free_coefficients, squares

__all__ = ["SCENARIO_RATIO", "Fit", "check_points", "fit", "rate_in_words"]

Floats = npt.NDArray[np.float64]

#: Times the largest measured count beyond which a prediction is called a scenario.
SCENARIO_RATIO = 4.0
_FEW_COUNTS = 6
_TINY = 1e-9
_SURE = 0.99  # that a law misses its points by more than repeats scatter


def fit(law: str | Law, workers: Any, rates: Any, *, confidence: float = 0.95) -> Fit:
    """Fit a law to throughputs.

    Parameters
    ----------
    law : str or Law
        "linear", "amdahl", "usl", "log" or "ring"; see `parakit.scaling.laws.laws`.
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
    chosen = law if isinstance(law, Law) else find_law(law)
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
    def points(self) -> Points:
        """The measurements, summed up by count."""
        return Points.of(self.counts, self.rates)

    @cached_property
    def faces(self) -> tuple[Face, ...]:
        """The fit, and what fits best with some coefficients held at 0."""
        return faces(self.law, self.points)

    @cached_property
    def parameters(self) -> dict[str, float]:
        """The rate of one worker, "lambda", and the law's coefficients."""
        values = self.faces[0].coefficients
        rate = math.exp(squares(self.law, self.points, values[None])[1][0])
        return {"lambda": rate, **dict(zip(self.law.coefficients, values.tolist(), strict=True))}

    @property
    def name(self) -> str:
        """Of the law."""
        return self.law.name

    @property
    def sum_of_squares(self) -> float:
        """Of the logarithms of all measurements."""
        return self.faces[0].sum_of_squares

    @property
    def degrees_of_freedom(self) -> int:
        """Measurements less parameters."""
        return len(self.counts) - len(self.parameters)

    @property
    def residual_sd(self) -> float:
        """Standard deviation of a measurement from the law, relative; NaN without degrees of freedom."""
        return math.sqrt(self.sum_of_squares / self.degrees_of_freedom) if self.degrees_of_freedom > 0 else math.nan

    @cached_property
    def noise_sd(self) -> float:
        """The residual standard deviation that intervals and bands rest on.

        Where the law misses its points by more than repeats scatter, it is what would explain that miss.
        """
        return max(self.residual_sd, self._missed)

    @cached_property
    def _missed(self) -> float:
        """How far a count's mean is off the law, as if of one measurement; 0 where the scatter explains it."""
        from scipy.stats import f

        points, freedom = self.points, len(self.points.counts) - len(self.parameters)
        if freedom < 1 or points.freedom < 1:
            return 0.0
        off, scatter = (self.sum_of_squares - points.within) / freedom, points.within / points.freedom
        return math.sqrt(off) if off > max(scatter, _TINY**2) * f.ppf(_SURE, freedom, points.freedom) else 0.0

    @cached_property
    def _region(self) -> Region:
        from scipy.stats import f

        excess = self.noise_sd**2 * f.ppf(self.confidence, 1, self.degrees_of_freedom)
        return Region(self.law, self.points, self.faces, excess)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """By profile likelihood: where the sum of squares exceeds the least by less than noise_sd^2 F(1, df).

        Empty without degrees of freedom; an end is infinite where the measurements do not limit the parameter.
        """
        if self.degrees_of_freedom < 1:
            return {}
        low, high = (float(np.exp(edge[0])) for edge in self._region.edges(np.ones(1)))
        return {"lambda": (low, high), **dict(zip(self.law.coefficients, self._region.limits, strict=True))}

    # --- what follows

    def predict(self, n: Any) -> Any:
        """Throughput at some counts, in samples a second.

        Raises
        ------
        InputError
            If they are no numbers of at least 1.
        """
        counts = check_asked(n)
        rate, *values = self.parameters.values()
        return self.law.throughput(counts, rate, values)

    def speedup(self, n: Any) -> Any:
        """Throughput relative to the fitted one of one worker."""
        return self.predict(n) / self.parameters["lambda"]

    def ratio(self, n: float) -> float:
        """How far beyond the measured range a count is, as a multiple of its end."""
        return float(check_asked(n) / self.counts.max())

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

        Raises
        ------
        InputError
            If the counts are no numbers of at least 1.
        """
        if kind not in ("mean", "next run"):
            raise InputError(f"kind is {kind!r}; it must be 'mean' or 'next run'.")
        counts = check_asked(n)
        if self.degrees_of_freedom < 1:
            edges = np.full(counts.shape, np.nan), np.full(counts.shape, np.nan)
        else:
            found = self._region.edges(counts.ravel(), new=float(kind == "next run"))
            edges = np.exp(found[0]).reshape(counts.shape), np.exp(found[1]).reshape(counts.shape)
        return (edges[0], edges[1]) if np.ndim(n) else (float(edges[0]), float(edges[1]))

    @property
    def peak(self) -> float:
        """The count with the highest throughput; infinite where the law has none."""
        return usl_peak(*list(self.parameters.values())[1:]) if self.law == find_law("usl") else math.inf

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What should be known before this fit is believed."""
        return tuple(_remarks(self))

    @property
    def words(self) -> str:
        """The parameters, in a sentence."""
        rate, *values = self.parameters.values()
        said = "Simulated: " if self.simulated else ""
        return f"{said}{rate_in_words(rate)} samples/s with one worker; {_lost(self.law, values)}."

    def __repr__(self) -> str:
        values = ", ".join(f"{name} = {value:.4g}{self._interval(name)}" for name, value in self.parameters.items())
        return "\n".join([f"<Fit of {self.law.name!r}: {values}>", self.words, *self.remarks])

    def _interval(self, name: str) -> str:
        low, high = self.intervals.get(name, (math.nan, math.nan))
        return "" if math.isnan(low) else f" ({low:.3g} to {high:.3g})"

    def _repr_html_(self) -> str:
        rows = [
            [name, f"{value:.4g}", self._interval(name)[2:-1] or "unknown"] for name, value in self.parameters.items()
        ]
        table = html_grid(["parameter", "value", f"{100 * self.confidence:g} % interval"], rows)
        said = "".join(f"<li>{html.escape(text)}</li>" for text in (self.words, *self.remarks))
        law = f"{html.escape(self.law.name)}, {html.escape(self.law.words)}"
        return f"<p>Law of scaling: {law}</p>{table}<ul>{said}</ul>"


def rate_in_words(rate: float) -> str:
    """A throughput to whole numbers, or to three digits where it is small, or beyond all machines."""
    return f"{rate:,.0f}" if 100 <= rate < 1e15 else f"{rate:.3g}"


def _lost(law: Law, values: list[float]) -> str:
    if law.name not in LAWS or law != find_law(law.name):
        return "; ".join(f"{name} = {value:.3g}" for name, value in zip(law.coefficients, values, strict=True))
    first = _percent(values)
    return {
        "linear": "nothing is lost", "amdahl": f"{first} of the work is serial",
        "usl": f"{first} of the work is serial, and each pair of workers costs {values[-1] if values else 0:.2g} of it",
        "log": f"each doubling costs {first} of a step", "ring": f"an exchange costs {first} of a step",
    }[law.name]  # fmt: skip


def _percent(values: list[float]) -> str:
    percent = 100 * (values[0] if values else 0.0)
    if percent > 1000:
        return "more than 1,000 %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _remarks(found: Fit) -> list[str]:
    different = len(found.points.counts)
    said = []
    if different < _FEW_COUNTS:
        said.append(f"Only {different} different worker counts were measured, up to {found.counts.max():g}.")
    if found.degrees_of_freedom < 1:
        said.append("There are no more measurements than parameters, so nothing is known of the uncertainty.")
    if found._missed:
        miss = f"{100 * _largest_miss(found):.2g} %"
        said.append(f"The law misses what was measured by up to {miss}, which is more than repeats scatter.")
    unlimited = [name for name, (_, high) in found.intervals.items() if math.isinf(high)]
    if unlimited:
        said.append(f"The measurements do not limit {' and '.join(unlimited)} from above.")
    for name, value in zip(found.law.coefficients, free_coefficients(found.law, found.points), strict=True):
        if value < -_TINY:
            superlinear = ": the speedup is superlinear" if name == found.law.coefficients[0] else ""
            said.append(f"Without bounds, {name} would be {value:.2g}, below 0{superlinear}.")
    if found.law.name == "usl" and math.isinf(found.peak):
        said.append("No peak within the evidence: kappa is 0.")
    return said


def _largest_miss(found: Fit) -> float:
    means = np.exp(found.points.logs) * found.points.counts
    return float(np.abs(found.predict(found.points.counts) / means - 1).max())
