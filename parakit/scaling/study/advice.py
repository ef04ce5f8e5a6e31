"""`Advice`: which layout of processes and threads trains fastest on a machine, and why, in a sentence and a table.

Owns what was tried and the words about it; refuses to measure.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from parakit.errors import InputError
from parakit.events.records import PHASES, PLAIN
from parakit.formatting import DASH, between, html_table, many, rate, text_table, times
from parakit.scaling.study.records import Measurement, Spread, ratio, spread_of

__all__ = ["Advice", "Layout", "Tried"]

_MUCH = 0.1  # of a step: what is worth naming as the reason
_SHORT_SECONDS = 0.01  # a step that the cost of an exchange shows in, whatever the model


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Processes, and threads of each; 0 workers are plain PyTorch in one process, without parakit."""

    workers: int
    threads: int

    def __str__(self) -> str:
        if not self.workers:
            return f"{PLAIN}, {many(self.threads, 'thread')}"
        processes = "1 process" if self.workers == 1 else f"{self.workers:,} processes"
        return f"{processes} of {many(self.threads, 'thread')}"


@dataclass(frozen=True, slots=True)
class Tried:
    """A layout, summed up.

    Attributes
    ----------
    layout : Layout
    rate : Spread
        Samples per second.
    over_plain : Spread
        Rate over that of plain PyTorch with the threads that suit it best, within blocks.
    step_seconds : float
        Of a step, all costs of segments included; median.
    exchange, waiting, control : float
        Shares of the time: gradients travel and are summed; workers wait for slower ones; orders, commits and reports
        between segments. 0 for plain PyTorch.
    """

    layout: Layout
    rate: Spread
    over_plain: Spread
    step_seconds: float
    exchange: float
    waiting: float
    control: float


