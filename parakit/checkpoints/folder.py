"""A folder of checkpoints, of which the newest few are kept.

Owns the names of the files, which are in the order of their steps, and of the temporaries that become them. A file that
was damaged since it was written is passed over for the next older one. What is just saved supersedes all that the
folder has of later steps: they are of a run that was abandoned, and must not be taken for the newest. Other files are
left alone.

Reference: that of `parakit.checkpoints.storage`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from parakit.checkpoints.compatibility import Identity
from parakit.checkpoints.format import Bytes, Checkpoint, Damaged, deserialize, serialize
from parakit.checkpoints.state import State
from parakit.checkpoints.storage import Place, Store, store_at
from parakit.errors import CheckpointError, InputError
from parakit.validation import check_whole

__all__ = ["Checkpoints", "load"]

_STALE_SECONDS = 86_400  # no write takes a day: a temporary this old is a dead writer's, on whatever machine it ran
# The name of a temporary says on which machine, by which process and in which second it was begun.
_TEMPORARY = re.compile(r"\.parakit-([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.tmp")
_NAME = re.compile(r"step-(\d{12,})\.parakit")
_HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_writing: set[str] = set()  # temporaries of this process that are being written


class Checkpoints:
    """A folder of checkpoints, the newest few of which are kept.

    One run at a time saves to it.

    Parameters
    ----------
    place : str or path
        A folder, made if need be, or the URL of one that fsspec knows, such as ``s3://bucket/run``.
    keep : int
        How many; older ones are removed after a newer one is in place.

    Raises
    ------
    InputError
        If the place is a file, or nothing can be written there.
    """

    def __init__(self, place: Place, *, keep: int = 3) -> None:
        check_whole("keep", keep, 1)
        self.place = place
        self.keep = keep
        self._store = store_at(place)
        try:
            if self._store.is_file():
                raise NotADirectoryError("it is a file")
            self._store.prepare()
            trial = _temporary()
            self._write(trial, [])
            with suppress(FileNotFoundError):  # another writer may take it for a dead one's
                self._store.remove(trial)
        except Exception as error:
            raise InputError(
                f"Checkpoints cannot be written to {str(place)!r}: {type(error).__name__}: {error}",
                cause="it is a file or below one, or you may not write there, or the disk is full",
                remedy="give a folder that you can write to",
            ) from error

    def save(self, state: State, identity: Identity) -> str:
        """Write a checkpoint, or replace that of the same step; it is on disk when this returns.

        Once it is in place, those of later steps are removed, whatever run they are of: it is the newest now. So a run
        that begins anew in a folder, or goes on from an earlier step of it, replaces what an abandoned one left there.

        Parameters
        ----------
        state : State
        identity : dict
            What `json.dumps` takes.

        Returns
        -------
        str
            The name of the file.

        Raises
        ------
        CheckpointError
            If the state holds what is not plain, or it cannot be written, or another file cannot be removed.
        """
        name = f"step-{int(state['step']):012d}.parakit"
        parts = serialize(state, identity)
        try:
            self._sweep()
            self._write(name, parts)
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint of step {state['step']} could not be written to {str(self.place)!r}: "
                f"{type(error).__name__}: {error}",
                cause="the disk is full, or the folder was removed or can no longer be reached",
                remedy="free some space or make the folder anew; older checkpoints were left as they are",
            ) from error
        self._prune(name)
        return name

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None; a warning names the damaged ones.

        Raises
        ------
        CheckpointError
            If the newest is of a later version of the format.
        """
        return _newest(self._store)

    def steps(self) -> list[int]:
        """Steps of which there is a file, ascending."""
        return [_step_of(name) for name in _checkpoints(self._store)]

    def _write(self, name: str, parts: Iterable[Bytes]) -> None:
        beside = _temporary()
        _writing.add(beside)
        try:
            self._store.write(name, beside, parts)
        except BaseException:
            with suppress(Exception):
                self._store.remove(beside)
            raise
        finally:
            _writing.discard(beside)

    def _sweep(self) -> None:
        """Remove what writers left that died; space that cannot be had back is no reason not to write."""
        for name in filter(_left_over, self._store.names()):
            with suppress(Exception):
                self._store.remove(name)

    def _prune(self, written: str) -> None:
        """Remove what is of later steps than what was just written, then the oldest of what is too much."""
        others = [name for name in _checkpoints(self._store) if name != written]
        older = [name for name in others if _step_of(name) <= _step_of(written)]
        later = others[len(older) :]
        for name in later + older[: max(0, len(older) + 1 - self.keep)]:
            try:
                self._store.remove(name)
            except FileNotFoundError:
                pass  # somebody else was faster
            except Exception as error:
                raise CheckpointError(
                    f"{written} is in place, but {name} cannot be removed: {type(error).__name__}: {error}"
                ) from error

    def __repr__(self) -> str:
        return f"<Checkpoints in {str(self.place)!r}, the newest {self.keep} of which are kept>"


def load(place: Place) -> Checkpoint:
    """Read a checkpoint; writes nothing.

    Parameters
    ----------
    place : str or path
        One file, or a folder, whose newest whole checkpoint is read.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged, or of a later version of the format.
    InputError
        If the place is a URL that fsspec does not know.
    """
    store = store_at(place)
    if store.is_file():
        try:
            return deserialize(store.read(""), Path(store.root).name)
        except OSError as error:
            raise CheckpointError(f"{str(place)!r} cannot be read: {error}") from error
    found = _newest(store)
    if found is None:
        damaged = _checkpoints(store)
        raise CheckpointError(
            f"There is no {'whole ' if damaged else ''}checkpoint in {str(place)!r}.",
            cause=f"damaged: {', '.join(damaged)}" if damaged else "another folder, or a run that saved none yet",
            remedy="give the folder that the run saved to, or begin anew without a checkpoint",
        )
    return found


def _step_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else -1


def _checkpoints(store: Store) -> list[str]:
    """Names of the checkpoints, ascending by their steps."""
    return sorted((name for name in store.names() if _step_of(name) >= 0), key=_step_of)


def _newest(store: Store) -> Checkpoint | None:
    tried: set[str] = set()
    damaged: list[str] = []
    # Looks again each time: a run that goes on may have replaced, meanwhile, all that there was.
    while names := [name for name in _checkpoints(store) if name not in tried]:
        tried.add(names[-1])
        try:
            found = deserialize(store.read(names[-1]), names[-1])
            return Checkpoint(found.step, found.state, found.identity, found.name, tuple(damaged))
        except FileNotFoundError:
            continue
        except (Damaged, OSError) as error:
            damaged.append(names[-1])
            warnings.warn(f"A checkpoint is passed over: {error}", RuntimeWarning, stacklevel=3)
    return None


def _temporary() -> str:
    return f".parakit-{_HERE}-{os.getpid()}-{int(time.time())}-{uuid.uuid4().hex[:8]}.tmp"


def _left_over(name: str) -> bool:
    """Whether a file is a temporary whose writer is dead."""
    match = _TEMPORARY.fullmatch(name)
    if match is None or name in _writing:
        return False
    machine, process, seconds = match[1], int(match[2]), int(match[3])
    if machine == _HERE and (process == os.getpid() or not psutil.pid_exists(process)):
        return True
    return time.time() - seconds > _STALE_SECONDS
