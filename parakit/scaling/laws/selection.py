"""Choosing between laws of scaling: by how well each predicts larger counts from smaller ones.

Owns the evidence for and against laws, and the rules by which they are compared; the best one predicts, in a band that
reaches around every law that predicted about as well. Their spread is the uncertainty of the model; far beyond the
measurements it prevails.

References
----------
Burnham and Anderson, "Model Selection and Multimodel Inference", 2nd edition, 2002, section 2.6 (a difference of more
than 10 in the corrected criterion of Akaike leaves a model essentially no support). Hurvich and Tsai, Biometrika 76
(1989) 297 (that criterion). Dawid, J. R. Stat. Soc. A 147 (1984) 278 (prediction of each observation from those before
it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError
from parakit.scaling.laws.fit import Fit, check_points, fit
from parakit.scaling.laws.laws import LAWS, Law, find_law
from parakit.scaling.laws.observations import Points
from parakit.scaling.laws.prediction import Comparison, Prediction
from parakit.scaling.laws.profile_likelihood import Region
from parakit.scaling.laws.solver import faces, squares

__all__ = ["Comparison", "Prediction", "Predictor", "akaike", "compare", "held_out_counts"]

Floats = npt.NDArray[np.float64]

# What published curves of data-parallel training follow best; see Notes of `compare`.
_USUAL = ("log", "ring", "amdahl", "usl")
_AS_GOOD = 2.0  # times the least error is as good
_SURELY_GOOD = 0.03  # and so is this
_CLEARLY_OFF = 0.05  # so far off, fitted laws give way to a model from elsewhere that is at most half as far off
_NO_SUPPORT = 10.0
_SEEN = 3  # counts that the first prediction rests on, where there are more
_ROUNDING = 1e-9  # relative: what is closer to a law than this is on it
_CONFIDENCE = 0.95


class Predictor(Protocol):
    """A model that was not fitted here, such as a cost model."""

    @property
    def name(self) -> Any:
        """What it is called."""

    def predict(self, n: Any) -> Any:
        """Throughput at some counts."""


def compare(
    workers: Any,
    rates: Any,
    *,
    laws: Sequence[str | Law] = LAWS,
    extra: Sequence[Predictor] = (),
) -> Comparison:
    """Fit several laws, and compare how well they predict what they have not seen.

    Parameters
    ----------
    workers : sequence of int, (measurements,)
    rates : sequence of float, (measurements,)
        Samples a second.
    laws : sequence of str or Law
        Candidates; those that need more counts than there are do not take part.
    extra : sequence of Predictor
        More models, which have `name` and `predict`. Of what they were made is not asked: what they seem to predict
        they may have been calibrated with, so they are the best only where every law is clearly off.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the points cannot be, there is one worker count only, no law can be fitted to so few, or a model has the
        name of another.

    Notes
    -----
    Every count from the fourth on, or with three of them the third, is predicted from those below it; a law with as
    many parameters as counts takes part in this, as its error tells what that is worth. Laws whose error is at most
    twice the least, or 3 %, or that are off by no more than repeats scatter, are as good as the best. Among these,
    published curves of data-parallel training speak for a step that grows with log2 N, then for a ring's, Amdahl's law
    and the USL; but where the corrected criterion of Akaike (over all measurements) leaves one of them no support
    against another, for that other.
    """
    counts, measured = check_points(workers, rates)
    points = Points.of(counts, measured)
    if len(points.counts) < 2:
        raise InputError(
            f"One worker count only was measured ({f'{counts[0]:g}' if counts.size else 'none'}); nothing follows for "
            "others from it.",
            remedy="measure at least two, better six: pk.sweep(..., workers=[1, 2, 3, 4, 6, 8])",
        )
    wanted = _laws(laws)
    fits = {law.name: fit(law, counts, measured) for law in _enough(wanted, len(points.counts))}
    others = _from_elsewhere(extra, fits, points)
    held_out = {name: error_of(partial(predict_from_below, found.law, points), points) for name, found in fits.items()}
    good = _as_good(fits, held_out, points)
    best, reason = _best(fits, good, held_out)
    if held_out[best] > _SURELY_GOOD:
        unseen = {law.name: Fit(law, counts, measured) for law in wanted if _is_unseen(law, points)}
        fits, good, held_out = fits | unseen, (*good, *unseen), held_out | dict.fromkeys(unseen, math.nan)
    worst = _worst(error for name, error in held_out.items() if fits[name].law.coefficients)
    held_out |= {name: error_of(model.predict, points) for name, model in others.items()}
    plausible = (*good, *(name for name in others if held_out[name] <= worst))
    rival = min(others, key=lambda name: held_out[name], default="")
    if rival and _is_outdone(fits[best], held_out[best], held_out[rival], points):
        best, plausible = rival, tuple(dict.fromkeys((*plausible, rival)))
        reason = f"Every law is clearly off, and {rival!r}, which was not fitted here, is at most half as far off."
    return Comparison(
        best, fits | others, held_out, plausible, float(counts.max()), asked=tuple(held_out_counts(points).tolist()),
        reason=reason, off={name: _off(model, points) for name, model in others.items()},
    )  # fmt: skip


def _laws(laws: Any) -> list[Law]:
    """The candidates, each once."""
    try:
        given = [laws] if isinstance(laws, str | Law) else list(laws)
    except TypeError:
        given = [laws]
    wanted = list(dict.fromkeys(law if isinstance(law, Law) else find_law(law) for law in given))
    if not wanted:
        raise InputError("There are no laws to compare.", remedy=f"leave laws= out, or choose some of {LAWS}")
    names = [law.name for law in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two different laws have the name {twice!r}.", remedy="give one of them another name")
    return wanted


def _enough(wanted: list[Law], different: int) -> list[Law]:
    """The laws that so many counts suffice for."""
    enough = [law for law in wanted if law.least_counts <= different]
    if not enough:
        raise InputError(
            f"None of the laws {', '.join(repr(law.name) for law in wanted)} can be fitted to {different} different "
            "worker counts.",
            remedy=f"measure at least {min(law.least_counts for law in wanted)} counts, or leave laws= out",
        )
    return enough


def _is_unseen(law: Law, points: Points) -> bool:
    """Whether a law could follow these counts, though they are too few to believe in it.

    With repeats it has a band. Where all others are off, a prediction must reach around it.
    """
    return law.least_counts > len(points.counts) > len(law.coefficients) and points.freedom > 0


def _from_elsewhere(extra: Sequence[Predictor], fits: dict[str, Fit], points: Points) -> dict[str, Predictor]:
    """Models by their names, once it is clear that they have names of their own, and predict."""
    others: dict[str, Predictor] = {}
    for model in extra:
        name = getattr(model, "name", None)
        if not isinstance(name, str) or not callable(getattr(model, "predict", None)):
            raise InputError(f"A model from elsewhere is a {type(model).__name__}, without a name or predict(n).")
        if name in fits or name in LAWS or name in others:
            raise InputError(
                f"A model from elsewhere has the name {name!r}, as another has.", remedy="give it a name of its own"
            )
        rates = np.array([float(model.predict(int(count))) for count in points.counts])
        if not (np.isfinite(rates) & (rates > 0)).all():
            raise InputError(f"The model {name!r} predicts {rates.min():g} samples/s; it must be above 0 and finite.")
        others[name] = model
    return others


def _off(model: Predictor, points: Points) -> float:
    """The root of the mean square of a model's errors, on logarithms, over all counts."""
    logs = np.log([float(model.predict(int(count))) / count for count in points.counts])
    return float(np.sqrt(np.mean((logs - points.logs) ** 2)))


