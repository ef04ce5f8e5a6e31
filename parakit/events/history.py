"""The history of a run: its events in order, bounded, readable from any thread.

Past its capacity the older half of the step records is thinned, so that a run of any length keeps its whole course at a
resolution that fades with age.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError
from parakit.events.reader import event_from_dict, parse
from parakit.events.records import KINDS, PHASES, Event, GradientNorms, SegmentDone, StepDone
from parakit.system.files import write_whole

if TYPE_CHECKING:
    import pandas

__all__ = ["History"]

DEFAULT_CAPACITY = 50_000
_E = TypeVar("_E", bound=Event)


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
        self._kept: dict[type[Event], list[Any]] = {kind: [] for kind in KINDS}

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
        records = parse(text, "history")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise InputError(f"A history is a JSON array of objects, not {text[:80]!r}.")
        return cls.from_dicts(records)

    def to_frame(self) -> pandas.DataFrame:
        """The steps as a pandas data frame, one row a step and worker."""
        import pandas  # half a second, which few need

        return pandas.DataFrame(list(self._rows()), columns=list(self._COLUMNS))

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
