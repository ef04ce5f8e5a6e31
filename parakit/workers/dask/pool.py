"""A pool of Dask workers: who is there, whether they can train, and what may be asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import Future as LocalFuture
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distributed import Client, wait
from distributed.deploy import Cluster

from parakit.errors import ConnectError, WorkerLost
from parakit.system.devices import WHY_NO_GPU, gpus_here, share_out
from parakit.system.threads import in_thread
from parakit.workers.commands import Heartbeat
from parakit.workers.dask import store
from parakit.workers.dask.map import map_on
from parakit.workers.dask.session import DaskSession
from parakit.workers.dask.worker_ids import Incarnations, address_of, host_of
from parakit.workers.pool import Workers
from parakit.workers.session import Job

__all__ = ["DaskWorkers"]

_CLOSE_SECONDS = 20.0
_FAMILIAR = ("broadcast to", "Removing worker", "Couldn't gather keys")
_ASK_SECONDS = 30.0
_LOOK_SECONDS = 0.25
_READMIT_SECONDS = 1.0
_CANCELLED = (asyncio.CancelledError, CancelledError)


class DaskWorkers(Workers):
    """Workers of a Dask cluster; use `parakit.connect` to make one.

    Parameters
    ----------
    client : Client
    kind : str
    threads : int
    most : int or None
        How far the pool may grow; None where nobody can be asked.
    device : {"cpu", "cuda"}
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
        self, client: Client, kind: str, threads: int, most: int | None, device: str, expected: int, timeout: float,
        cluster: Cluster | None, ours: Sequence[Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.client = client
        self.kind = kind
        self.threads = threads
        self.device = device
        self.cores = 0
        self._cores_of: dict[str, int] = {}  # hosts, or GPUs
        self._most = most
        self._cluster = cluster
        self._ours = tuple(ours)
        self._lives = Incarnations()
        self._ready: set[str] = set()
        if self._local:
            for logger in ("distributed.scheduler", "distributed.nanny"):
                logging.getLogger(logger).addFilter(_of_no_concern)
        self._labels: dict[str, Any] = {}  # of all workers ever seen: a lost one is still named
        self._pids: dict[str, int] = {}
        self._hosts: dict[str, str] = {}
        self._gpus: dict[str, str] = {}  # that workers compute on
        self._banished: set[str] = set()
        try:
            self._await_workers(expected, timeout)
            self.make_ready(self.names)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The workers that can work now, in the order of Dask's names; here they are known by their addresses.

        A process at an address where another one died has a name of its own; `parakit.workers.dask.worker_ids` says how
        to read it.
        """
        # A worker that is paused or about to leave takes no orders any more.
        workers = {
            name: found["name"] for name, found in self._workers().items()
            if name not in self._banished and found.get("status", "running") == "running"
        }  # fmt: skip
        return tuple(sorted(workers, key=lambda name: _natural(workers[name])))

    @property
    def most(self) -> int:
        """How far the pool can grow."""
        return self.size if self._most is None else max(self._most, self.size)

    @property
    def one_host(self) -> bool:
        """Whether all workers that were looked at are on one host."""
        return len(set(self._hosts.values())) == 1

    @property
    def hosts(self) -> tuple[str, ...]:
        """What each worker's address says of its host: workers that listen on one address are processes of one."""
        return tuple(host_of(name) for name in self.names)

    @property
    def memory_limits(self) -> tuple[int, ...]:
        """What Dask lets each worker use."""
        return tuple(int(found.get("memory_limit") or 0) for found in self._workers().values())

    @property
    def dashboard(self) -> str:
        """Address of the Dask dashboard."""
        return str(self.client.dashboard_link)

    @property
    def maps_memory(self) -> bool:  # type: ignore[override]  # it depends on where the workers are
        """Whether all workers are processes of this machine that were started here."""
        return self._local

    @property
    def _local(self) -> bool:
        """Whether the workers are processes that were started here."""
        return any(thing is self._cluster for thing in self._ours)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers there are now, by their short names: for looking at them, or for trials of faults.

        They are those of the machine that a worker runs on.
        """
        there = self.names
        self.make_ready(there)
        return {self.label(name): self._pids[name] for name in there}

    def label(self, name: str) -> str:
        """A short name for a worker, also for one that has gone."""
        short = self._labels.get(name, name)
        return f"worker {short}" if isinstance(short, int) else str(short)

    def grow(self, count: int) -> None:
        """Ask the cluster for more workers."""
        if self._cluster is None:
            raise ConnectError(
                "This pool cannot grow: it was connected by an address.",
                remedy="start more workers on the cluster, or connect with its Cluster object",
            )
        # To scale is to shrink where the cluster counts on more: some of them may only be away for a moment.
        planned = len(getattr(self._cluster, "plan", ()))
        if count > planned:
            self._cluster.scale(count)

    def open(self, job: Job) -> DaskSession:
        """Begin a run."""
        self.check_open()
        self._readmit()
        return DaskSession(self, job)

    def exclude(self, names: Iterable[str]) -> None:
        """Do without workers that hang.

        A local one is killed, which frees those that wait for it at once, and Dask starts another in its place. One of
        somebody else's cluster is left alone, and not used before the next run that finds it awake.
        """
        for name in names:
            self._banished.add(name)
            if self._local and name in self._pids:
                with contextlib.suppress(OSError):
                    os.kill(self._pids[name], signal.SIGKILL)

    def _readmit(self) -> None:
        """Take banished workers back that answer by now."""
        asked = {name: self.ask_heartbeat(name, "") for name in self._banished & set(self._workers())}
        for name, answer in asked.items():
            with contextlib.suppress(Exception):
                answer.result(_READMIT_SECONDS)
                self._banished.discard(name)

    def ask_heartbeat(self, name: str, run_id: str) -> LocalFuture[Heartbeat]:
        """Ask a worker for its heartbeat in a run, without waiting; fails if the worker cannot be asked."""
        scheduler, loop, address = self.client.scheduler, self.client.loop, address_of(name)
        assert scheduler is not None
        assert loop is not None

        async def ask() -> Heartbeat:
            message = {"op": store.PULSE, "run_id": run_id}
            told = await scheduler.broadcast(msg=message, workers=[address], on_error="ignore")
            if address not in told:
                raise WorkerLost(f"{address} cannot be asked.")
            return Heartbeat(**told[address]) if told[address] else Heartbeat(0.0, False)

        return asyncio.run_coroutine_threadsafe(ask(), loop.asyncio_loop)  # type: ignore[attr-defined]

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Apply an importable function to items, on the workers."""
        self.check_open()
        return map_on(self, function, items, limit_seconds)

    def wait_for_one(self, futures: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Wait until one of some futures is done, up to a limit; those that are not."""
        if not futures:
            return []
        # A future that was cancelled, as all are when the scheduler is gone, is done too.
        with contextlib.suppress(TimeoutError, *_CANCELLED), self.client.as_current():
            wait(futures, timeout=limit_seconds, return_when="FIRST_COMPLETED")
        return [future for future in futures if not future.done()]

    def make_ready(self, names: Iterable[str]) -> None:
        """Check workers that are new to this pool, and teach them to keep boards."""
        fresh = [name for name in names if name not in self._ready]
        if fresh:
            self._survey(fresh)
            self._run(store.install, fresh)
            self._ready.update(fresh)

    def _run(self, function: Callable[..., Any], names: Sequence[str], *args: Any) -> dict[str, Any]:
        """Call a function in the event loop of some workers, up to a limit, and as long as they are there."""
        addresses = {name: address_of(name) for name in names}
        calling = in_thread(self.client.run, function, *args, workers=list(addresses.values()))
        deadline = time.monotonic() + _ASK_SECONDS
        while time.monotonic() < deadline:
            found: dict[str, Any] | None = None
            try:
                found = calling.result(_LOOK_SECONDS)
            except TimeoutError as error:
                if calling.done():
                    raise WorkerLost(f"One of {len(names)} workers did not answer in time.") from error
            except OSError as error:  # a connection that broke: what is called here raises none
                raise WorkerLost(f"One of {len(names)} workers died before it answered.") from error
            # Dask would try to reach one that is gone for many seconds; or another came at its address, and answered.
            if set(names) - set(self._workers()):
                raise WorkerLost(f"One of {len(names)} workers died before it answered.")
            if found is not None:
                return {name: found[address] for name, address in addresses.items()}
        raise WorkerLost(f"One of {len(names)} workers did not answer within {_ASK_SECONDS:g} s.")

    def _workers(self) -> dict[str, dict[str, Any]]:
        """What the scheduler knows of each worker, by its name."""
        # The client's own scheduler_info() shares its answer with a refresh that runs now and then and asks for no
        # workers at all; read in the wrong moment, it says that everybody is gone.
        if self.client.status != "running" or self.client.scheduler is None:
            return {}
        try:
            identity = self.client.sync(self.client.scheduler.identity, n_workers=-1, callback_timeout=_ASK_SECONDS)
        except OSError:  # the scheduler is gone, and with it everybody
            return {}
        workers: dict[str, dict[str, Any]] = {
            self._lives.name(address, told.get("local_directory")): told
            for address, told in identity["workers"].items()
        }
        self._labels.update({name: told["name"] for name, told in workers.items()})
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

    def _survey(self, names: Sequence[str]) -> None:
        """Check that workers have what training needs, and see what they compute with."""
        found = self._run(_surveyor(), names)
        ours = _surveyor()()
        wrong = {name: told for name, facts in found.items() if (told := _lacks(facts, ours))}
        if wrong:
            name, told = next(iter(wrong.items()))
            raise ConnectError(
                f"{len(wrong)} of {len(found)} workers cannot train; {address_of(name)} {told}.",
                cause="the workers run in another environment than this notebook",
                remedy=f"install there: pip install parakit=={ours['parakit']} torch=={ours['torch']} "
                f"(Python {ours['python']})",
            )
        self._pids.update({name: facts["pid"] for name, facts in found.items()})
        self._hosts.update({name: facts["host"] for name, facts in found.items()})
        if self.device == "cpu":
            self._cores_of.update({facts["host"]: facts["cores"] for facts in found.values()})
        else:
            self._share_gpus_out(names)
        self.cores = sum(self._cores_of.values())

    def _share_gpus_out(self, names: Sequence[str]) -> None:
        """Tell workers which GPU each is to compute on."""
        seen: dict[str, tuple[str, ...]] = self._run(gpus_here, names)
        blind = [name for name, gpus in seen.items() if not gpus]
        if blind:
            raise ConnectError(
                f"{len(blind)} of {len(seen)} workers see no GPU; {self.label(blind[0])} is one.",
                cause=WHY_NO_GPU,
                remedy='compute on cores: connect(..., device="cpu"); or install torch with CUDA where the GPUs are',
            )
        there = self._workers()
        self._gpus = {name: gpu for name, gpu in self._gpus.items() if name in there}
        given = share_out(seen, self._gpus)
        self._run(store.take_gpu, names, {address_of(name): gpu for name, gpu in given.items()})
        self._gpus.update(given)
        self._cores_of.update({gpu: 1 for gpus in seen.values() for gpu in gpus})

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


def _of_no_concern(record: logging.LogRecord) -> bool:
    """Leaves out what Dask logs when a worker dies while it is asked, read or started: a run tells that in words."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info, tuple) and record.exc_info[0] in _CANCELLED
    return not cancelled and not str(record.msg).startswith(_FAMILIAR)


def _natural(name: Any) -> tuple[int, int, str]:
    return (0, name, "") if isinstance(name, int) else (1, 0, str(name))


def _surveyor() -> Callable[[], dict[str, Any]]:
    """A function that runs also where parakit is missing: being local, it travels by value."""

    def survey() -> dict[str, Any]:
        import os
        import platform

        from dask.system import cpu_count

        facts: dict[str, Any] = {"host": platform.node(), "cores": cpu_count(), "pid": os.getpid()}
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
