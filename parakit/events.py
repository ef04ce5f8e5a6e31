"""What happened: events as frozen records with units in their names, and the history that keeps them.

Plots, panels and analyses read events and nothing else. An event converts to a plain dict and back. The history is
bounded: past its capacity the older half of the step records is thinned, so that a run of any length keeps its whole
course at a resolution that fades with age.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError
from parakit.export import data_frame, write_whole

if TYPE_CHECKING:
    import pandas

__all__ = [
    "EXCHANGE_WAYS",
    "KINDS",
    "PHASES",
    "PLAIN",
    "Asked",
    "Baseline",
    "EpochEnded",
    "Event",
    "GradientNorms",
    "History",
    "Recovered",
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
]

#: What a baseline of plain PyTorch is called.
PLAIN = "plain PyTorch"
#: Where a worker's time goes in a step, in the order of a step.
PHASES = ("data", "forward", "backward", "exchange", "update", "idle")
#: How gradients are added up: in memory that the workers of a host share, where they may divide the update too; over
#: gloo's connections; by both, within hosts and between them; by tasks; or not at all, where workers take turns in one
#: process.
EXCHANGE_WAYS = (
    "shared memory", "shared memory, divided update", "gloo", "hierarchical", "hierarchical, divided update", "tasks",
    "in turns",
)  # fmt: skip

DEFAULT_CAPACITY = 50_000


@dataclass(frozen=True, slots=True)
class WorkerStep:
    """One worker's part of one step, in seconds.

    ``exchange`` is the time in which gradients travel and are summed; ``idle`` the time spent waiting for a slower
    worker before they can. A worker sees only their sum; the wait is what its sum exceeds the smallest of all
    workers, because the last one to arrive waits for nobody.
    """

    worker: str
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    exchange_seconds: float
    update_seconds: float
    idle_seconds: float
    samples: int

    def seconds(self) -> tuple[float, ...]:
        """The six phases, in the order of `PHASES`."""
        return tuple(getattr(self, f"{phase}_seconds") for phase in PHASES)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes
    ----------
    at_seconds : float
        Since the start of the run.
    """

    at_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A plain dict; ``kind`` names the event."""
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, slots=True)
class RunStart(Event):
    """The run began: what is trained, on what, and how.

    ``exchange`` says how gradients are added up: one of `EXCHANGE_WAYS`, or the algorithm that a simulation prices;
    "" where nobody says. ``simulated`` is true where all times are those of a virtual clock. ``device`` is where the
    workers compute: "cpu", or "cuda", in which case ``cores`` counts GPUs.
    """

    strategy: str
    workers: tuple[str, ...]
    pool: str
    cores: int
    threads_per_worker: int
    parameters: int
    samples: int
    chunks: int
    batch_size: int
    steps: int
    steps_per_epoch: int
    seed: int
    exchange: str = ""
    simulated: bool = False
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One step over one global batch.

    Attributes
    ----------
    step, epoch : int
        Counted from zero.
    loss : float
        Of the global batch, before the update.
    samples : int
        Rows in the global batch.
    seconds : float
        Wall time of the step.
    learning_rate : float
        Of the optimizer's first parameter group, as used in this step.
    world_size, generation : int
        Active workers, and how many times their group has been formed before.
    workers : tuple of WorkerStep
        One record a worker, in the order of their ranks.
    """

    step: int
    epoch: int
    loss: float
    samples: int
    seconds: float
    learning_rate: float
    world_size: int
    generation: int
    workers: tuple[WorkerStep, ...]


@dataclass(frozen=True, slots=True)
class GradientNorms(Event):
    """How much the workers' gradients differ, measured in the first step of a segment with several workers.

    Attributes
    ----------
    step : int
    norms_squared : tuple of float
        Squared 2-norm of each worker's mean gradient over its own samples.
    samples : tuple of int
        Of each.
    global_norm_squared : float
        Of the mean gradient over all of them, before clipping.
    """

    step: int
    norms_squared: tuple[float, ...]
    samples: tuple[int, ...]
    global_norm_squared: float


