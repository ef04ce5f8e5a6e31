"""Processes that form groups and are told what to do, for tests and benchmarks of groups.

Starting one costs seconds, most of them for torch; so a few are started once, and asked many things.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ANSWER_SECONDS = 60.0


class Answer(NamedTuple):
    """What a member answers: the value of a function, or the error that it raised, in words."""

    value: Any
    error: str

    @property
    def good(self) -> Any:
        assert not self.error, self.error
        return self.value


class FolderStore:
    """A store whose notes are files of a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def set(self, key: str, value: bytes) -> None:
        note = self._path(key)
        unfinished = note.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(value)
        unfinished.rename(note)

    def get(self, key: str, limit_seconds: float) -> bytes:
        deadline = time.monotonic() + limit_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                return self._path(key).read_bytes()
            time.sleep(0.001)
        raise TimeoutError(f"no note {key!r} in {limit_seconds:g} s")

    def _path(self, key: str) -> Path:
        return Path(self._folder, key.encode().hex())


class Member:
    """A process, seen from the one that started it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Let it call a function, whose first argument is a dict that the process keeps."""
        self._pipe.send((function, args))

    def answer(self, limit_seconds: float = _ANSWER_SECONDS) -> Answer:
        """What came of the function told longest ago."""
        assert self._pipe.poll(limit_seconds), "no answer"
        return Answer(*self._pipe.recv())

    def close(self) -> None:
        self._pipe.close()
        self.process.join(0 if self.process.exitcode is not None else 10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


@contextlib.contextmanager
def members(size: int) -> Iterator[list[Member]]:
    """So many processes, which end with the context."""
    team = [Member() for _ in range(size)]
    try:
        yield team
    finally:
        for member in team:
            member.close()


def ask(team: Sequence[Member], function: Callable[..., Any], *args: Any) -> list[Answer]:
    """Let all call a function at once, with their places as second argument; the answers by place."""
    for rank, member in enumerate(team):
        member.tell(function, rank, *args)
    return [member.answer() for member in team]


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    kept: dict[str, Any] = {}
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            function, args = pipe.recv()
            try:
                answer = Answer(function(kept, *args), "")
            except Exception as error:
                answer = Answer(None, f"{type(error).__name__}: {error}")
            pipe.send(tuple(answer))