class Advice:
    """Which layout is fastest, and why. `parakit.advise` makes one.

    Parameters
    ----------
    measurements : sequence of Measurement
    parameters : int
        Of the model.
    where : str
        The machine, in words.
    cores : int
        That the layouts share.
    notes : sequence of str
        What a reader should know beside the table.
    stopped : str
        Why it ended before everything was tried once; "" if it did not.

    Raises
    ------
    InputError
        If nothing was measured.
    """

    def __init__(
        self, measurements: Sequence[Measurement], *, parameters: int = 0, where: str = "", cores: int = 1,
        notes: Sequence[str] = (), stopped: str = "",
    ) -> None:  # fmt: skip
        if not measurements:
            raise InputError("There is no advice without a measurement.", remedy="make one with parakit.advise")
        self.measurements = tuple(measurements)
        self.parameters = parameters
        self.where = where
        self.cores = cores
        self.notes = tuple(notes)
        self.stopped = stopped

    @cached_property
    def rows(self) -> tuple[Tried, ...]:
        """All that was tried, the fastest first."""
        groups: dict[Layout, list[Measurement]] = {}
        for measured in self.measurements:
            groups.setdefault(Layout(measured.workers, measured.threads), []).append(measured)
        plain = [mine for layout, mine in groups.items() if not layout.workers]
        rival = max(plain, key=_median_rate, default=[])
        tried = [_tried(layout, mine, rival) for layout, mine in groups.items()]
        return tuple(sorted(tried, key=lambda row: -row.rate.median))

    @property
    def best(self) -> Layout:
        """The fastest; its `workers` are 0 if that is plain PyTorch."""
        return self.rows[0].layout

    @property
    def options(self) -> dict[str, int]:
        """The fastest layout of parakit, for `parakit.train(..., **advice.options)`; empty if none was measured."""
        row = self._fastest(of_parakit=True)
        return {} if row is None else {"workers": row.layout.workers, "threads": row.layout.threads}

    @property
    def sentence(self) -> str:
        """What is fastest, and why."""
        ours, plain = self._fastest(of_parakit=True), self._fastest(of_parakit=False)
        if ours is None or plain is None:
            lacking = "plain PyTorch" if plain is None else "parakit"
            return f"{self.best}: the fastest that was tried, but {lacking} could not be measured."
        over = ours.over_plain
        if over.low <= 1 <= over.high:
            return (
                f"{ours.layout} and {plain.layout} are as fast as each other, as far as can be told "
                f"({between(times(over.low), times(over.high))} times): {self._costs(ours)}."
            )
        if over.median > 1:
            return (
                f"{ours.layout}: {times(over.median)} times plain PyTorch, whose best is "
                f"{many(plain.layout.threads, 'thread')}; {self._costs(ours)}."
            )
        return f"{plain.layout}: {times(1 / over.median)} times {ours.layout}; {self._why_not(ours)}."

    def _fastest(self, *, of_parakit: bool) -> Tried | None:
        return next((row for row in self.rows if bool(row.layout.workers) == of_parakit), None)

    def _costs(self, row: Tried) -> str:
        if row.layout.workers == 1:
            return f"control between segments costs {_percent(row.control)} of the time"
        return f"exchange costs {_percent(row.exchange)} of a step, waiting {_percent(row.waiting)}"

    def _why_not(self, row: Tried) -> str:
        """Why the fastest layout of parakit is slower than plain PyTorch."""
        lost = row.exchange + row.waiting + row.control
        if self.cores == 1:
            return "there is one core, so no two processes compute at the same time"
        small = f"the model and batch are so small that a step takes {1e3 * row.step_seconds:.2g} ms"
        if row.step_seconds < _SHORT_SECONDS and lost > _MUCH:
            return f"{small}, of which {_percent(lost)} go into exchange, waiting and control"
        if row.layout.workers == 1:  # it exchanges nothing, and waits for nobody
            if row.step_seconds < _SHORT_SECONDS:
                return f"{small}, and what parakit does beside torch shows"
            control = f"{_percent(row.control)} of the time for control between segments"
            return f"one process does this work better than several, and that of parakit needs {control}"
        reasons = {
            f"exchanging {_short(self.parameters)} parameters takes {_percent(row.exchange)} of a step": row.exchange,
            f"processes wait for each other for {_percent(row.waiting)} of a step": row.waiting,
            f"control between segments takes {_percent(row.control)} of the time": row.control,
        }  # fmt: skip
        reason = max(reasons, key=lambda reason: reasons[reason])
        return reason if reasons[reason] > _MUCH else "one process does this work better than several"

    # --- showing

    def _cells(self) -> list[list[str]]:
        return [
            [
                str(row.layout), rate(row.rate.median), between(rate(row.rate.low), rate(row.rate.high)),
                times(row.over_plain.median), f"{1e3 * row.step_seconds:.3g}",
                *(_percent(part) if row.layout.workers else DASH for part in (row.exchange, row.waiting, row.control)),
            ]
            for row in self.rows
        ]  # fmt: skip

    def _remarks(self) -> list[str]:
        blocks = max(measured.block for measured in self.measurements) + 1
        told = [f"On: {self.where}."] if self.where else []
        told.append(f"Interleaved, {many(blocks, 'block')}; medians and quartiles, ratios within blocks.")
        if self.stopped:
            told.append(f"Incomplete: {self.stopped}")
        return [*told, *self.notes]

    def __repr__(self) -> str:
        heads = ["", "samples/s", "quartiles", "/plain", "ms", "exchange", "idle", "control"]
        return text_table(self.sentence, heads, self._cells(), self._remarks(), left=True)

    def _repr_html_(self) -> str:
        """The sentence and the table, for a notebook."""
        heads = [
            "layout", "samples per second, median", "quartiles of samples per second",
            "rate over the best of plain PyTorch", "ms a step", "exchange", "waiting", "control",
        ]  # fmt: skip
        table = html_table("What was tried, the fastest first", heads, self._cells(), self._remarks())
        return f"<p><strong>{html.escape(self.sentence)}</strong></p>{table}"


def _tried(layout: Layout, mine: list[Measurement], rival: list[Measurement]) -> Tried:
    shares = np.zeros(len(PHASES) + 1)
    if layout.workers:
        shares = np.median([_shares(measured) for measured in mine], axis=0)
    named = dict(zip((*PHASES, "control"), shares.tolist(), strict=True))
    seconds = float(np.median([measured.seconds / measured.steps for measured in mine]))
    return Tried(
        layout, spread_of(m.rate for m in mine), ratio(mine, rival), seconds,
        named["exchange"], named["idle"], named["control"],
    )  # fmt: skip


def _shares(measured: Measurement) -> list[float]:
    """Shares of the time by phase; what remains of whole segments is control."""
    shares = [phase * measured.steps / measured.seconds for phase in measured.breakdown]
    return [*shares, max(0.0, 1 - sum(shares))]


def _median_rate(mine: list[Measurement]) -> float:
    return float(np.median([measured.rate for measured in mine]))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or not share else "< 1 %"


def _short(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