@dataclass(frozen=True, slots=True)
class SegmentDone(Event):
    """A segment ended and its last step is committed.

    ``seconds`` is its wall time: from the end of the segment before, by the clocks of the workers, or from the order
    to the report where it was ordered later. ``control_seconds`` is what remains of it after the steps: orders, commit
    and report. ``commit_seconds`` is the part of that in which the slowest worker kept its state.
    ``samples`` counts the rows trained on; ``world_size`` and ``generation`` are those of its steps.
    """

    first_step: int
    steps: int
    seconds: float
    control_seconds: float
    commit_seconds: float
    samples: int
    world_size: int
    generation: int


@dataclass(frozen=True, slots=True)
class Asked(Event):
    """A wish was expressed: "resize", "pause", "resume", "stop", "learning rate" or "measure".

    ``value`` is the number of workers, or the learning rate, and None for the other wishes.
    """

    wish: str
    value: int | float | None


@dataclass(frozen=True, slots=True)
class Resized(Event):
    """The group was formed: at the start, and whenever membership changed.

    ``seconds`` is the time the run stood still for it; ``chunks_moved`` counts chunks that a worker had to load;
    ``waited_seconds`` is the time from the wish to the moment the new group was ready (0 without a wish).
    """

    step: int
    generation: int
    workers: tuple[str, ...]
    chunks_moved: int
    seconds: float
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class WorkersLost(Event):
    """Active workers were lost, and the run goes back to its last commit.

    Attributes
    ----------
    workers : tuple of str
        Who is lost; empty where nobody is gone, but the group broke all the same.
    step : int
        Committed steps, from which the run goes on.
    reason : str
        What was seen, in words.
    """

    workers: tuple[str, ...]
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """The run goes on after a loss, on the workers named.

    ``seconds`` is the time from the moment the loss was noticed until the new group was ready; ``chunks_loaded`` counts
    chunks that were loaded again from their source; ``steps_again`` counts steps that were done before and are done
    once more, because the newest state that is left is older than the last commit (0 while any worker has that).
    """

    workers: tuple[str, ...]
    step: int
    seconds: float
    chunks_loaded: int
    steps_again: int


@dataclass(frozen=True, slots=True)
class SlowWorker(Event):
    """A worker computes slower than the others, per sample; ``times`` is relative to their median.

    ``recovered`` is true when it is as fast as the others again.
    """

    worker: str
    times: float
    recovered: bool


@dataclass(frozen=True, slots=True)
class EpochEnded(Event):
    """An epoch ended; the validation figures are None where no validation data was given."""

    epoch: int
    step: int
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Baseline(Event):
    """A rival was measured: how fast the same batches train without parakit.

    Attributes
    ----------
    name : str
        The rival, such as "plain PyTorch".
    cores : int
        Threads of its one process; 1 on a GPU.
    samples_per_second, low, high : float
        Median and quartiles of the rate over the timed steps.
    steps : int
        Timed steps; those of the warm-up are not among them.
    device : str
        Where it computed: "cpu" or "cuda".
    """

    name: str
    cores: int
    samples_per_second: float
    low: float
    high: float
    steps: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Said(Event):
    """A sentence for people, such as why a wish could not be granted."""

    text: str


@dataclass(frozen=True, slots=True)
class RunEnd(Event):
    """The run ended: "finished" or "failed"; ``step`` is the number of committed steps."""

    status: str
    step: int
    reason: str


_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStart,
        StepDone,
        GradientNorms,
        SegmentDone,
        Asked,
        Resized,
        WorkersLost,
        Recovered,
        SlowWorker,
        EpochEnded,
        Baseline,
        Said,
        RunEnd,
    )
}
#: Every kind of event.
KINDS = tuple(_KINDS.values())
_E = TypeVar("_E", bound=Event)
# The plain types whose values may stand in an event, and what a file may hold in their place.
_ACCEPTS: dict[type, tuple[type, ...]] = {
    float: (float, int), int: (int,), str: (str,), bool: (bool,), NoneType: (NoneType,),
}  # fmt: skip


