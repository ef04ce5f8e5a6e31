"""Records of a scaling study: what was measured, on what, and how measurements are summed up.

Owns the frozen records and the arithmetic from repeats to medians and quartiles; refuses to measure, and to fit.

References
----------
Karp and Flatt: "Measuring parallel processor performance", Commun. ACM 33 (1990) 539.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parakit.errors import InputError
from parakit.events.records import PHASES, baseline_name
from parakit.formatting import many
from parakit.scaling.laws.laws import karp_flatt
from parakit.validation import brief, check_flag

__all__ = [
    "NOTHING", "About", "Measurement", "Row", "Spread", "check_different", "from_plain", "ratio", "rival_gain", "rows",
    "spread_of",
]  # fmt: skip

#: Kinds of a measurement.
KINDS = ("workers", "plain")
MODES = ("strong", "weak")
#: The least that the whole numbers of a study may be.
_LEAST = {"batch_size": 1, "parameters": 0, "samples": 0, "threads": 1, "cores": 1, "repeats": 0, "seed": 0}
_MOST = 2**63 - 1  # what arrays can hold


@dataclass(frozen=True, slots=True)
class Measurement:
    """One repeat: how fast training went in one visit to a worker count, or to plain PyTorch.

    Attributes
    ----------
    workers : int
        Active workers; 0 for plain PyTorch, which has none.
    repeat, block : int
        Counted from zero: how often this was measured before, and the block of the sweep, in which everything is
        visited once.
    rate : float
        Samples per second, over all that was timed: whole segments with all that they cost, or the steps of plain
        PyTorch.
    step_seconds : float
        Median over the timed steps.
    steps : int
        Timed steps; those of the warm-up are not among them.
    seconds : float
        That were timed.
    breakdown : tuple of float
        Seconds a step in each of `parakit.events.records.PHASES`, the mean over steps and workers; empty for plain
        PyTorch.
    at_seconds : float
        When it ended, since the start of the sweep, by the clock of the workers.
    kind : {"workers", "plain"}
    threads : int
        That torch used in each process.
    cores : int
        That all of them had together.
    simulated : bool
        Whether nothing was measured, but priced on a virtual clock.
    """

    workers: int
    repeat: int
    block: int
    rate: float
    step_seconds: float
    steps: int
    seconds: float
    breakdown: tuple[float, ...] = ()
    at_seconds: float = 0.0
    kind: str = "workers"
    threads: int = 1
    cores: int = 1
    simulated: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_ranges(self)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds a step by phase; empty for plain PyTorch."""
        return dict(zip(PHASES, self.breakdown, strict=False))

    @property
    def crowded(self) -> bool:
        """Whether there were more busy threads than cores."""
        return self.workers * self.threads > self.cores


def _check_kinds(measured: Measurement) -> None:
    for name in ("workers", "repeat", "block", "steps", "threads", "cores"):
        least = 1 if name in ("steps", "threads", "cores") else 0
        _check_count(f"{name} of a measurement", getattr(measured, name), least)
    if measured.kind not in KINDS:
        raise InputError(f"kind of a measurement is {measured.kind!r}; it must be one of 'workers', 'plain'.")
    if (measured.workers == 0) != (measured.kind == "plain"):
        raise InputError(f"A measurement of kind {measured.kind!r} cannot have {measured.workers} workers.")
    check_flag("simulated of a measurement", measured.simulated)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise InputError(f"{name} is {brief(value)}; it must be a whole number from {least} to {_MOST:,}.")


def _check_ranges(measured: Measurement) -> None:
    for name in ("rate", "step_seconds", "seconds"):
        value = getattr(measured, name)
        if not _is_number(value) or value <= 0:
            raise InputError(f"{name} of a measurement is {brief(value)}; it must be a finite number above 0.")
    if not _is_number(measured.at_seconds):
        raise InputError(f"at_seconds of a measurement is {brief(measured.at_seconds)}; it must be a finite number.")
    shares = measured.breakdown
    if not isinstance(shares, tuple) or len(shares) not in (0, len(PHASES)) or not all(map(_is_number, shares)):
        raise InputError(
            f"The breakdown of a measurement is {brief(shares)}; it must hold seconds for {', '.join(PHASES)}."
        )


def _is_number(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) <= sys.float_info.max  # which no int may exceed, and NaN never does


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a study is of, and on what it was made.

    Parameters
    ----------
    mode : {"strong", "weak"}
        Whether the global batch is the same at every worker count, or grows with it.
    batch_size : int
        Rows in the global batch; for each worker where the mode is weak.
    parameters, samples : int
        Of the model that are trained; of the data.
    strategy, pool, machine : str
        In words.
    threads, cores : int
        Of each worker; of the pool.
    counts : tuple of int
        Worker counts that were to be measured.
    repeats : int
        How often each.
    seconds : float
        That each repeat was to be timed.
    seed : int
        Of the order of visits.
    simulated : bool
        Whether the workers live by a virtual clock.
    in_turns : bool
        Whether workers take turns in one process.
    """

    mode: str = "strong"
    batch_size: int = 1
    parameters: int = 0
    samples: int = 0
    strategy: str = ""
    pool: str = ""
    machine: str = ""
    threads: int = 1
    cores: int = 1
    counts: tuple[int, ...] = ()
    repeats: int = 0
    seconds: float = 0.0
    seed: int = 0
    simulated: bool = False
    in_turns: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode of a study is {brief(self.mode)}; it must be one of 'strong', 'weak'.")
        for name, least in _LEAST.items():
            _check_count(f"{name} of a study", getattr(self, name), least)
        if not isinstance(self.counts, tuple):
            raise InputError(f"counts of a study is {brief(self.counts)}; it must be a tuple of worker counts.")
        for count in self.counts:
            _check_count("A worker count in counts of a study", count, 1)
        if not _is_number(self.seconds) or self.seconds < 0:
            raise InputError(f"seconds of a study is {brief(self.seconds)}; it must be a finite number of at least 0.")
        for name in ("simulated", "in_turns"):
            check_flag(f"{name} of a study", getattr(self, name))


# --- summing up


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some repeats; NaN where there are none."""

    median: float
    low: float
    high: float
    count: int


