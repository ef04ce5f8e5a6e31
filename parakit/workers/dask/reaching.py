"""Reaching workers: processes that are started here, and clusters that are somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distributed import Client
from distributed.comm import connect
from distributed.deploy import Cluster
from distributed.security import Security

from parakit.errors import ConnectError, InputError
from parakit.machine import in_thread, uninterrupted, usable_cores
from parakit.workers.dask.janitor import Janitor
from parakit.workers.dask.local import WatchedCluster
from parakit.workers.dask.nursery import Nursery
from parakit.workers.dask.pool import DaskWorkers

__all__ = ["connect_client", "connect_cluster", "connect_local", "what_is"]

_UNLIMITED = 100_000
_LATER = "torch._dynamo"  # what the first optimizer of this process imports, for a second: time to do so is now
_CLOSE_SECONDS = 10.0


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
    return uninterrupted(
        lambda: _start_local(wanted, threads, limit, timeout), DaskWorkers.close, timeout + 2 * _CLOSE_SECONDS
    )


def _start_local(count: int, threads: int, most: int, timeout: float) -> DaskWorkers:
    with contextlib.ExitStack() as undo:
        try:
            nursery = Nursery()
            undo.callback(nursery.close)
            in_thread(importlib.import_module, _LATER)
            janitor = Janitor()
            undo.callback(janitor.close)
            cluster = WatchedCluster(count, janitor, nursery)
            undo.callback(cluster.close, timeout=_CLOSE_SECONDS)
        except Exception as error:
            raise ConnectError(
                f"{count} local workers could not be started: {type(error).__name__}: {error}",
                cause="too little memory, or a script that starts workers without a guard",
                remedy='in a script, put the code under: if __name__ == "__main__":',
            ) from error
        client = Client(cluster, timeout=timeout, set_as_default=False)
        undo.pop_all()
    many = "process" if count == 1 else "processes"
    ours = (client, cluster, janitor, nursery)
    return DaskWorkers(client, f"{count} local {many}", threads, most, count, timeout, cluster, ours=ours)


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
