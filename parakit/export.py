"""Handing records on to others: files that are whole at any moment, and pandas data frames."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parakit.errors import ParakitError

if TYPE_CHECKING:
    import pandas

__all__ = ["data_frame", "write_whole"]


def data_frame(rows: Iterable[Any], columns: Sequence[str], *, otherwise: str) -> pandas.DataFrame:
    """Rows as a pandas data frame.

    Parameters
    ----------
    rows : iterable
    columns : sequence of str
    otherwise : str
        What serves without pandas.

    Raises
    ------
    ParakitError
        If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ParakitError(
            "A data frame needs pandas, which is not installed here.",
            remedy=f"pip install pandas, or use {otherwise}",
        ) from error
    return pandas.DataFrame(list(rows), columns=list(columns))


def write_whole(place: Path, text: str) -> None:
    """Put a text into a file at once: it is written beside, and then takes the file's place."""
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(text.encode("utf-8"))
        beside.replace(place)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
