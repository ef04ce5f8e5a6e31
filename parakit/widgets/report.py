"""What a panel says: the same facts as its picture, in words and a small table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from operator import itemgetter

from parakit.events.records import PHASES, Resized, StepDone, baseline_name
from parakit.events.summary import UNCERTAIN_SPREAD, RunSummary
from parakit.formatting import DASH, columns, many, three_digits, unit_of
from parakit.runs.run import Run
from parakit.workers.pool import Workers

__all__ = [
    "as_html",
    "headline",
    "is_over",
    "last_words",
    "log_html",
    "remarks_on",
    "summary_html",
    "summary_text",
    "table_rows",
]

HEADINGS = ("workers", "samples per second", "speedup", "efficiency", "vs plain")
_SHORT_HEADINGS = ("workers", "samples/s (quartiles)", "speedup", "efficiency", "vs plain")
_MEANING = (
    "samples per second: median (quartiles); speedup: over 1 worker of this run; efficiency: speedup over workers; "
    "vs plain: relative to plain PyTorch in one process with all cores or one GPU, at the best of its measurements"
)
_SHORT_MEANING = (
    "samples/s: samples per second, median (quartiles)",
    "speedup: over 1 worker of this run",
    "efficiency: speedup over workers",
    "vs plain: relative to plain PyTorch in one process with all cores or one GPU, at the best of its measurements",
)
_CROWDED = "*"
_SHORT_RIVAL, _UNSURE = "plain", "?"
_WIDTH = 78  # of a plain text: more is broken within words by narrow windows
_ROW_EM = 1.75
_COLUMN_EM = (12.5, 15.5, 5.5, 6.0, 5.5)  # as wide as what comes, so that a first row moves nothing


def is_over(run: Run | None) -> bool:
    """Whether a run has ended, well or not; False where there is none."""
    return run is not None and run.status in ("finished", "failed")


def remarks_on(pool: Workers) -> list[str]:
    """What people should know about a pool before they judge its speed."""
    if pool.in_turns:
        return ["Virtual workers compute one after the other in this process: their number does not change the speed."]
    if pool.cores == 1:
        one = f"There is 1 {unit_of(pool.device)} here, which all workers share"
        return [f"{one}: more of them cannot be faster on this machine."]
    return []


def headline(run: Run | None, wanted: int, aside: str = "", *, touring: bool = False) -> str:
    """What the run is doing, and what is requested for but not granted yet."""
    if run is None:
        return "Ready: press Start."
    if is_over(run):
        return last_words(run)
    if run.history.latest(Resized) is None:
        return "Starting: the workers get their data"
    active, paused = run.world_size, run.status == "paused"
    there = f"{many(active, 'worker')} active"
    if wanted != active:
        there = f"{many(wanted, 'worker')} asked for, {active} active"
    if run.measuring:
        return f"Timing plain PyTorch; {'the run is paused' if paused else 'training waits'}: {there}"
    if touring and not paused:
        return f"Visiting every worker count: {active} now, then back to {wanted}"
    return f"{'Paused' if paused else 'Training'}: {there}{aside}"


def last_words(run: Run) -> str:
    """How a run ended, in a line."""
    latest = run.history.latest(StepDone)
    how = "Stopped" if run.stopped_early else run.status.capitalize()
    loss = f", loss {latest.loss:.4g}, {many(run.world_size, 'worker')}" if latest else ""
    return f"{how} after step {run.step:,} of {run.steps:,}{loss}."


def table_rows(summary: RunSummary) -> list[tuple[str, ...]]:
    """A row for each worker count that was visited, and one for plain PyTorch; the cells as text."""
    plain, one = summary.plain, summary.one
    rows: list[tuple[str, ...]] = []
    for count, rate in summary.rates.items():
        rows.append((
            f"{count}{_CROWDED if _crowded(summary, count) else ''}",
            _spread(rate.median, rate.low, rate.high),
            _times(summary.speedup(count)),
            _percent(summary.efficiency(count)),
            _times(rate.median / plain.samples_per_second if plain else math.nan),
        ))  # fmt: skip
    if plain:
        rows.append((
            baseline_name(plain.cores, plain.device) + _UNSURE * summary.uncertain,
            _spread(plain.samples_per_second, plain.low, plain.high),
            _times(plain.samples_per_second / one.median if one else math.nan), "", _times(1.0),
        ))  # fmt: skip
    return rows


def _crowded(summary: RunSummary, count: int) -> bool:
    return summary.crowded_above is not None and count > summary.crowded_above


def _marks(summary: RunSummary) -> list[str]:
    """What the marks in the table mean, as far as there are any."""
    found = []
    if any(_crowded(summary, count) for count in summary.rates):
        found.append(f"{_CROWDED}: more workers than {summary.unit}s")
    if not summary.one or not summary.plain:
        found.append(f"{DASH}: not measured yet")
    if summary.uncertain:
        found.append(f"{_UNSURE}: uncertain, quartiles more than {UNCERTAIN_SPREAD:g} times apart")
    return found


def breakdown_text(summary: RunSummary) -> str:
    """Where the last steps' time went, for all workers together."""
    workers, seconds = summary.shares()
    if not workers or not seconds.sum() > 0:
        return "Time of a step: not measured yet"
    shares = 100 * seconds.sum(axis=0) / seconds.sum()
    return "Time of a step: " + ", ".join(f"{phase} {share:.0f} %" for phase, share in zip(PHASES, shares, strict=True))