def event_from_dict(record: dict[str, Any]) -> Event:
    """The event that `Event.to_dict` described.

    Raises
    ------
    InputError
        If the record is of no known kind, lacks a field, or holds a value of another type.
    """
    values = dict(record)
    kind = _KINDS.get(str(values.pop("kind", None)))
    if kind is None:
        raise _no_event(record)
    event: Event = _build(kind, values)
    return event


def _no_event(record: Any) -> InputError:
    return InputError(
        f"This record is no parakit event: {str(record)[:200]}",
        cause="the file was written by something else, or by another version of parakit",
    )


def _build(kind: type[Any], values: Any) -> Any:
    """A record of a kind from the values of its fields; what has a default may be missing, as in older files."""
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not isinstance(values, dict) or not needed <= set(values) <= {field.name for field in fields(kind)}:
        raise _no_event(values)
    hints = get_type_hints(kind)
    return kind(**{name: _revive(f"{kind.__name__}.{name}", hints[name], value) for name, value in values.items()})


def _revive(name: str, hint: Any, value: Any) -> Any:
    """The value of a field as the record holds it: JSON knows no tuples, and no records in records."""
    if hint is WorkerStep:
        return _build(WorkerStep, value)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_revive(name, get_args(hint)[0], part) for part in value)
    plain_kinds = () if get_origin(hint) is tuple else get_args(hint) or (hint,)
    allowed = {accepted for plain in plain_kinds for accepted in _ACCEPTS[plain]}
    if type(value) not in allowed:
        raise InputError(f"{name} cannot be {value!r}.")
    return value


