"""The fork server: a process that has imported all that a worker needs, and from which local workers are forked.

A worker that is spawned imports torch, and for its first optimizer torch's compiler: three seconds of a core for each
of them, and again for each that comes in place of a lost one. One that is forked has them, shares their memory with the
others, and is there in a tenth of that. This is multiprocessing's fork server, which Dask can use; it starts with the
first local pool, ends with the last, and ends by itself when the notebook's process and the workers have ended.

Linux only: elsewhere a fork of what has imported torch is not safe, and workers are spawned.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, process
from typing import Any

import dask.config
import distributed.utils

from parakit.workers.dask.reaper import Reaper

__all__ = ["ForkServer"]

_FORKS = sys.platform == "linux"
_METHOD = "distributed.worker.multiprocessing-method"
_ENVIRONMENT = "distributed.nanny.pre-spawn-environ"
_TRIM = "MALLOC_TRIM_THRESHOLD_"  # what Dask says of it makes training slow: see `parakit.system.cores`
# Arenas of the fork server's threads would be the first that a worker's threads get, and those return their memory.
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
_LONGEST_PLACE = 60  # bytes: the socket's own folder and name come to it, and 107 is all there is (unix(7))
_IMPORTED = ["distributed", "distributed.nanny", "parakit.workers.dask.preload"]

_lock = threading.Lock()
_users = 0
_running: _Server | None = None


class ForkServer:
    """One pool's claim on the fork server, of which there is one in a process."""

    def __init__(self) -> None:
        global _users, _running
        self._claimed = True
        with _lock:
            _users += 1
            if _users == 1 and _FORKS:
                _running = _Server()

    @property
    def pid(self) -> int | None:
        """The process that forks; None where workers are spawned."""
        return None if _running is None else _server()._forkserver_pid

    def close(self, timeout: float | None = None) -> None:  # it takes no time
        """Give up the claim; with the last one, the fork server ends."""
        global _users, _running
        with _lock:
            _users -= self._claimed
            self._claimed = False
            if _users == 0 and _running is not None:
                ending, _running = _running, None
                ending.close()


class _Server:
    """The fork server, made to import what is needed, and known to Dask as the way in which workers start."""

    def __init__(self) -> None:
        self._method = dask.config.get(_METHOD)
        # Somebody may have started it for other purposes. Then it forks our workers too, which import what they need.
        self._reaper = Reaper(_short_place()) if _server()._forkserver_pid is None else None
        if self._reaper is not None:
            self._start(self._reaper)
        dask.config.set({_METHOD: "forkserver"})

    def _start(self, reaper: Reaper) -> None:
        # Dask would add whatever else it finds, and import all that in this process too.
        distributed.utils._forkserver_preload_set = True
        modules = _server()._preload_modules
        multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
        given = {name: str(value) for name, value in dask.config.get(_ENVIRONMENT).items() if name != _TRIM}
        unset = {name: value for name, value in (given | _ONE_ARENA).items() if name not in os.environ}
        # The reaper's folder, as nobody else would remove the server's socket after a kill.
        config: Any = process.current_process()._config  # type: ignore[attr-defined]
        try:
            with _changed(os.environ, unset), _changed(config, {"tempdir": str(reaper.folder)}):
                forkserver.ensure_running()
        finally:
            _server()._preload_modules = modules
        reaper.watch(_server()._forkserver_pid)

    def close(self) -> None:
        dask.config.set({_METHOD: self._method})
        if self._reaper is not None:
            with suppress(OSError):  # it would wait for workers that may be stopped; they end without it
                os.kill(_server()._forkserver_pid, signal.SIGKILL)
            with suppress(OSError):
                _server()._stop()
            self._reaper.close()


def _short_place() -> str:
    """Where temporary files are, if the path of a socket in a folder there is not too long for the system."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST_PLACE else "/tmp"  # private folders, random names


def _server() -> Any:
    return forkserver._forkserver  # there is one in a process, without another name


@contextmanager
def _changed(mapping: MutableMapping[str, Any], values: Mapping[str, Any]) -> Iterator[None]:
    """Some items of a mapping, changed for a while."""
    before = {name: mapping[name] for name in values if name in mapping}
    mapping.update(values)
    try:
        yield
    finally:
        for name in values:
            del mapping[name]
        mapping.update(before)
