"""`connect`: from what a user has to a pool of workers."""

from __future__ import annotations

from typing import Any

import psutil

from parakit.errors import InputError, WorkerCountError
from parakit.system.cores import usable_cores
from parakit.system.devices import DEVICES
from parakit.validation import brief, check_choice, plain
from parakit.workers.inline import InlineWorkers
from parakit.workers.pool import Workers

__all__ = ["connect"]

_LEAST_BYTES = 100 << 20  # of memory for a local process with torch; it is more like three times that


def connect(
    target: Any = None,
    *,
    threads: int | None = None,
    most: int | None = None,
    device: str = "cpu",
    security: Any = None,
    timeout: float = 60.0,
) -> Workers:
    """Connect to workers that train models.

    Parameters
    ----------
    target : int, str, Client, Cluster or None
        A number starts that many warm processes on this machine (None: one a core, or one a GPU), which listen on
        loopback only. A string is the address of a Dask scheduler, or "inline" for virtual workers in this process. A
        `distributed.Client` or any Dask cluster object is used as it is, and never shut down from here.
    threads : int, optional
        Threads that torch uses in each worker, the same for every worker count. Default: 1 on Dask workers; what
        torch uses already for "inline".
    most : int, optional
        How far the pool may grow when a run is resized beyond it. Default: for local processes, the larger of
        their number and twice the machine's cores; for a cluster that can scale, no limit of ours.
    device : {"cpu", "cuda"}
        Where the workers compute. With "cuda" each has the GPU that the fewest others have, of those it sees, and
        holds model and chunks there; give data and model as for CPUs. Tensors that a function captures stay where
        they are. Gradients are added up by torch.distributed (gloo, through the memory of the hosts), and `cores`,
        wherever it is shown, counts GPUs.
    security : distributed.security.Security, optional
        For an address with TLS.
    timeout : float
        Seconds to wait for the workers.

    Returns
    -------
    Workers
        Also a context manager.

    Raises
    ------
    WorkerCountError
        For a number below 1, or more processes than fit into this machine's memory.
    InputError
        For something that workers cannot be reached by, or a GPU in this process where there is none.
    ConnectError
        If the workers cannot be reached in time, or lack torch, parakit or a GPU, or have other versions.

    Examples
    --------
    >>> import parakit as pk
    >>> with pk.connect("inline") as workers:
    ...     print(workers.size)
    1
    """
    target, threads, most, timeout = map(plain, (target, threads, most, timeout))
    _check_options(threads, most, timeout)
    _check_device(device, threads)
    if isinstance(target, str) and target == "inline":
        return InlineWorkers(threads, device)
    if isinstance(target, bool) or (isinstance(target, int) and target < 1):
        raise WorkerCountError(
            f"The number of workers is {target!r}; it must be a whole number of at least 1.",
            remedy='connect(2) starts two local processes; connect("inline") needs no process at all',
        )
    if isinstance(target, int):
        _check_local(target, most)
    if isinstance(target, str) and ":" not in target:
        raise InputError(
            f"{target!r} is no scheduler's address: it names no port.",
            remedy='connect("tcp://host:8786") for a scheduler, connect("inline") for this process, or connect(2)',
        )
    # Dask is imported when it is needed: "inline" starts without it.
    from parakit.workers.dask.connect import Terms, connect_client, connect_cluster, connect_local, what_is

    kind = what_is(target)
    how = Terms(threads or 1, most, device, timeout)
    if kind == "local":
        return connect_local(target, how)
    if kind == "cluster":
        return connect_cluster(target, how)
    if kind in ("address", "client"):
        return connect_client(target, how, security)
    raise InputError(
        f"parakit cannot reach workers through {brief(target)}.",
        remedy='give a number, "inline", a scheduler\'s address such as "tcp://host:8786", a Client or a Cluster',
    )


def _check_local(count: int, most: int | None) -> None:
    """Refuse what could not be started here."""
    memory = psutil.virtual_memory().total
    if count * _LEAST_BYTES > memory:
        raise WorkerCountError(
            f"{count} local processes cannot run here: this machine has {memory >> 20} MB of memory, and each needs "
            f"at least {_LEAST_BYTES >> 20} MB.",
            remedy=f"about one process a core is best; this machine has {usable_cores()}",
        )
    if most is not None and most < count:
        raise InputError(
            f"The pool cannot start with {count} workers and grow to at most {most}.",
            remedy=f"most={count} or more, or leave it out",
        )


def _check_device(device: Any, threads: Any) -> None:
    check_choice("device", device, DEVICES)
    if device != "cpu" and threads is not None:
        raise InputError(
            f"threads is {brief(threads)}, but workers on GPUs have one thread each.",
            cause="threads are what torch computes with on cores",
            remedy="leave threads out",
        )


def _check_options(threads: Any, most: Any, timeout: Any) -> None:
    for name, value in (("threads", threads), ("most", most)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {brief(value)}; it must be a whole number of at least 1, or None.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise InputError(f"timeout is {brief(timeout)}; it must be a number of seconds above 0.")
