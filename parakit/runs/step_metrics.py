"""Metrics of steps: what the members of a group report of a segment, as events, and the pace that follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from parakit.data.chunks import EpochOrder
from parakit.engines.account import EXCHANGE, StepRecord
from parakit.events.history import History
from parakit.events.records import GradientNorms, SegmentDone, StepDone, WorkerStep
from parakit.events.stragglers import Stragglers
from parakit.pacing import Pace
from parakit.workers.session import Report

__all__ = ["StepMetrics", "gradient_norms", "steps_done"]


class StepMetrics:
    """What was done in the segments of a run, one after another.

    Parameters
    ----------
    order : EpochOrder
    history : History
        Gets the events.
    """

    def __init__(self, order: EpochOrder, history: History) -> None:
        self._order = order
        self._history = history
        self._stragglers = Stragglers()
        self._ended = 0.0  # when the last segment did
        #: How long a segment is to be, by those so far.
        self.pace = Pace()

    def take(
        self, report: Report, labels: Sequence[str], generation: int, ordered: float, reported: float, news: float
    ) -> None:
        """Note what was done in a segment.

        Reports come late where this process is busy. That costs no time while members go on with what was ordered
        ahead, so their own clocks tell then how long a segment took.

        Parameters
        ----------
        report : Report
        labels : sequence of str
            Names of the active workers.
        generation : int
        ordered, reported : float
            When, in seconds since the start of the run.
        news : float
            How old they may be, in seconds.
        """
        began = max(ordered, self._ended) if report.seconds is None else self._ended
        seconds = reported - began if report.seconds is None else report.seconds
        self._ended = ended = min(reported, began + seconds)
        steps = steps_done(report, labels, self._order, generation, began, ended)
        done = _segment_done(report, steps, ended, seconds, len(labels), generation)
        self.pace.learn(report.steps, sum(step.seconds for step in steps), done.control_seconds, news)
        self._history.append(*steps, *gradient_norms(report, ended), done)
        self._history.append(*self._stragglers.look(steps))


def _segment_done(
    report: Report, steps: Sequence[StepDone], ended: float, seconds: float, world_size: int, generation: int
) -> SegmentDone:
    # Of whoever was busy longest; the slowest of each step together may be more than the segment.
    busy = max(sum(record.wall_seconds for record in records) for records in report.records)
    return SegmentDone(
        ended, steps[0].step, len(steps), seconds, max(0.0, seconds - busy), report.commit_seconds,
        sum(step.samples for step in steps), world_size, generation,
    )  # fmt: skip


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
