"""The cluster behind a local pool: processes on loopback that a reaper watches and that come back when they die."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import logging
import os
import signal
from collections.abc import Callable
from typing import Any, Literal

import dask.config
from distributed import LocalCluster, Nanny
from distributed.core import Status
from distributed.deploy import Cluster

from parakit.workers.dask.fork_server import ForkServer
from parakit.workers.dask.reaper import Reaper

__all__ = ["WatchedCluster"]

# What Dask does to watch itself takes 4 to 5 % of a core in each process: a stack is sampled and a loop timed up to a
# hundred times a second. Where every core computes, all workers wait for whichever was disturbed. Of Dask's own values
# and ours; where somebody chose another, that stays.
_WATCHFUL_AND_CALM = {
    "distributed.worker.profile.enabled": (True, False),
    "distributed.admin.tick.interval": ("20ms", "500ms"),
    "distributed.admin.system-monitor.interval": ("500ms", "2s"),
}
_LOOPBACK = "127.0.0.1"
_CLOSE_SECONDS = 10.0
_TELL_SECONDS = 0.01


def _calm() -> dict[str, Any]:
    """Settings of Dask's under which it leaves the cores to those who compute."""
    return {name: ours for name, (usual, ours) in _WATCHFUL_AND_CALM.items() if dask.config.get(name) == usual}


class WatchedCluster(LocalCluster):
    """Dask's local cluster, but one that a reaper watches, and that a failure does not leave half started."""

    def __init__(self, count: int, reaper: Reaper, fork_server: ForkServer) -> None:
        folder = str(reaper.folder)
        try:
            with dask.config.set(_calm()):
                super().__init__(  # type: ignore[no-untyped-call]  # Dask's, without annotations
                    n_workers=count,
                    threads_per_worker=1,
                    processes=True,
                    worker_class=_WatchedNanny,
                    watch=lambda pid: reaper.watch(pid, forked_by=fork_server.pid),
                    local_directory=folder,
                    scheduler_kwargs={"local_directory": folder},
                    host=_LOOPBACK,
                    dashboard_address=f"{_LOOPBACK}:0" if importlib.util.find_spec("bokeh") else None,
                    worker_dashboard_address=None,
                    # Dask would pause a worker that holds much, and a paused member would stop the whole group.
                    memory_limit=0,
                    silence_logs=logging.ERROR,
                    preload=["parakit.workers.dask.preload"],
                )
        except BaseException:
            with contextlib.suppress(Exception):
                self.close(timeout=_CLOSE_SECONDS)
            raise

    def _update_worker_status(self, op: str, msg: Any) -> None:
        """Note that a worker came or went.

        Dask dismisses the keeper of a worker that happens to be away 15 s after any loss, and so for good one that is
        just being started again after another. Ours start a worker again as often as it dies.
        """
        Cluster._update_worker_status(self, op, msg)


class _WatchedNanny(Nanny):
    """Dask's keeper of a worker process, but one that tells of every process it starts, before that can be stuck."""

    def __init__(self, *args: Any, watch: Callable[[int], None], **options: Any) -> None:
        options["env"] = dict(os.environ)  # a fork has that of some time ago
        with dask.config.set(_calm()):
            options["config"] = copy.deepcopy(dask.config.config)
            super().__init__(*args, **options)
        self._watch = watch

    async def close(  # type: ignore[override]  # as Dask's own differs from what it inherits
        self, timeout: float = 5, reason: str = "nanny-close"
    ) -> Literal["OK"]:
        """Stop the worker process; one that is still starting would not hear of it for many seconds."""
        process = self.process
        if process is not None and process.status == Status.starting and self.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
        return await super().close(timeout=timeout, reason=reason)

    async def instantiate(self) -> Status:
        """Start a worker process; returns when it has connected, seconds later."""
        telling = asyncio.create_task(self._tell())
        try:
            return await super().instantiate()
        finally:
            telling.cancel()

    async def _tell(self) -> None:
        while (pid := self.pid) is None:
            await asyncio.sleep(_TELL_SECONDS)
        self._watch(pid)
