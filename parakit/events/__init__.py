"""What happened in a run: records, the history that keeps them, and what can be read from it."""

from parakit.events.history import History
from parakit.events.log import sentence
from parakit.events.reader import event_from_dict
from parakit.events.records import (
    EXCHANGE_WAYS,
    KINDS,
    PHASES,
    PLAIN,
    Baseline,
    EpochEnded,
    Event,
    GradientNorms,
    Recovered,
    Requested,
    Resized,
    RunEnd,
    RunStart,
    Said,
    SegmentDone,
    SlowWorker,
    StepDone,
    WorkersLost,
    WorkerStep,
)

__all__ = [
    "EXCHANGE_WAYS",
    "KINDS",
    "PHASES",
    "PLAIN",
    "Baseline",
    "EpochEnded",
    "Event",
    "GradientNorms",
    "History",
    "Recovered",
    "Requested",
    "Resized",
    "RunEnd",
    "RunStart",
    "Said",
    "SegmentDone",
    "SlowWorker",
    "StepDone",
    "WorkerStep",
    "WorkersLost",
    "event_from_dict",
    "sentence",
]
