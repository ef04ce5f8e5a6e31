"""A pool of Dask workers, as `parakit.connect` makes it: what may be asked of it, and what is closed with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from distributed import Client

from parakit.errors import ConnectError
from parakit.workers.dask.cluster import DaskCluster
from parakit.workers.dask.map import map_on
from parakit.workers.dask.session import DaskSession
from parakit.workers.dask.worker_ids import host_of
from parakit.workers.pool import Workers
from parakit.workers.session import Job

__all__ = ["DaskWorkers"]

_CLOSE_SECONDS = 20.0
_UNLIMITED = 100_000


class DaskWorkers(Workers):
    """Workers of a Dask cluster; use `parakit.connect` to make one.

    Parameters
    ----------
    client : Client
        If it was made with a cluster object, that one can be asked for more workers.
    kind : str
    threads : int
    most : int or None
        How far the pool may grow, where somebody can be asked; None for no limit.
    device : {"cpu", "cuda"}
    ours : tuple
        What to close in the end: the last of them first.

    Attributes
    ----------
    cluster : DaskCluster
        The workers themselves.
    """

    def __init__(
        self, client: Client, kind: str, threads: int, most: int | None, device: str, ours: Sequence[Any]
    ) -> None:
        super().__init__()
        self.client = client
        self.kind = kind
        self.threads = threads
        self.device = device
        self._most = most or _UNLIMITED
        self._ours = tuple(ours)
        self.cluster = DaskCluster(client, device, local=any(thing is client.cluster for thing in ours))

    def await_workers(self, count: int, seconds: float) -> None:
        """Wait until so many workers have come, and see whether they can train."""
        self.cluster.await_workers(count, seconds, self.kind)
        self.cluster.make_ready(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The workers that can work now."""
        return self.cluster.names

    @property
    def most(self) -> int:
        """How far the pool can grow."""
        return self.size if self.client.cluster is None else max(self._most, self.size)

    @property
    def cores(self) -> int:  # type: ignore[override]  # more of them may come
        """Cores, or GPUs, of the hosts that were looked at."""
        return sum(self.cluster.cores_of.values())

    @property
    def one_host(self) -> bool:
        """Whether all workers that were looked at are on one host."""
        return len(self.cluster.hosts) == 1

    @property
    def hosts(self) -> tuple[str, ...]:
        """What each worker's address says of its host: workers that listen on one address are processes of one."""
        return tuple(host_of(name) for name in self.names)

    @property
    def memory_limits(self) -> tuple[int, ...]:
        """What Dask lets each worker use."""
        return tuple(int(found.get("memory_limit") or 0) for found in self.cluster.known().values())

    @property
    def dashboard(self) -> str:
        """Address of the Dask dashboard."""
        return str(self.client.dashboard_link)

    @property
    def maps_memory(self) -> bool:  # type: ignore[override]  # it depends on where the workers are
        """Whether all workers are processes of this machine that were started here."""
        return self.cluster.local

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers there are now, by their short names: for looking at them, or for trials of faults.

        They are those of the machine that a worker runs on.
        """
        return self.cluster.pids

    def grow(self, count: int) -> None:
        """Ask the cluster for more workers."""
        scalable = self.client.cluster
        if scalable is None:
            raise ConnectError(
                "This pool cannot grow: it was connected by an address.",
                remedy="start more workers on the cluster, or connect with its Cluster object",
            )
        # To scale is to shrink where the cluster counts on more: some of them may only be away for a moment.
        if count > len(getattr(scalable, "plan", ())):
            scalable.scale(count)

    def open(self, job: Job) -> DaskSession:
        """Begin a run."""
        self.check_open()
        self.cluster.readmit()
        return DaskSession(self.cluster, job, job.threads or self.threads)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Apply an importable function to items, on the workers."""
        self.check_open()
        return map_on(self.cluster, function, items, limit_seconds)

    def _close(self) -> None:
        with contextlib.ExitStack() as closing:  # whoever interrupts the end of one does not spare the next
            for thing in reversed(self._ours):
                closing.callback(_close_quietly, thing)


def _close_quietly(thing: Any) -> None:
    with contextlib.suppress(Exception):
        thing.close(timeout=_CLOSE_SECONDS)
    if isinstance(thing, Client):  # one that closed by itself, when its scheduler went, has left its event loop running
        with contextlib.suppress(Exception):
            thing._loop_runner.stop()
