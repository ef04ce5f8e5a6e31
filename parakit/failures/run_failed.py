"""Failed runs in words: what was raised, by which line of the user's own code, in which step and over which rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from parakit.errors import RunFailed
from parakit.failures.source_lines import Place, listing

__all__ = ["Raised", "code_failure"]

_SHOWN_ROWS = 6


class Raised(Protocol):
    """What is known of an error that user's code raised, or parakit's.

    Attributes
    ----------
    error, text : str
        Its type, and its message.
    places : tuple of Place
    ours : bool
        Whether parakit's own code raised it, and no code of the user's was on the way.
    in_parts : bool
        Whether it is a `ParakitError`, whose message says what is the case, where, why, and what to do.
    """

    @property
    def error(self) -> str:
        """See above."""

    @property
    def text(self) -> str:
        """See above."""

    @property
    def places(self) -> tuple[Place, ...]:
        """See above."""

    @property
    def ours(self) -> bool:
        """See above."""

    @property
    def in_parts(self) -> bool:
        """See above."""


def code_failure(fact: str, raised: Raised, rows: Sequence[int], remedy: str) -> RunFailed:
    """The error for a run whose step raised one.

    Parameters
    ----------
    fact : str
        What failed, and where.
    raised : Raised
    rows : sequence of int
        Of the data, that the step was about; none if they are not known.
    remedy : str
        Unless there is a better one.
    """
    if raised.in_parts:
        first, where, cause, own_remedy = _parts_of(raised.text)
        return RunFailed(f"{fact}: {first}", where=where, cause=cause, remedy=own_remedy or remedy)
    told = f"{fact}: {raised.error}: {raised.text}{_in_words(rows)}"
    if raised.ours:
        return RunFailed(
            told, cause="a mistake in parakit itself: no code of yours was on the way",
            remedy="please report it, with this message",
        )  # fmt: skip
    failed = RunFailed(
        told, where=listing(raised.places),
        cause="the model, the loss or the optimizer raised this error in its own code", remedy=remedy,
    )  # fmt: skip
    failed.rows = tuple(int(row) for row in rows)
    return failed


def _in_words(rows: Sequence[int]) -> str:
    if not len(rows):
        return ""
    shown = ", ".join(str(int(row)) for row in rows[:_SHOWN_ROWS])
    more = len(rows) - _SHOWN_ROWS
    return f" (rows {shown} of the data)" if more <= 0 else f" (rows {shown} and {more} others of the data: error.rows)"


def _parts_of(text: str) -> tuple[str, str, str, str]:
    """Fact, places, cause and remedy of a message of parakit's."""
    first, *rest = text.splitlines()
    marks: dict[str, str] = {"Likely cause: ": "", "Remedy: ": ""}
    where = []
    for line in rest:
        mark = next((mark for mark in marks if line.startswith(mark)), None)
        if mark is None:
            where.append(line)
        else:
            marks[mark] = line.removeprefix(mark)
    return first, "\n".join(where), marks["Likely cause: "], marks["Remedy: "]
