"""The archive of studies: to JSON and back, to a file, and to a data frame.

Owns the format; what is read is checked value by value, as a file may come from anywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parakit.errors import InputError
from parakit.events.history import History
from parakit.events.reader import Reader, parse
from parakit.events.records import PHASES, Event, StepDone
from parakit.scaling.study.records import About, Measurement
from parakit.system.files import write_whole
from parakit.validation import brief

if TYPE_CHECKING:
    import pandas

__all__ = ["frame", "pack", "read", "unpack", "write"]

_FORMAT = "parakit scaling study"
_VERSION = 2  # 1 had no flags for simulated workers and workers in turns: their pool's name told
_READABLE = (1, _VERSION)


def pack(
    measurements: Sequence[Measurement], about: About, histories: Sequence[History], stopped: str, notes: Sequence[str]
) -> dict[str, Any]:
    """A study as plain values."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "about": asdict(about),
        "measurements": [asdict(measured) for measured in measurements],
        "stopped": stopped,
        "notes": list(notes),
        "histories": [history.to_dicts() for history in histories],
    }


def unpack(text: str) -> dict[str, Any]:
    """What `pack` was given, from JSON; by the same names.

    Raises
    ------
    InputError
        If the text is no such study, or holds values that cannot be.
    """
    values = parse(text, "study")
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise InputError(f"This JSON is no study: {brief(values)}", remedy="give what study.to_json() wrote")
    if values.get("version") not in _READABLE or type(values["version"]) is not int:
        raise InputError(
            f"This study is of version {brief(values.get('version'))}; this parakit reads versions 1 to {_VERSION}.",
            remedy="use the parakit that wrote it, or measure again",
        )
    wrong = [name for name in ("measurements", "notes", "histories") if not isinstance(values.get(name), list)]
    if wrong:
        raise InputError(f"This study has no list of {', '.join(wrong)}.", cause="a file that was changed")
    values = _upgraded(values)
    if not isinstance(values.get("stopped"), str):
        raise InputError(f"stopped of a study is {brief(values.get('stopped'))}; it must be a text.")
    strange = next((note for note in values["notes"] if not isinstance(note, str)), None)
    if strange is not None:
        raise InputError(f"notes of a study hold {brief(strange)}; each must be a text.")
    return {
        "measurements": [_RECORDS.record(Measurement, record) for record in values["measurements"]],
        "about": _RECORDS.record(About, values.get("about")),
        "histories": [_history(records) for records in values["histories"]],
        "stopped": values["stopped"],
        "notes": values["notes"],
    }


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A study of an older version as the present one has it."""
    about = values.get("about")
    if values["version"] == _VERSION or not isinstance(about, dict):
        return values
    pool = str(about.get("pool"))
    flags = {"simulated": pool.startswith("simulated"), "in_turns": pool.startswith("inline")}
    told = {"simulated": flags["simulated"], "exchange": "in turns" if flags["in_turns"] else ""}
    histories = [
        [told | event if isinstance(event, dict) and event.get("kind") == "RunStart" else event for event in events]
        if isinstance(events, list) else events
        for events in values["histories"]
    ]  # fmt: skip
    return values | {"version": _VERSION, "about": flags | about, "histories": histories}


def _history(records: Any) -> History:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"A history is a list of events, not {brief(records)}.")
    history = History.from_dicts(records)
    for event in history:
        _check_event(event)
    return history


def _check_event(event: Event) -> None:
    """Refuse what no run can have told, and what a cost model would divide by."""
    kind = type(event).__name__
    if not abs(event.at_seconds) <= _LARGEST:
        raise InputError(f"{kind}.at_seconds of a study is {brief(event.at_seconds)}; it must be finite.")
    for name in _EVENT_FIELDS:
        value = getattr(event, name, None)
        least = 0 if name in _MAY_BE_0 else 1
        each = value if isinstance(value, tuple) else (value,) if value is not None else ()
        if any(not (isinstance(number, int | float) and least <= number <= _LARGEST) for number in each):
            raise InputError(f"{kind}.{name} of a study is {brief(value)}; it must be at least {least}, and finite.")
    parts = event.workers if isinstance(event, StepDone) else ()
    if isinstance(event, StepDone) and not parts:
        raise InputError("StepDone.workers of a study is empty; each step has the account of a worker.")
    if any(not 0 <= value <= _LARGEST for part in parts for value in (*part.seconds(), part.samples)):
        raise InputError(
            f"StepDone.workers of a study has {brief(parts)}; seconds and samples must be at least 0, and finite."
        )


def _wrong_fields(kind: type[Any], values: Any) -> InputError:
    found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
    names = ", ".join(field.name for field in fields(kind))
    return InputError(
        f"A {kind.__name__} of a study has {names}; this one has {found[:200]}.",
        cause="the file was written by something else, or by another version of parakit",
    )


def _wrong_value(name: str, value: Any, _: Any) -> InputError:
    return InputError(f"{name} of a study cannot be {brief(tuple(value) if isinstance(value, list) else value)}.")


_RECORDS = Reader(_wrong_fields, _wrong_value)


def _place(path: Any) -> Path:
    """The place that a path names; refuses what is none."""
    given = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(given, str) or not given or "\0" in given:
        raise InputError(
            f"path is {brief(path)}; it must be the name of a file, without NUL characters.",
            remedy='such as "study.json"',
        )
    return Path(given)


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Put JSON into a file, which is whole at any moment.

    Raises
    ------
    InputError
        If the name does not end in .json, its folder does not exist, or the file cannot be written.
    """
    place = _place(path)
    if place.suffix.lower() != ".json":
        raise InputError(
            f"A study cannot be saved as {place.name!r}: its name must end in .json.",
            remedy="study.save('study.json'); for a table, study.to_frame().to_csv('study.csv')",
        )
    if not place.parent.is_dir():
        raise InputError(f"There is no folder {str(place.parent)!r} to save {place.name!r} in.")
    try:
        write_whole(place, text)
    except OSError as error:
        raise InputError(
            f"The study cannot be written to {brief(str(place))}: {type(error).__name__}: {error.strerror}."
        ) from error
    return place


def read(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    place = _place(path)
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"No study can be read from {brief(str(place))}: {type(error).__name__}.") from error


# Of events: what must be at least 1 where an event has it, and what may also be 0.
_MAY_BE_0 = ("samples", "parameters", "seconds", "control_seconds", "commit_seconds", "step")
_EVENT_FIELDS = ("cores", "threads_per_worker", "batch_size", "world_size", "chunks", *_MAY_BE_0)
_LARGEST = 1e300

_COLUMNS = [
    "workers", "repeat", "block", "rate", "step_seconds", "steps", "seconds", "at_seconds", "kind", "threads", "cores",
    "simulated", *(f"{phase}_seconds" for phase in PHASES),
]  # fmt: skip


def frame(measurements: Sequence[Measurement]) -> pandas.DataFrame:
    """Measurements as a pandas data frame, a row each."""
    import pandas  # half a second, which few need

    return pandas.DataFrame(list(map(_flat, measurements)), columns=list(_COLUMNS))


def _flat(measured: Measurement) -> dict[str, Any]:
    phases = measured.phases
    values = {name: value for name, value in asdict(measured).items() if name != "breakdown"}
    return values | {f"{phase}_seconds": phases.get(phase, math.nan) for phase in PHASES}
