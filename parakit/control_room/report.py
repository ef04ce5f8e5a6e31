"""What a panel says: the same facts as its picture, in words and a small table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from parakit.course import Course
from parakit.events import PHASES, StepDone
from parakit.progress import many, rival_name, three_digits
from parakit.run import Run

__all__ = ["headline", "last_words", "log_html", "summary_html", "summary_text", "table_rows"]

HEADINGS = ("workers", "samples per second", "speedup", "efficiency", "against plain")
_MEANING = (
    "samples per second: median (quartiles); speedup: over 1 worker of this run; efficiency: speedup over workers; "
    "against plain: relative to plain PyTorch in one process with all cores, at the best of its measurements"
)
_NOT_MEASURED = "not measured yet"


def headline(run: Run | None, wanted: int, aside: str = "") -> str:
    """What the run is doing, and what is wished for but not granted yet."""
    if run is None:
        return "Ready: press Start."
    if run.status in ("finished", "failed"):
        return last_words(run)
    active = run.world_size
    there = f"{many(active, 'worker')} active"
    if wanted != active:
        there = f"{many(wanted, 'worker')} asked for, {active} active"
    return f"{'Paused' if run.status == 'paused' else 'Training'}: {there}{aside}"


def last_words(run: Run) -> str:
    """How a run ended, in a line."""
    latest = run.history.latest(StepDone)
    how = "Stopped" if run.stopped_early else run.status.capitalize()
    loss = f", loss {latest.loss:.4g}, {many(run.world_size, 'worker')}" if latest else ""
    return f"{how} after step {run.step} of {run.steps}{loss}."


def table_rows(course: Course) -> list[tuple[str, ...]]:
    """A row for each worker count that was visited, and one for plain PyTorch; the cells as text."""
    plain, one = course.plain, course.one
    rows: list[tuple[str, ...]] = []
    for count, rate in course.rates.items():
        crowded = course.crowded_above is not None and count > course.crowded_above
        rows.append((
            f"{count}{' (more than cores)' if crowded else ''}",
            _spread(rate.median, rate.low, rate.high),
            _times(course.speedup(count)),
            _percent(course.efficiency(count)),
            _times(rate.median / plain.samples_per_second if plain else math.nan),
        ))  # fmt: skip
    if plain:
        rows.append((
            rival_name(plain.cores),
            _spread(plain.samples_per_second, plain.low, plain.high),
            _times(plain.samples_per_second / one.median if one else math.nan), "", _times(1.0),
        ))  # fmt: skip
    return rows


def breakdown_text(course: Course) -> str:
    """Where the last steps' time went, for all workers together."""
    workers, seconds = course.shares()
    if not workers or not seconds.sum() > 0:
        return ""
    shares = 100 * seconds.sum(axis=0) / seconds.sum()
    return "Time of the last steps: " + ", ".join(
        f"{phase} {share:.0f} %" for phase, share in zip(PHASES, shares, strict=True)
    )


def summary_html(course: Course, remarks: Iterable[str] = ()) -> str:
    """Table, breakdown and remarks."""
    cell = 'style="text-align:right;padding:1px 7px;white-space:nowrap"'
    head = "".join(f'<th scope="col" {cell}>{escape(name)}</th>' for name in HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td {cell}>{escape(value)}</td>" for value in row) + "</tr>" for row in table_rows(course)
    )
    lines = [line for line in (_MEANING, breakdown_text(course), *remarks) if line]
    said = "".join(f'<div style="line-height:1.5">{escape(line)}</div>' for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{said}"


def log_html(lines: Sequence[tuple[float, str]]) -> str:
    """What happened, the newest first."""
    items = "".join(f"<li>{at:,.1f} s: {escape(text)}</li>" for at, text in reversed(lines))
    return f'<ul style="margin:0;padding-left:1.2em;line-height:1.45" aria-label="what happened">{items}</ul>'


def summary_text(course: Course, remarks: Iterable[str], lines: int = 12) -> str:
    """The whole report as plain text, for the place of a panel that has ended."""
    rows = [HEADINGS, *table_rows(course)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    table = ["  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)) for row in rows]
    happened = [f"  {at:8.1f} s  {text}" for at, text in list(course.log)[-lines:]]
    parts = [*remarks, "", *(["\n".join(table), *_MEANING.split("; ")] if len(rows) > 1 else []),
             breakdown_text(course), "What happened:", *happened]  # fmt: skip
    return "\n".join(parts)


def _spread(median: float, low: float, high: float) -> str:
    """Median and quartiles of a rate."""
    return f"{three_digits(median)} ({three_digits(low)} to {three_digits(high)})"


def _times(value: float) -> str:
    return f"{value:.2f} times" if math.isfinite(value) else _NOT_MEASURED


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else _NOT_MEASURED
