"""Accounts of steps: what the members of a group report of a segment, as events."""

from __future__ import annotations

from collections.abc import Sequence

from parakit.data.chunks import EpochOrder
from parakit.engines.account import EXCHANGE, StepRecord
from parakit.events.records import GradientNorms, StepDone, WorkerStep
from parakit.workers.session import Report

__all__ = ["gradient_norms", "steps_done"]


def steps_done(
    report: Report, labels: Sequence[str], order: EpochOrder, generation: int, began: float, ended: float
) -> list[StepDone]:
    """The steps of a segment that lasted from one moment to another, seconds since the start of the run."""
    excerpt = report.excerpt
    if excerpt is not None:
        labels = [labels[rank] for rank in excerpt.ranks]
    steps = []
    at = began + report.commit_seconds
    for place, records in enumerate(zip(*report.records, strict=True)):
        first = records[0]
        seconds = max(record.wall_seconds for record in records)
        at += seconds
        steps.append(
            StepDone(
                min(at, ended),  # the longest of each step may add up to more: whoever is late in one can lead the next
                first.step,
                order.epoch_of(first.step),
                first.loss,
                order.batch_rows(first.step),
                seconds,
                first.learning_rate,
                len(records) if excerpt is None else excerpt.world_size,
                generation,
                _shares(labels, records, excerpt.exchange_seconds[place] if excerpt else None),
            )
        )
    return steps


def gradient_norms(report: Report, at_seconds: float) -> list[GradientNorms]:
    """What the steps of a segment tell of how much the workers' gradients differ; nothing of one worker alone."""
    found = []
    for records in zip(*report.records, strict=True):
        measured = [(record.norms, record.samples) for record in records if record.norms is not None]
        if len(records) > 1 and len(measured) == len(records):
            norms, samples = zip(*measured, strict=True)
            mine, everybodys = zip(*norms, strict=True)
            found.append(GradientNorms(at_seconds, records[0].step, mine, samples, everybodys[0]))
    return found


def _shares(labels: Sequence[str], records: Sequence[StepRecord], exchange: float | None) -> tuple[WorkerStep, ...]:
    """Every worker's account, with the wait for slower ones told apart from the exchange."""
    if exchange is None:
        exchange = min(record.seconds[EXCHANGE] for record in records)
    shares = []
    for label, record in zip(labels, records, strict=True):
        data, forward, backward, waited, update = record.seconds
        shares.append(
            WorkerStep(label, data, forward, backward, exchange, update, waited - exchange, record.samples)
        )  # fmt: skip
    return tuple(shares)
