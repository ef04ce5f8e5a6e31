"""How often bands hold what they promise: laws with known parameters, drawn measurements, a prediction far beyond them.

Run with ``python -m tests.benchmarks.coverage [TRIALS]``. Prints a table; asserts nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from parakit.scaling.fitting import fit
from parakit.scaling.laws import usl

NOISE = 0.02


@dataclass(frozen=True)
class Case:
    """A law whose truth is known, what is measured of it, and what is asked."""

    law: str
    sigma: float
    kappa: float
    counts: tuple[int, ...]
    repeats: int
    asked: int


CASES = (
    Case("usl", 0.05, 0.002, (1, 2, 4, 8), 3, 32),
    Case("usl", 0.05, 0.0, (1, 2, 4, 8), 3, 32),
    Case("usl", 0.0, 0.001, (1, 2, 4, 8), 3, 32),
    Case("usl", 0.0, 0.0, (1, 2, 4, 8), 3, 32),
    Case("usl", 0.05, 0.002, (1, 2, 3, 4, 6, 8), 5, 32),
    Case("amdahl", 0.03, 0.0, (1, 2, 4), 3, 16),
    Case("amdahl", 0.0, 0.0, (1, 2, 4), 3, 16),
)


def cover(case: Case, trials: int, seed: int = 0) -> tuple[float, float]:
    """The share of bands that hold the truth, and the median of their upper over their lower edge."""
    generator = np.random.default_rng(seed)
    counts = np.repeat(case.counts, case.repeats)
    exact = usl(counts, case.sigma, case.kappa, 100.0)
    truth = usl(case.asked, case.sigma, case.kappa, 100.0)
    held, widths = 0, []
    for _ in range(trials):
        rates = exact * np.exp(NOISE * generator.standard_normal(len(counts)))
        low, high = fit(case.law, counts.tolist(), rates.tolist()).band(case.asked)
        held += low <= truth <= high
        widths.append(high / low)
    return held / trials, float(np.median(widths))


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print(f"bands of 95 %, noise of {100 * NOISE:g} %, {trials} trials each\n")
    print("law     sigma  kappa   counts            repeats  asked   held   high/low")
    for case in CASES:
        held, width = cover(case, trials)
        counts = ",".join(map(str, case.counts))
        print(f"{case.law:6} {case.sigma:6} {case.kappa:6}   {counts:16} {case.repeats:8} {case.asked:6}"
              f"  {100 * held:4.0f} %  {width:8.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
