"""Files that are whole at any moment."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

__all__ = ["write_whole"]


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
