"""Pools of Dask workers: local processes that parakit starts, and clusters that are somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distributed import Client, LocalCluster, wait
from distributed.comm import connect
from distributed.deploy import Cluster
from distributed.security import Security

from parakit.errors import ConnectError, InputError, WorkerLost
from parakit.machine import usable_cores
from parakit.workers.base import Job, Workers
from parakit.workers.dask import rendezvous
from parakit.workers.dask.crew import DaskCrew

__all__ = ["DaskWorkers", "connect_client", "connect_cluster", "connect_local", "what_is"]

_LOOPBACK = "127.0.0.1"
_UNLIMITED = 100_000
_CLOSE_SECONDS = 10.0
_ASK_SECONDS = 30.0


def what_is(target: Any) -> str:
    """How workers are to be reached: "local", "address", "client", "cluster" or ""."""
    if target is None or isinstance(target, int):
        return "local"
    if isinstance(target, str):
        return "address"
    if isinstance(target, Client):
        return "client"
    return "cluster" if isinstance(target, Cluster) else ""


def connect_local(count: int | None, *, threads: int, most: int | None, timeout: float) -> DaskWorkers:
    """Start processes on this machine, with torch imported, listening on loopback only."""
    wanted = count or usable_cores()
    limit = max(wanted, 2 * usable_cores()) if most is None else most
    if limit < wanted:
        raise InputError(f"The pool cannot start with {wanted} workers and grow to at most {limit}.")
    dashboard = f"{_LOOPBACK}:0" if importlib.util.find_spec("bokeh") else None
    try:
        cluster = LocalCluster(
            n_workers=wanted,
            threads_per_worker=1,
            processes=True,
            host=_LOOPBACK,
            dashboard_address=dashboard,
            worker_dashboard_address=None,
            # Dask would pause a worker that holds much, and a paused member would stop the whole group.
            memory_limit=0,
            silence_logs=logging.ERROR,
            preload=["parakit.workers.warm"],
        )
    except Exception as error:
        raise ConnectError(
            f"{wanted} local workers could not be started: {type(error).__name__}: {error}",
            cause="too little memory, or a script that starts workers without a guard",
            remedy='in a script, put the code under: if __name__ == "__main__":',
        ) from error
    try:
        client = Client(cluster, timeout=timeout, set_as_default=False)
    except BaseException:
        cluster.close(timeout=_CLOSE_SECONDS)
        raise
    many = "process" if wanted == 1 else "processes"
    return DaskWorkers(
        client, f"{wanted} local {many}", threads, limit, wanted, timeout, cluster, ours=(client, cluster)
    )


def connect_cluster(cluster: Cluster, *, threads: int, most: int | None, timeout: float) -> DaskWorkers:
    """Use somebody's cluster; the connection is ours, the cluster is not."""
    try:
        client = Client(cluster, timeout=timeout, set_as_default=False)
    except Exception as error:
        raise _unreachable(repr(cluster), error) from error
    kind = f"{type(cluster).__name__} {cluster.scheduler_address}"
    return DaskWorkers(client, kind, threads, most or _UNLIMITED, 1, timeout, cluster, ours=(client,))


def connect_client(
    target: str | Client, *, threads: int, most: int | None, security: Any, timeout: float
) -> DaskWorkers:
    """Use the cluster behind an address or a client."""
    if isinstance(target, Client):
        if target.asynchronous or target.status != "running":
            raise ConnectError(
                f"This client cannot be used: it is {'asynchronous' if target.asynchronous else target.status}.",
                remedy="give a running Client that was not made with asynchronous=True",
            )
        cluster = target.cluster
        limit = (most or _UNLIMITED) if cluster is not None else None
        address = target.scheduler.address if target.scheduler is not None else "?"
        return DaskWorkers(target, f"Dask at {address}", threads, limit, 1, timeout, cluster, ours=())
    try:
        _knock(target, timeout, security)
        client = Client(target, timeout=timeout, security=security, set_as_default=False)
    except Exception as error:
        raise _unreachable(target, error) from error
    return DaskWorkers(client, f"Dask at {target}", threads, None, 1, timeout, None, ours=(client,))


def _knock(address: str, timeout: float, security: Security | None) -> None:
    """Raise if nobody answers; a client that finds out by itself leaves its event loop running."""

    async def knock() -> None:
        comm = await connect(address, timeout=timeout, **(security or Security()).get_connection_args("client"))
        await comm.close()

    # A notebook's own thread has an event loop already.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, knock()).result()


def _unreachable(target: str, error: Exception) -> ConnectError:
    return ConnectError(
        f"No Dask scheduler answers at {target}: {str(error).splitlines()[0] if str(error) else repr(error)}",
        cause="a wrong host or port, a scheduler that is not running, a firewall, or TLS on one side only",
        remedy='check the address that the scheduler printed, such as "tcp://host:8786"; pass security= for TLS',
    )