NOTHING = Spread(math.nan, math.nan, math.nan, 0)


def spread_of(values: Iterable[float]) -> Spread:
    """Median and quartiles."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return NOTHING
    low, median, high = np.percentile(known, (25, 50, 75)).tolist()
    return Spread(median, low, high, len(known))


@dataclass(frozen=True, slots=True)
class Row:
    """A worker count, summed up.

    Attributes
    ----------
    workers : int
    rate : Spread
        Samples per second.
    speedup : Spread
        Over one worker. The ratio is taken within each block, so that what disturbed the machine for longer than a
        block cancels; median and quartiles are over blocks.
    over_plain : dict of str to Spread
        The same over each rival.
    efficiency : float
        Speedup over workers.
    karp_flatt : float
        Serial fraction; NaN for one worker, and where the batch grows with the workers.
    crowded : bool
        Whether there were more busy threads than cores.
    simulated : bool
        Whether any of it was priced on a virtual clock.
    """

    workers: int
    rate: Spread
    speedup: Spread
    over_plain: dict[str, Spread]
    efficiency: float
    karp_flatt: float
    crowded: bool
    simulated: bool = False


def rows(measurements: Sequence[Measurement], mode: str = "strong") -> tuple[Row, ...]:
    """Every worker count summed up, by ascending count."""
    by_count: dict[int, list[Measurement]] = {}
    for measured in measurements:
        if measured.kind == "workers":
            by_count.setdefault(measured.workers, []).append(measured)
    ones, rivals = by_count.get(1, []), _rivals(measurements)
    return tuple(_row(count, by_count[count], ones, rivals, mode) for count in sorted(by_count))


def _row(
    count: int, mine: list[Measurement], ones: list[Measurement], rivals: dict[str, list[Measurement]], mode: str
) -> Row:
    speedup = ratio(mine, ones)
    over_plain = {name: ratio(mine, theirs) for name, theirs in rivals.items()}
    serial = float(karp_flatt(speedup.median, count)) if mode == "strong" else math.nan
    return Row(
        count, spread_of(m.rate for m in mine), speedup, over_plain, speedup.median / count, serial,
        any(m.crowded for m in mine), any(m.simulated for m in mine),
    )  # fmt: skip


def _rivals(measurements: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The measurements of plain PyTorch by the names of the rivals, the one with fewest threads first."""
    rivals: dict[str, list[Measurement]] = {}
    for measured in sorted((m for m in measurements if m.kind == "plain"), key=lambda m: m.threads):
        rivals.setdefault(baseline_name(measured.threads), []).append(measured)
    return rivals


def ratio(mine: list[Measurement], base: list[Measurement]) -> Spread:
    """Rates over those of a base, within the blocks that have both; where there are none, over the base's median."""
    unit = _by_block(base)
    if not unit:
        return NOTHING
    together = {block: rate for block, rate in _by_block(mine).items() if block in unit}
    if together:
        return spread_of(rate / unit[block] for block, rate in together.items())
    usual = float(np.median(list(unit.values())))
    return spread_of(m.rate / usual for m in mine)


def _by_block(measurements: list[Measurement]) -> dict[int, float]:
    rates: dict[int, list[float]] = {}
    for measured in measurements:
        rates.setdefault(measured.block, []).append(measured.rate)
    return {block: float(np.median(values)) for block, values in rates.items()}


def rival_gain(measurements: Iterable[Measurement]) -> Spread:
    """Rate of the rival with most threads over that of the one with fewest, within blocks; NaN without two rivals."""
    by_threads = list(_rivals(measurements).values())
    return ratio(by_threads[-1], by_threads[0]) if len(by_threads) > 1 else NOTHING


def check_different(measurements: Sequence[Measurement]) -> None:
    """Refuse the same repeat twice: a doubled file would look more certain than it is."""
    seen: set[tuple[Any, ...]] = set()
    for measured in measurements:
        key = measured.kind, measured.workers, measured.threads, measured.repeat
        if key in seen:
            who = many(measured.workers, "worker") if measured.workers else baseline_name(measured.threads)
            raise InputError(
                f"Repeat {measured.repeat} of {who} is there twice.", cause="measurements that were joined"
            )
        seen.add(key)


def from_plain(measurements: Iterable[Measurement]) -> dict[str, Spread]:
    """Rates of the rivals by their names, the one with fewest threads first."""
    return {name: spread_of(m.rate for m in mine) for name, mine in _rivals(measurements).items()}
