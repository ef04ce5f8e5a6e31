"""`Comparison` of laws, and a `Prediction` by it: a rate, from where to where, and how far from what was measured.

Owns the records and their words; refuses to choose.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parakit.errors import InputError
from parakit.formatting import html_grid
from parakit.scaling.laws.fit import SCENARIO_RATIO, Fit, rate_in_words
from parakit.scaling.laws.observations import MOST_COUNT, check_asked

__all__ = ["Comparison", "Prediction"]

_HARDLY_LIMITED = 3.0  # times the low edge
_FAR = 2.0  # times the root of its mean square error, a model from elsewhere may be off


@dataclass(frozen=True, repr=False)
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
    banded : bool
        Whether the bounds hold what is known of noise; otherwise they only say how far laws differ.
    simulated : bool
        Whether what was measured was only simulated.
    """

    workers: int
    rate: float
    low: float
    high: float
    speedup: float
    ratio: float
    law: str
    banded: bool = True
    simulated: bool = False

    @property
    def scenario(self) -> bool:
        """Whether this lies too far beyond what was measured to be called a prediction."""
        return self.ratio > SCENARIO_RATIO

    @property
    def words(self) -> str:
        """In a few sentences."""
        many = "1 worker" if self.workers == 1 else f"{self.workers:,} workers"
        far = f"{self.ratio:.3g} times as many as were measured"
        times = f"{self.speedup:.3g} times one worker"
        kind = "simulated, " if self.simulated else ""
        said = f"{kind}{rate_in_words(self.rate)} samples/s{self._known()} with {many}, {times}, by {self.law!r}"
        if self.scenario:
            said = f"A scenario, not a prediction: {said}; that is {far}."
        else:
            said = f"{said}; {far}." if self.ratio > 1 else f"{said}."
        return " ".join([said, *self._doubts()])

    def _known(self) -> str:
        if math.isnan(self.low):
            return ""
        if math.isinf(self.high):
            return f" ({rate_in_words(self.low)} at least)"
        return f" ({rate_in_words(self.low)} to {rate_in_words(self.high)})"

    def _doubts(self) -> list[str]:
        if math.isinf(self.high):
            return ["The measurements do not limit it from above."]
        if not self.banded:
            return ["The bounds only say how far laws differ: without repeats nothing is known of noise."]
        if self.high > _HARDLY_LIMITED * self.low:
            return ["The measurements hardly limit it; more counts or repeats would."]
        return []

    def __str__(self) -> str:
        return self.words

    def __repr__(self) -> str:
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
        Relative error of predicting the larger counts, each from those below it: the root of the mean square, where
        they are several; NaN where too few are below.
    plausible : tuple of str
        Laws that predicted about as well as the best.
    largest : float
        The most workers that were measured.
    asked : tuple of float
        The counts that were held out.
    reason : str
        Why the best is the best.
    off : dict of str to float
        How far models from elsewhere are off, over all that was measured.
    simulated : bool
        Whether what was measured was only simulated.
    """

    best: str
    fits: dict[str, Any]
    held_out: dict[str, float]
    plausible: tuple[str, ...]
    largest: float
    asked: tuple[float, ...] = ()
    reason: str = ""
    off: Mapping[str, float] = field(default_factory=dict)
    simulated: bool = False

    def predict(self, n: int) -> Prediction:
        """What a number of workers should bring.

        Raises
        ------
        InputError
            If it is no whole number of at least 1, or beyond all machines.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= MOST_COUNT:
            shown = repr(n) if not isinstance(n, int) or abs(n) <= 10 * MOST_COUNT else "larger than any machine"
            raise InputError(f"n is {shown}; it must be a whole number of workers, from 1 to {MOST_COUNT:g}.")
        chosen = self.fits[self.best]
        rate = float(chosen.predict(int(n)))
        low, high = self.envelope(int(n))
        return Prediction(
            int(n), rate, low, high, rate / float(chosen.predict(1)), float(n / self.largest), self.best, self._banded,
            self.simulated,
        )  # fmt: skip

    def envelope(self, n: int) -> tuple[float, float]:
        """From the lowest to the highest of the bands of all plausible laws, in samples a second."""
        check_asked(n)
        edges: list[float] = []
        for name in self.plausible:
            model = self.fits[name]
            rate, wide = float(model.predict(n)), math.exp(_FAR * self.off.get(name, 0.0))
            edges += [rate / wide, rate * wide]
            edges += [edge for edge in model.band(n) if not math.isnan(edge)] if isinstance(model, Fit) else []
        return min(edges), max(edges)

    @property
    def _banded(self) -> bool:
        best = self.fits[self.best]
        return not isinstance(best, Fit) or best.degrees_of_freedom > 0

    @property
    def _heading(self) -> str:
        if len(self.asked) < 2:
            return f"error at {self.largest:g} workers, held out"
        return f"error at {self.asked[0]:g} to {self.largest:g} workers, each predicted from fewer"

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for name in sorted(self.fits, key=lambda name: (name != self.best, self._sortable(name))):
            error = self.held_out.get(name, math.nan)
            mark = "best" if name == self.best else "plausible" if name in self.plausible else ""
            rows.append((name, "unknown" if math.isnan(error) else f"{100 * error:.1f} %", mark))
        return rows

    def _sortable(self, name: str) -> float:
        error = self.held_out.get(name, math.nan)
        return math.inf if math.isnan(error) else error

    def __repr__(self) -> str:
        lines = [f"  {name:12} {error:>9}  {mark}".rstrip() for name, error, mark in self._rows()]
        what = "Comparison (simulated)" if self.simulated else "Comparison"
        return "\n".join([f"<{what}: {self._heading}>", *lines, self.reason]).rstrip()

    def _repr_html_(self) -> str:
        law = "law (simulated)" if self.simulated else "law"
        said = f"<p>{html.escape(self.reason)}</p>" if self.reason else ""
        return html_grid([law, self._heading, ""], self._rows()) + said