class DaskWorkers(Workers):
    """Workers of a Dask cluster; use `parakit.connect` to make one.

    Parameters
    ----------
    client : Client
    kind : str
    threads : int
    most : int or None
        How far the pool may grow; None where nobody can be asked.
    expected : int
        Workers to wait for.
    timeout : float
        Seconds to wait for them.
    cluster : Cluster or None
        Who can be asked for more.
    ours : tuple
        What to close in the end, in this order.
    """

    def __init__(
        self, client: Client, kind: str, threads: int, most: int | None, expected: int, timeout: float,
        cluster: Cluster | None, ours: Sequence[Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.client = client
        self.kind = kind
        self.threads = threads
        self.cores = 0
        self._most = most
        self._cluster = cluster
        self._ours = tuple(ours)
        self._ready: set[str] = set()
        self._labels: dict[str, Any] = {}  # of all workers ever seen: a lost one is still named
        try:
            self._await_workers(expected, timeout)
            self.cores = self._survey(self.names)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Addresses of the workers there are now, in the order of their names."""
        workers = self._workers()
        return tuple(sorted(workers, key=lambda address: _natural(workers[address]["name"])))

    @property
    def most(self) -> int:
        """How far the pool can grow."""
        return self.size if self._most is None else max(self._most, self.size)

    @property
    def dashboard(self) -> str:
        """Address of the Dask dashboard."""
        return str(self.client.dashboard_link)

    def label(self, address: str) -> str:
        """A short name for a worker, also for one that has gone."""
        name = self._labels.get(address, address)
        return f"worker {name}" if isinstance(name, int) else str(name)

    def grow(self, count: int) -> None:
        """Ask the cluster for more workers."""
        if self._cluster is None:
            raise ConnectError(
                "This pool cannot grow: it was connected by an address.",
                remedy="start more workers on the cluster, or connect with its Cluster object",
            )
        self._cluster.scale(count)

    def open(self, job: Job) -> DaskCrew:
        """Begin a run."""
        self.check_open()
        return DaskCrew(self, job)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Apply an importable function to items, on the workers."""
        self.check_open()
        self.make_ready(self.names)
        placed = self.client.scatter(list(items), hash=False)
        futures = self.client.map(function, placed, pure=False, retries=2)
        _, waiting = self.wait(futures, limit_seconds)
        if waiting:
            self.client.cancel(list(waiting))
            raise WorkerLost(
                f"{len(waiting)} of {len(futures)} tasks were not done in {limit_seconds:g} s.",
                cause="workers that are busy, hang, or have gone",
            )
        results: list[Any] = self.client.gather(futures)
        return results

    def wait(self, futures: Iterable[Any], limit_seconds: float) -> tuple[set[Any], set[Any]]:
        """Wait for futures up to a limit; which are done, and which are not."""
        every = list(futures)
        with contextlib.suppress(TimeoutError), self.client.as_current():
            wait(every, timeout=limit_seconds)
        done = {future for future in every if future.done()}
        return done, set(every) - done

    def make_ready(self, addresses: Iterable[str]) -> None:
        """Check workers that are new to this pool, and teach them to keep boards."""
        fresh = [address for address in addresses if address not in self._ready]
        if fresh:
            self._survey(fresh)
            self.client.run(rendezvous.install, workers=fresh)
            self._ready.update(fresh)

    def _workers(self) -> dict[str, dict[str, Any]]:
        # The client's own scheduler_info() shares its answer with a refresh that runs now and then and asks for no
        # workers at all; read in the wrong moment, it says that everybody is gone.
        if self.client.status != "running" or self.client.scheduler is None:
            return {}
        try:
            identity = self.client.sync(self.client.scheduler.identity, n_workers=-1, callback_timeout=_ASK_SECONDS)
        except OSError:  # the scheduler is gone, and with it everybody
            return {}
        workers: dict[str, dict[str, Any]] = identity["workers"]
        self._labels.update({address: w["name"] for address, w in workers.items()})
        return workers

    def _await_workers(self, count: int, timeout: float) -> None:
        try:
            self.client.wait_for_workers(count, timeout=timeout)
        except TimeoutError as error:
            raise ConnectError(
                f"{len(self._workers())} of {count} workers came within {timeout:g} s ({self.kind}).",
                cause="a cluster without free machines, or workers that fail as they start",
                remedy="look at the workers' logs, or wait longer: connect(..., timeout=300)",
            ) from error

    def _survey(self, addresses: Sequence[str]) -> int:
        """Check that workers have what training needs; returns the cores of their machines together."""
        found = self.client.run(_surveyor(), workers=list(addresses))
        ours = _surveyor()()
        wrong = {address: told for address, facts in found.items() if (told := _lacks(facts, ours))}
        if wrong:
            address, told = next(iter(wrong.items()))
            raise ConnectError(
                f"{len(wrong)} of {len(found)} workers cannot train; {address} {told}.",
                cause="the workers run in another environment than this notebook",
                remedy=f"install there: pip install parakit=={ours['parakit']} torch=={ours['torch']} "
                f"(Python {ours['python']})",
            )
        hosts = {facts["host"]: facts["cores"] for facts in found.values()}
        return sum(hosts.values())

    def _close(self) -> None:
        for thing in self._ours:
            with contextlib.suppress(Exception):
                thing.close(timeout=_CLOSE_SECONDS)


def _natural(name: Any) -> tuple[int, int, str]:
    return (0, name, "") if isinstance(name, int) else (1, 0, str(name))


def _surveyor() -> Callable[[], dict[str, Any]]:
    """A function that runs also where parakit is missing: being local, it travels by value."""

    def survey() -> dict[str, Any]:
        import platform

        from dask.system import cpu_count

        facts: dict[str, Any] = {"host": platform.node(), "cores": cpu_count()}
        facts["python"] = ".".join(platform.python_version_tuple()[:2])
        for package in ("torch", "parakit"):
            try:
                facts[package] = version(package).split("+")[0]
            except PackageNotFoundError:
                facts[package] = None
        return facts

    return survey


def _lacks(facts: dict[str, Any], ours: dict[str, Any]) -> str:
    """What a worker lacks, in words; nothing if it can train."""
    for package in ("torch", "parakit"):
        if facts[package] is None:
            return f"has no {package}"
    if facts["python"] != ours["python"]:
        return f"runs Python {facts['python']}, this notebook runs {ours['python']}"
    for package in ("torch", "parakit"):
        if facts[package].split(".")[:2] != ours[package].split(".")[:2]:
            return f"has {package} {facts[package]}, this notebook has {ours[package]}"
    return ""
