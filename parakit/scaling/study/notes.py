"""Remarks: what a reader of a scaling study must know beside its table, in words.

Owns the sentences and when each is due; refuses to measure, and to change the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parakit.events.records import PLAIN
from parakit.formatting import many
from parakit.scaling.study.records import About, Measurement, Row, Spread, rival_gain
from parakit.scaling.study.table import about_rivals

__all__ = ["remarks", "title"]

_INLINE = "Inline workers take turns in one process: what they show is the cost of dividing work, and no speedup."
_SIMULATED = "Simulated: times are priced by a cost model, not measured."


class Study(Protocol):
    """As much of a study as remarks are made of: its attributes are those of `Scaling`."""

    @property
    def about(self) -> About: ...
    @property
    def mode(self) -> str: ...
    @property
    def simulated(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    @property
    def stopped(self) -> str: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def measurements(self) -> Sequence[Measurement]: ...
    @property
    def workers(self) -> Sequence[int]: ...
    @property
    def crowded(self) -> Sequence[int]: ...
    @property
    def fits_crowded(self) -> bool: ...
    @property
    def baselines(self) -> dict[str, Spread]: ...
    def row(self, workers: int) -> Row: ...


def title(study: Study) -> str:
    """What was measured, in a line."""
    about = study.about
    batch = f"batch of {about.batch_size:,}" + (" for each worker" if study.mode == "weak" else "")
    strategy = f", {about.strategy}" if about.strategy else ""
    return f"{'Simulated: ' * study.simulated}{study.mode} scaling, {batch}{strategy}"


def remarks(study: Study) -> list[str]:
    """All that must be known to judge a study, in the order in which it is read."""
    return [*_how(study), *_against_plain(study), *_caveats(study), *study.notes]


def _how(study: Study) -> list[str]:
    about, told = study.about, []
    where = "; ".join(part for part in (about.pool, about.machine) if part)
    if where:
        told.append(f"On: {where}.")
    if study.measurements:
        times = max(m.repeat for m in study.measurements) + 1
        told.append(f"{many(times, 'repeat')}; medians and quartiles, speedups within blocks.")
    if rivals := about_rivals(study.baselines):
        told.append(f"In one process: {rivals}.")
    return told


def _against_plain(study: Study) -> list[str]:
    """What the rivals say of each other, and of the workers, where it is not what one hopes for."""
    told = []
    gain = rival_gain(study.measurements)
    if gain.high < 1:  # never where there are no two rivals, whose gain is no number
        few, *_, most = (name.removeprefix(f"{PLAIN}, ") for name in study.baselines)
        told.append(
            f"Plain PyTorch is slower with {most} than with {few}: {gain.median:.2f} times the samples/s. Steps this "
            f"short lose more to threads than they gain: judge workers by {PLAIN} with {few}."
        )
    return [*told, *_beaten([study.row(n) for n in study.workers], study)]


def _beaten(rows: list[Row], study: Study) -> list[str]:
    """A sentence if plain PyTorch is faster than every worker count."""
    if not rows or not study.baselines:
        return []
    rival = max(study.baselines, key=lambda name: study.baselines[name].median)
    best = max(rows, key=lambda row: row.over_plain[rival].median)
    over = best.over_plain[rival]
    if not over.median < 1:
        return []
    surely = "" if over.high < 1 else " by the median, though not in every block"
    return [
        f"P{rival[1:]}, is faster than every worker count here{surely}: {1 / over.median:.2f} times "
        f"{many(best.workers, 'worker')}, the fastest. More work in a step, by a larger batch or model, would give "
        "workers more to share."
    ]


def _caveats(study: Study) -> list[str]:
    about, told = study.about, []
    if study.crowded:
        told.append(f"* more workers than cores ({many(about.cores, 'core')}): they take turns.")
    if study.fits_crowded:
        told.append(
            f"Fits rest on {', '.join(f'{n:,}' for n in study.crowded)} workers too, more than there are cores: they "
            "say what this machine does, not what as many workers with a core each would do."
        )
    if about.in_turns:
        told.append(_INLINE)
    if study.simulated:
        told.append(_SIMULATED)
    lacking = [] if 1 in study.workers else ["one worker"]
    lacking += [] if study.baselines or study.simulated else ["plain PyTorch"]
    if lacking:
        told.append(f"Not measured: {' and '.join(lacking)}.")
    if not study.complete:
        told.append(f"Incomplete: {study.stopped or 'some counts could not be measured'}")
    return told