def _worst(held_out: Any) -> float:
    """The error up to which a law is as good as the best of some."""
    return max(_AS_GOOD * min((error for error in held_out if not math.isnan(error)), default=0.0), _SURELY_GOOD)


def _as_good(fits: dict[str, Fit], held_out: dict[str, float], points: Points) -> tuple[str, ...]:
    """The laws that are as good as the best; where all are unknown, those that are not seen to be off."""
    # That nothing is lost is the limit of every other law: its luck is no measure for them.
    losing = {name: held_out[name] for name, found in fits.items() if found.law.coefficients} or held_out
    unknown, worst = all(map(math.isnan, losing.values())), _worst(losing.values())
    return tuple(
        name for name, found in fits.items()
        if (unknown and math.isnan(held_out[name])) or held_out[name] <= worst or is_explained(found.law, points)
    )  # fmt: skip


def _best(fits: dict[str, Fit], good: tuple[str, ...], held_out: dict[str, float]) -> tuple[str, str]:
    """The law that is believed most, and why."""
    ordered = dict.fromkeys((*_USUAL, *fits))
    among = [name for name in ordered if name in good and fits[name].law.coefficients] or list(good)
    usual, rest = among[0], among[1:]
    rival = min(among, key=lambda name: akaike(fits[name]))
    if akaike(fits[rival]) < akaike(fits[usual]) - _NO_SUPPORT and math.isfinite(akaike(fits[usual])):
        return rival, f"{rival!r} predicted as well as any, and against it all measurements leave {usual!r} no support."
    if not rest:
        known = len(fits) > 1 and not math.isnan(held_out[usual])
        return usual, f"{usual!r} predicted best, clearly." if known else ""
    first = "published curves of training follow it" if usual in _USUAL[:2] else "it is taken first"
    return usual, f"The measurements do not tell {usual!r} from {', '.join(map(repr, rest))}; of these, {first}."


def _is_outdone(best: Fit, error: float, rival: float, points: Points) -> bool:
    """Whether a model from elsewhere is so much better than the best law that it is to be believed instead."""
    return error > _CLEARLY_OFF and rival <= error / _AS_GOOD and not is_explained(best.law, points)


# --- evidence: what each law foretells of larger counts, and how well it fits all of them


def held_out_counts(points: Points) -> Floats:
    """Counts that are predicted from those below: all from the fourth on, or else the largest."""
    return points.counts[min(_SEEN, len(points.counts) - 1) :]


def predict_from_below(law: Law, points: Points, count: float) -> float:
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