def as_html(text: str) -> str:
    """A text for a page, in which no line begins with a sign of per cent."""
    return escape(text).replace(" %", "&nbsp;%")


def summary_html(summary: RunSummary, remarks: Iterable[str] = (), *, rows: int = 0) -> str:
    """Table, breakdown and remarks; with room for so many rows, so that what is below does not jump."""
    cell = f"text-align:right;padding:0 5px;line-height:1.5;height:{_ROW_EM}em"
    head = "".join(
        f'<th scope="col" style="{cell};width:{width}em">{escape(name)}</th>'
        for name, width in zip(HEADINGS, _COLUMN_EM, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f'<td style="{cell}">{as_html(value)}</td>' for value in row) + "</tr>"
        for row in table_rows(summary)
    )
    lines = [_MEANING, "; ".join(_marks(summary)), breakdown_text(summary), *remarks]
    said = "".join(f'<div style="line-height:1.5;min-height:1.5em">{as_html(line)}</div>' for line in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div style="min-height:{_ROW_EM * (1 + rows):g}em">{table}</div>{said}'


def log_html(lines: Sequence[tuple[float, str]]) -> str:
    """What happened, the newest first."""
    items = "".join(f"<li>{at:,.1f} s: {as_html(text)}</li>" for at, text in reversed(_in_order(lines)))
    return f'<ul style="margin:0;padding-left:1.2em;line-height:1.45" aria-label="what happened">{items}</ul>'


def _in_order(lines: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """A log by its times: what the panel says can be there before older events were read."""
    return sorted(lines, key=itemgetter(0))


def summary_text(summary: RunSummary, remarks: Iterable[str], lines: int = 12) -> str:
    """The whole report as plain text in short lines, for the place of a panel that has ended."""
    table = _text_table(summary)
    happened = [_wrapped(text, f"{at:7.1f} s  ") for at, text in _in_order(summary.log)[-lines:]]
    meaning = map(_wrapped, (*_SHORT_MEANING, *_marks(summary)))
    parts = [*map(_wrapped, remarks), "", *([*table, *meaning] if len(table) > 1 else []),
             _wrapped(breakdown_text(summary)), "What happened:", *happened]  # fmt: skip
    return "\n".join(parts)


def _text_table(summary: RunSummary) -> list[str]:
    rows = [_SHORT_HEADINGS, *table_rows(summary)]
    if summary.plain:
        rows[-1] = (_SHORT_RIVAL + _UNSURE * summary.uncertain, *rows[-1][1:])
    return columns(rows)


def _wrapped(text: str, label: str = "") -> str:
    """A text in lines that are short enough, each line of it for itself; a label stands before the first."""
    held = text.replace(" %", "\u00a0%")
    lines = [
        textwrap.fill(line, _WIDTH, initial_indent=label if place == 0 else " " * len(label),
                      subsequent_indent=" " * len(label), break_on_hyphens=False)
        for place, line in enumerate(held.splitlines() or [""])
    ]  # fmt: skip
    return "\n".join(lines).replace("\u00a0%", " %")


def _spread(median: float, low: float, high: float) -> str:
    """Median and quartiles of a rate."""
    return f"{three_digits(median)} ({three_digits(low)} to {three_digits(high)})"


def _times(value: float) -> str:
    return f"{value:.2f}×" if math.isfinite(value) else DASH


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else DASH
