"""Reaching workers: processes that are started here, and clusters that are somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import Client
from distributed.comm import connect
from distributed.deploy import Cluster
from distributed.security import Security

from parakit.errors import ConnectError, InputError
from parakit.system.cores import usable_cores
from parakit.system.threads import in_thread, uninterrupted
from parakit.workers.dask.fork_server import ForkServer
from parakit.workers.dask.local_cluster import WatchedCluster
from parakit.workers.dask.pool import DaskWorkers
from parakit.workers.dask.reaper import Reaper

__all__ = ["Terms", "connect_client", "connect_cluster", "connect_local", "what_is"]

_LATER = "torch._dynamo"  # what the first optimizer of this process imports, for a second: time to do so is now
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Terms:
    """What a pool is to be like, as for `parakit.connect`."""

    threads: int
    most: int | None
    device: str
    timeout: float


def what_is(target: Any) -> str:
    """How workers are to be reached: "local", "address", "client", "cluster" or ""."""
    if target is None or isinstance(target, int):
        return "local"
    if isinstance(target, str):
        return "address"
    if isinstance(target, Client):
        return "client"
    return "cluster" if isinstance(target, Cluster) else ""


def connect_local(count: int | None, how: Terms) -> DaskWorkers:
    """Start processes on this machine, with torch imported, listening on loopback only."""
    wanted = count or (usable_cores() if how.device == "cpu" else max(1, torch.cuda.device_count()))
    limit = max(wanted, 2 * usable_cores()) if how.most is None else how.most
    if limit < wanted:
        raise InputError(f"The pool cannot start with {wanted} workers and grow to at most {limit}.")
    return uninterrupted(
        lambda: _start_local(wanted, replace(how, most=limit)), DaskWorkers.close, how.timeout + 2 * _CLOSE_SECONDS
    )


def _start_local(count: int, how: Terms) -> DaskWorkers:
    with contextlib.ExitStack() as undo:
        try:
            fork_server = ForkServer()
            undo.callback(fork_server.close)
            in_thread(importlib.import_module, _LATER)
            reaper = Reaper()
            undo.callback(reaper.close)
            cluster = WatchedCluster(count, reaper, fork_server)
            undo.callback(cluster.close, timeout=_CLOSE_SECONDS)
        except Exception as error:
            raise ConnectError(
                f"{count} local workers could not be started: {type(error).__name__}: {error}",
                cause="too little memory, or a script that starts workers without a guard",
                remedy='in a script, put the code under: if __name__ == "__main__":',
            ) from error
        client = Client(cluster, timeout=how.timeout, set_as_default=False)
        undo.pop_all()
    many = "process" if count == 1 else "processes"
    ours = (client, cluster, reaper, fork_server)
    return _pool(client, f"{count} local {many}", how, count, ours=ours)


def connect_cluster(cluster: Cluster, how: Terms) -> DaskWorkers:
    """Use somebody's cluster; the connection is ours, the cluster is not."""
    try:
        client = Client(cluster, timeout=how.timeout, set_as_default=False)
    except Exception as error:
        raise _unreachable(repr(cluster), error) from error
    kind = f"{type(cluster).__name__} {cluster.scheduler_address}"
    return _pool(client, kind, how, 1, ours=(client,))


def connect_client(target: str | Client, how: Terms, security: Any) -> DaskWorkers:
    """Use the cluster behind an address or a client."""
    if isinstance(target, Client):
        if target.asynchronous or target.status != "running":
            raise ConnectError(
                f"This client cannot be used: it is {'asynchronous' if target.asynchronous else target.status}.",
                remedy="give a running Client that was not made with asynchronous=True",
            )
        address = target.scheduler.address if target.scheduler is not None else "?"
        return _pool(target, f"Dask at {address}", how, 1, ours=())
    try:
        _knock(target, how.timeout, security)
        client = Client(target, timeout=how.timeout, security=security, set_as_default=False)
    except Exception as error:
        raise _unreachable(target, error) from error
    return _pool(client, f"Dask at {target}", how, 1, ours=(client,))


def _pool(client: Client, kind: str, how: Terms, expected: int, ours: tuple[Any, ...]) -> DaskWorkers:
    pool = DaskWorkers(client, kind, how.threads, how.most, how.device, ours)
    try:
        pool.await_workers(expected, how.timeout)
    except BaseException:
        pool.close()
        raise
    return pool


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
