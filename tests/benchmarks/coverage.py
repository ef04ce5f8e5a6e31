"""How often bands hold what they promise: laws with known parameters, and published curves whose end is held back.

Run with ``python -m tests.benchmarks.coverage [TRIALS]``. Prints three tables; asserts nothing.

1. Bands of a fit of the true law, far beyond the measurements.
2. Envelopes of `compare`, which is not told the true law, at twice the largest count.
3. Envelopes of `compare` for every prefix of every published curve, at the count that comes next.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parakit.scaling.laws.fit import fit
from parakit.scaling.laws.laws import find_law, usl
from parakit.scaling.laws.selection import Prediction, compare

NOISE = 0.02
DATA = Path(__file__).parents[1] / "data" / "scaling"


@dataclass(frozen=True)
class Case:
    """A law whose truth is known, what is measured of it, and what is asked."""

    law: str
    sigma: float
    kappa: float
    counts: tuple[int, ...]
    repeats: int
    asked: int
    widest: float  # that its band should be, upper over lower edge


CASES = (
    Case("usl", 0.05, 0.002, (1, 2, 4, 8), 3, 32, 2.6),
    Case("usl", 0.05, 0.0, (1, 2, 4, 8), 3, 32, 2.5),
    Case("usl", 0.0, 0.001, (1, 2, 4, 8), 3, 32, 2.7),
    Case("usl", 0.0, 0.0, (1, 2, 4, 8), 3, 32, 2.1),
    Case("usl", 0.05, 0.002, (1, 2, 3, 4, 6, 8), 5, 32, 2.0),
    Case("amdahl", 0.03, 0.0, (1, 2, 4), 3, 16, 1.35),
    Case("amdahl", 0.0, 0.0, (1, 2, 4), 3, 16, 1.3),
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


TRUTHS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("linear", ()), ("amdahl", (0.03,)), ("amdahl", (0.1,)), ("usl", (0.05, 0.002)), ("usl", (0.05, 0.02)),
    ("usl", (0.0, 0.03)), ("log", (0.05,)), ("log", (0.2,)), ("ring", (0.1,)),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of many comparisons; errors are relative, and means."""

    held: float
    width: float
    error: float
    by_log: float
    chosen: Counter[str]


def choose(truth: str, values: tuple[float, ...], counts: tuple[int, ...], trials: int, seed: int = 0) -> Outcome:
    """Comparisons of three repeats, asked for twice the largest count."""
    generator = np.random.default_rng(seed)
    law, n, asked = find_law(truth), np.repeat(counts, 3), 2 * max(counts)
    exact, right = law.throughput(n, 100.0, values), law.throughput(asked, 100.0, values)
    found, by_log = [], []
    for _ in range(trials):
        compared = compare(n, exact * np.exp(NOISE * generator.standard_normal(len(n))))
        found.append(compared.predict(asked))
        by_log.append(abs(compared.fits["log"].predict(asked) / right - 1))
    return Outcome(
        float(np.mean([p.low <= right <= p.high for p in found])), float(np.median([p.high / p.low for p in found])),
        float(np.mean([abs(p.rate / right - 1) for p in found])), float(np.mean(by_log)), Counter(p.law for p in found),
    )  # fmt: skip


def training_curves() -> dict[str, list[tuple[int, float]]]:
    """Published throughputs of data-parallel training at three counts or more."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for row in list(csv.reader((DATA / "nvidia_dle_scaling.csv").read_text().splitlines()))[2:]:
        groups.setdefault(" ".join(row[:5]), []).append((int(row[5]), float(row[6])))
    return {name: sorted(points) for name, points in groups.items() if len(points) >= 3}


def other_curves() -> dict[str, list[tuple[int, float]]]:
    """The two curves of the literature on the USL: a ray tracer, and a benchmark of software development."""
    found = {}
    for name in ("usl_raytracer", "usl_specsdm91"):
        rows = list(csv.reader((DATA / f"{name}.csv").read_text().splitlines()))[2:]
        found[name] = [(int(row[0]), float(row[1])) for row in rows]
    return found


def prefixes(curves: dict[str, list[tuple[int, float]]]) -> Iterator[tuple[int, Prediction, float, float]]:
    """For each prefix: how many counts it has, what is predicted of the next, by `log` alone, and what was measured."""
    for points in curves.values():
        for seen in range(2, len(points)):
            counts, rates = zip(*points[:seen], strict=True)
            n, truth = points[seen]
            yield seen, compare(counts, rates).predict(n), float(fit("log", counts, rates).predict(n)), truth


def _print_bands(trials: int) -> None:
    print(f"1. bands of 95 %, noise of {100 * NOISE:g} %, {trials} trials each\n")
    print("law     sigma  kappa   counts            repeats  asked   held   high/low")
    for case in CASES:
        held, width = cover(case, trials)
        counts = ",".join(map(str, case.counts))
        print(f"{case.law:6} {case.sigma:6} {case.kappa:6}   {counts:16} {case.repeats:8} {case.asked:6}"
              f"  {100 * held:4.0f} %  {width:8.2f}")  # fmt: skip


def _print_choices(trials: int) -> None:
    print(f"\n2. envelopes at twice the largest count, 3 repeats, noise of {100 * NOISE:g} %, {trials} trials each\n")
    print("truth                  counts     held   high/low   error   by log   chosen")
    for counts in ((1, 2, 4), (1, 2, 4, 8)):
        for truth, values in TRUTHS:
            found = choose(truth, values, counts, trials)
            chosen = ", ".join(f"{name} {many}" for name, many in found.chosen.most_common())
            print(f"{truth + ' ' + ' '.join(map(str, values)):20}   {','.join(map(str, counts)):8} "
                  f"{100 * found.held:4.0f} %   {found.width:8.2f}  {100 * found.error:4.1f} %   "
                  f"{100 * found.by_log:4.0f} %   {chosen}")  # fmt: skip


def _print_published() -> None:
    print("\n3. published curves: the next count, predicted from every prefix\n")
    print("curves      counts seen   prefixes   held         high/low   error   by log")
    for name, curves in (("training", training_curves()), ("others", other_curves())):
        found = list(prefixes(curves))
        for label, least, most in (("2", 2, 2), ("3", 3, 3), ("4 or more", 4, 99), ("all", 2, 99)):
            some = [each for each in found if least <= each[0] <= most]
            held = sum(p.low <= truth <= p.high for _, p, _, truth in some)
            error, by_log = (np.mean([abs(value / truth - 1) for value, truth in pairs]) for pairs in (
                [(p.rate, truth) for _, p, _, truth in some], [(log, truth) for _, _, log, truth in some]
            ))  # fmt: skip
            width = np.median([p.high / p.low for _, p, _, _ in some])
            print(f"{name:12}{label:12}{len(some):10}   {held:2} ({100 * held / len(some):3.0f} %)   {width:8.2f}"
                  f"   {100 * error:5.1f} %  {100 * by_log:5.1f} %")  # fmt: skip


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    _print_bands(trials)
    _print_choices(trials)
    _print_published()


if __name__ == "__main__":
    main()
