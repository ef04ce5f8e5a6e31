"""Records and tables between memory and files: typed records from JSON, whose values are checked, and data frames.

Owns the one reader of records, for events as for studies. What is read may come from anywhere, so nothing is taken that
a record could not have held. Refuses to know what the values mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from parakit.errors import InputError
from parakit.events.records import KINDS, Event

__all__ = ["Reader", "event_from_dict", "parse"]

# The plain types whose values may stand in a record, and what a file may hold in their place.
_ACCEPTS: dict[type, tuple[type, ...]] = {
    float: (float, int), int: (int,), str: (str,), bool: (bool,), NoneType: (NoneType,),
}  # fmt: skip
R = TypeVar("R")
_KINDS = {kind.__name__: kind for kind in KINDS}
#: Kinds as older files call them: the present name, and the present names of fields.
_FORMER = {"Asked": ("Requested", {"wish": "request"})}


@dataclass(frozen=True)
class Reader:
    """Makes frozen records from the values of their fields, as JSON has them.

    Parameters
    ----------
    wrong_fields : callable
        The error for a kind of record, and values that lack a field or have another.
    wrong_value : callable
        The error for a field by its full name, its value, and the part of it that is of another type.
    older : bool
        Whether fields that have a default may be missing, as in older files.
    """

    wrong_fields: Callable[[type[Any], Any], InputError]
    wrong_value: Callable[[str, Any, Any], InputError]
    older: bool = False

    def record(self, kind: type[R], values: Any) -> R:
        """A record of a kind; raises the errors that were given."""
        hints, needed = _fields_of(kind)  # type: ignore[arg-type]  # every type can be hashed
        if not isinstance(values, dict) or not (needed if self.older else set(hints)) <= set(values) <= set(hints):
            raise self.wrong_fields(kind, values)
        return kind(**{n: self._value(f"{kind.__name__}.{n}", hints[n], value, value) for n, value in values.items()})

    def _value(self, name: str, hint: Any, value: Any, whole: Any) -> Any:
        """The value of a field as the record holds it: JSON knows no tuples, and no records in records."""
        if isinstance(hint, type) and is_dataclass(hint):
            return self.record(hint, value)
        if get_origin(hint) is tuple and isinstance(value, list | tuple):
            return tuple(self._value(name, get_args(hint)[0], part, whole) for part in value)
        plain_kinds = () if get_origin(hint) is tuple else get_args(hint) or (hint,)
        if type(value) not in {accepted for plain in plain_kinds for accepted in _ACCEPTS[plain]}:
            raise self.wrong_value(name, whole, value)
        return value


@cache
def _fields_of(kind: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of all fields by their names, and the names of those without a default."""
    hints = get_type_hints(kind)
    needed = frozenset(field.name for field in fields(kind) if field.default is MISSING)
    return {field.name: hints[field.name] for field in fields(kind)}, needed


def event_from_dict(record: dict[str, Any]) -> Event:
    """The event that `Event.to_dict` described.

    Raises
    ------
    InputError
        If the record is of no known kind, lacks a field, or holds a value of another type.
    """
    values = dict(record)
    name = str(values.pop("kind", None))
    if name in _FORMER:
        name, fields_then = _FORMER[name]
        values = {fields_then.get(field, field): value for field, value in values.items()}
    kind = _KINDS.get(name)
    if kind is None:
        raise _no_event(Event, record)
    return _EVENTS.record(kind, values)


def _no_event(_: type[Any], record: Any) -> InputError:
    return InputError(
        f"This record is no parakit event: {str(record)[:200]}",
        cause="the file was written by something else, or by another version of parakit",
    )


_EVENTS = Reader(_no_event, lambda name, _, part: InputError(f"{name} cannot be {part!r}."), older=True)


def parse(text: str, what: str) -> Any:
    """The value that a JSON text holds.

    Raises
    ------
    InputError
        If the text is no JSON, or nested too deeply to be what it is to be.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(
            f"This JSON is nested too deeply to be a {what}.", cause="a damaged or hostile file"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"This text is no JSON: {error}.") from error