class History:
    """All events of a run, in order, bounded in memory, readable while the run goes on.

    Parameters
    ----------
    capacity : int
        The most records to keep of each kind of event.
    """

    _STEP_COLUMNS: ClassVar = ("at_seconds", "step", "epoch", "loss", "samples", "seconds", "learning_rate",
                               "world_size", "generation")  # fmt: skip
    _COLUMNS: ClassVar = (*_STEP_COLUMNS, "rank", "worker", *(f"{phase}_seconds" for phase in PHASES),
                          "worker_samples")  # fmt: skip

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 4:
            raise InputError(f"A history needs room for at least 4 records, not {capacity}.")
        self.capacity = capacity
        #: Step records that were thinned out so far.
        self.thinned = 0
        #: Events ever appended, the thinned ones included.
        self.total = 0
        self._lock = threading.Lock()
        self._kept: dict[type[Event], list[Any]] = {kind: [] for kind in _KINDS.values()}

    def append(self, *events: Event) -> None:
        """Add events; safe from any thread."""
        with self._lock:
            for event in events:
                self.total += 1
                kept = self._kept[type(event)]
                kept.append(event)
                if len(kept) > self.capacity:
                    dropped = _thin(kept)
                    self.thinned += dropped if isinstance(event, StepDone) else 0

    def retract(self, step: int) -> None:
        """Take back the records of a step and all after it, because they will be done again."""
        with self._lock:
            self._kept[StepDone] = [done for done in self._kept[StepDone] if done.step < step]
            self._kept[GradientNorms] = [norms for norms in self._kept[GradientNorms] if norms.step < step]
            self._kept[SegmentDone] = [s for s in self._kept[SegmentDone] if s.first_step + s.steps <= step]

    @property
    def steps(self) -> tuple[StepDone, ...]:
        """The step records, in order."""
        with self._lock:
            return tuple(self._kept[StepDone])

    def of(self, kind: type[_E]) -> tuple[_E, ...]:
        """All events of a kind, in order."""
        with self._lock:
            return tuple(self._kept[kind])

    def newer(self, kind: type[_E], after_seconds: float) -> tuple[_E, ...]:
        """The events of a kind that happened later than a moment, in order.

        Parameters
        ----------
        kind : type
        after_seconds : float
            Since the start of the run; an event at this very moment is left out, so a display asks for what came
            after the newest event that it has drawn.
        """
        with self._lock:
            kept = self._kept[kind]
            return tuple(kept[bisect_right(kept, after_seconds, key=_moment) :])

    def latest(self, kind: type[_E]) -> _E | None:
        """The newest event of a kind, or None."""
        with self._lock:
            kept = self._kept[kind]
            return kept[-1] if kept else None

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """Loss of every kept step, in order; float64, (steps,)."""
        return np.array([step.loss for step in self.steps], np.float64)

    def __iter__(self) -> Iterator[Event]:
        with self._lock:
            everything = [event for kept in self._kept.values() for event in kept]
        return iter(sorted(everything, key=lambda event: event.at_seconds))

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._kept.values()))

    def to_dicts(self) -> list[dict[str, Any]]:
        """Every event as a plain dict, in the order of time."""
        return [event.to_dict() for event in self]

    def to_json(self) -> str:
        """The events as a JSON array; numbers that are not finite are written as NaN and Infinity."""
        return json.dumps(self.to_dicts())

    @classmethod
    def from_dicts(cls, records: list[dict[str, Any]], capacity: int = DEFAULT_CAPACITY) -> History:
        """The history that `to_dicts` described."""
        history = cls(capacity)
        history.append(*(event_from_dict(record) for record in records))
        return history

    @classmethod
    def from_json(cls, text: str) -> History:
        """The history that `to_json` wrote.

        Raises
        ------
        InputError
            If the text is no JSON array of events.
        """
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"This text is no JSON: {error}.") from error
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise InputError(f"A history is a JSON array of objects, not {text[:80]!r}.")
        return cls.from_dicts(records)

    def to_frame(self) -> pandas.DataFrame:
        """The steps as a pandas data frame, one row a step and worker.

        Raises
        ------
        ParakitError
            If pandas is not installed.
        """
        return data_frame(self._rows(), self._COLUMNS, otherwise="history.to_dicts()")

    def to_csv(self) -> str:
        """The steps as comma-separated values: the rows and columns of `to_frame`, below a line of their names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._COLUMNS)
        writer.writerows(self._rows())
        return text.getvalue()

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """One row a step and worker, with a value for each of the columns."""
        for step in self.steps:
            shared = tuple(getattr(step, name) for name in self._STEP_COLUMNS)
            for rank, part in enumerate(step.workers):
                yield (*shared, rank, part.worker, *part.seconds(), part.samples)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the history to a file: every event as JSON, or the steps as comma-separated values.

        The file is whole at any moment: an older one is replaced once the new one is written.

        Parameters
        ----------
        path : str or path
            Ends in ".json" or ".csv", which chooses the format.

        Returns
        -------
        Path
            Where it was written.

        Raises
        ------
        InputError
            If the path ends in something else, or its folder does not exist.
        """
        place = Path(path)
        writers = {".json": self.to_json, ".csv": self.to_csv}
        write = writers.get(place.suffix.lower())
        if write is None:
            raise InputError(
                f"A history cannot be saved as {place.name!r}: its name must end in .json or .csv.",
                remedy="history.save('run.json') keeps every event, history.save('run.csv') the steps as a table",
            )
        if not place.parent.is_dir():
            raise InputError(f"There is no folder {str(place.parent)!r} to save {place.name!r} in.")
        write_whole(place, write())
        return place

    def __repr__(self) -> str:
        steps = self.steps
        if not steps:
            return "<History: no step yet>"
        sizes = sorted({step.world_size for step in steps})
        return (
            f"<History: {steps[-1].step + 1} steps, loss {steps[0].loss:.4g} to {steps[-1].loss:.4g}, "
            f"world sizes {', '.join(map(str, sizes))}, {len(self)} events kept>"
        )


_moment = attrgetter("at_seconds")


def _thin(records: list[Any]) -> int:
    """Drop half of the older half, leaving the rest evenly spaced from the very first on; returns how many."""
    half = len(records) // 2
    places = np.array([r.step if isinstance(r, StepDone) else r.at_seconds for r in records[:half]], np.float64)
    wanted = np.linspace(places[0], places[-1], max(1, half // 2))
    spared = sorted({0, *np.searchsorted(places, wanted).tolist()})
    records[:half] = [records[index] for index in spared]
    return half - len(spared)
