"""Where the files of checkpoints are: a folder of this machine, or one that fsspec reaches.

Owns how a file is listed, read, removed, and put in place. A file takes its name only when it is whole and on disk,
because a process may be killed at any moment. What is neither a folder nor a URL that fsspec knows is refused.

Reference: Pillai et al., "All file systems are not created equal", OSDI 2014, section 2: why replacing a file takes a
write, an fsync, a rename, and an fsync of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from parakit.errors import InputError

__all__ = ["Local", "Place", "Remote", "Store", "store_at"]

Place: TypeAlias = str | os.PathLike[str]


class Local:
    """A folder of this machine."""

    def __init__(self, place: str) -> None:
        self.root = Path(place).expanduser()

    def is_file(self) -> bool:
        """Whether the place is one file."""
        return self.root.is_file()

    def prepare(self) -> None:
        """Make the folder if need be."""
        self.root.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Of what is in the folder; none where there is no folder."""
        return [entry.name for entry in self.root.iterdir()] if self.root.is_dir() else []

    def read(self, name: str) -> bytes:
        """A whole file; with no name, the place itself."""
        return (self.root / name).read_bytes()

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.root / name).unlink()

    def write(self, name: str, beside: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file beside, and give it its name once it is on disk."""
        with (self.root / beside).open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        (self.root / beside).replace(self.root / name)
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError:
            pass  # some network file systems have no such thing; the file itself is down
        finally:
            os.close(folder)


class Remote:
    """A folder that fsspec reaches."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec  # type: ignore[import-untyped]  # no stubs, no py.typed

            self._files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{url!r} is no place that checkpoints can reach: {error}",
                cause="an unknown protocol, or one whose package is not installed",
                remedy="give a plain folder, or install what the message names (s3fs for s3://, gcsfs for gs://)",
            ) from error

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}".removesuffix("/")

    def is_file(self) -> bool:
        """Whether the place is one file."""
        return bool(self._files.isfile(self.root))

    def prepare(self) -> None:
        """Make the folder if need be."""
        self._files.makedirs(self.root, exist_ok=True)

    def names(self) -> list[str]:
        """Of what is in the folder; none where there is no folder."""
        self._files.invalidate_cache()
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """A whole file; with no name, the place itself."""
        return bytes(self._files.cat_file(self._path(name)))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._files.rm_file(self._path(name))

    def write(self, name: str, beside: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file beside, and give it its name once it is whole there."""
        with self._files.open(self._path(beside), "wb") as file:
            for part in parts:
                file.write(part)
        self._files.mv(self._path(beside), self._path(name))


Store: TypeAlias = Local | Remote


def store_at(place: Place) -> Store:
    """Where a place is; nothing is written there.

    Raises
    ------
    InputError
        If it is neither a folder nor a URL that fsspec knows.
    """
    text = os.fspath(place) if isinstance(place, str | os.PathLike) else ""
    if not text or not isinstance(text, str):
        raise InputError(
            f"The place for checkpoints is {place!r}; it must be a folder or a URL.", remedy='"checkpoints", say'
        )
    protocol, _, path = text.rpartition("://")
    return Remote(text) if protocol not in ("", "file") else Local(path)
