"""The workers of a Dask cluster: who is there, whether they can train, and what they do at a call.

A process at an address where another one died has a name of its own; `parakit.workers.dask.worker_ids` says how to read
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import Future as LocalFuture
from concurrent.futures import wait as wait_for_threads
from typing import Any

from distributed import Client, wait

from parakit.errors import ConnectError, WorkerLost
from parakit.system.devices import WHY_NO_GPU, gpus_here, share_out
from parakit.system.threads import in_thread
from parakit.workers.commands import Heartbeat
from parakit.workers.dask import store
from parakit.workers.dask.liveness import Limits, await_while_alive
from parakit.workers.dask.survey import surveyor, what_is_lacking
from parakit.workers.dask.worker_ids import Incarnations, address_of

__all__ = ["DaskCluster"]

_FAMILIAR = ("broadcast to", "Removing worker", "Couldn't gather keys")
_ASK_SECONDS = 30.0
_ANSWERS = Limits(whole_seconds=_ASK_SECONDS, look_seconds=0.25)
_READMIT_SECONDS = 1.0
_CANCELLED = (asyncio.CancelledError, CancelledError)


class DaskCluster:
    """The workers of a Dask cluster, as a client sees them.

    Parameters
    ----------
    client : Client
    device : {"cpu", "cuda"}
        What they are to compute on.
    local : bool
        Whether they are processes that were started here.

    Attributes
    ----------
    cores_of : dict of str to int
        The cores of each host that was looked at; where workers compute on GPUs, 1 for each GPU.
    excluded : set of str
        Workers to do without, as they hung.
    """

    def __init__(self, client: Client, device: str, *, local: bool) -> None:
        self.client = client
        self.device = device
        self.local = local
        self.cores_of: dict[str, int] = {}
        self.excluded: set[str] = set()
        self._incarnations = Incarnations()
        self._ready: set[str] = set()
        self._labels: dict[str, Any] = {}  # of all workers ever seen: a lost one is still named
        self._pids: dict[str, int] = {}
        self._hosts: dict[str, str] = {}
        self._gpus: dict[str, str] = {}  # that workers compute on
        if local:
            for logger in ("distributed.scheduler", "distributed.nanny"):
                logging.getLogger(logger).addFilter(_of_no_concern)

    # --- who is there

    @property
    def names(self) -> tuple[str, ...]:
        """The workers that can work now, in the order of Dask's names; here they are known by their addresses."""
        # A worker that is paused or about to leave takes no orders any more.
        workers = {
            name: found["name"] for name, found in self.known().items()
            if name not in self.excluded and found.get("status", "running") == "running"
        }  # fmt: skip
        return tuple(sorted(workers, key=lambda name: _natural(workers[name])))

    def known(self) -> dict[str, dict[str, Any]]:
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
            self._incarnations.name(address, told.get("local_directory")): told
            for address, told in identity["workers"].items()
        }
        self._labels.update({name: told["name"] for name, told in workers.items()})
        return workers

    def label(self, name: str) -> str:
        """A short name for a worker, also for one that has gone."""
        short = self._labels.get(name, name)
        return f"worker {short}" if isinstance(short, int) else str(short)

    @property
    def hosts(self) -> set[str]:
        """What the workers that were looked at call their hosts."""
        return set(self._hosts.values())

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers there are now, by their short names."""
        there = self.names
        self.make_ready(there)
        return {self.label(name): self._pids[name] for name in there}

    def await_workers(self, count: int, seconds: float, kind: str) -> None:
        """Wait until so many workers have come, on what a pool's kind says."""
        try:
            self.client.wait_for_workers(count, timeout=seconds)
        except TimeoutError as error:
            raise ConnectError(
                f"{len(self.known())} of {count} workers came within {seconds:g} s ({kind}).",
                cause="a cluster without free machines, or workers that fail as they start",
                remedy="look at the workers' logs, or wait longer: connect(..., timeout=300)",
            ) from error

    # --- who is done without

    def exclude(self, names: Iterable[str]) -> None:
        """Do without workers that hang.

        A local one is killed, which frees those that wait for it at once, and Dask starts another in its place. One of
        somebody else's cluster is left alone, and not used before the next run that finds it awake.
        """
        for name in names:
            self.excluded.add(name)
            if self.local and name in self._pids:
                with contextlib.suppress(OSError):
                    os.kill(self._pids[name], signal.SIGKILL)

    def readmit(self) -> None:
        """Take excluded workers back that answer by now."""
        asked = {name: self.ask_heartbeat(name, "") for name in self.excluded & set(self.known())}
        wait_for_threads(asked.values(), _READMIT_SECONDS)
        self.excluded -= {name for name, answer in asked.items() if _is_good(answer)}

    # --- what they are asked

    def ask_heartbeat(self, name: str, run_id: str) -> LocalFuture[Heartbeat]:
        """Ask a worker for its heartbeat in a run, without waiting; fails if the worker cannot be asked."""
        scheduler, loop, address = self.client.scheduler, self.client.loop, address_of(name)
        assert scheduler is not None
        assert loop is not None

        async def ask() -> Heartbeat:
            message = {"op": store.HEARTBEAT, "run_id": run_id}
            told = await scheduler.broadcast(msg=message, workers=[address], on_error="ignore")
            if address not in told:
                raise WorkerLost(f"{address} cannot be asked.")
            return Heartbeat(**told[address]) if told[address] else Heartbeat(0.0, False)

        return asyncio.run_coroutine_threadsafe(ask(), loop.asyncio_loop)  # type: ignore[attr-defined]

    def wait_for_one(self, futures: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Wait until one of some futures is done, up to a limit; those that are not. Dask's futures, or threads'."""
        if not futures:
            return []
        if isinstance(futures[0], LocalFuture):
            wait_for_threads(futures, limit_seconds, "FIRST_COMPLETED")
        else:
            # A future that was cancelled, as all are when the scheduler is gone, is done too.
            with contextlib.suppress(TimeoutError, *_CANCELLED), self.client.as_current():
                wait(futures, timeout=limit_seconds, return_when="FIRST_COMPLETED")
        return [future for future in futures if not future.done()]

    def send(self, value: Any, name: str, silent_seconds: float, run_id: str) -> Any:
        """A value in the memory of a worker, as a future.

        Parameters
        ----------
        value : object
        name : str
            The worker.
        silent_seconds : float
            How long it may give no sign of life. However long the value travels, it goes on while there are some; Dask
            itself would wait for a stopped worker for ever.
        run_id : str
            In which the worker is asked for its heartbeat.

        Raises
        ------
        WorkerLost
            If it gives none, and is done without from then on; or if it is gone.
        """
        sending = in_thread(self.client.scatter, [value], workers=[address_of(name)], hash=False)
        outcome = await_while_alive(self, [sending], [name], Limits(silent_seconds), run_id)
        if outcome.hung:
            self.exclude(outcome.hung)
            raise WorkerLost(
                f"{self.label(name)} gave no sign of life for {silent_seconds:g} s while data were sent to it."
            )
        if outcome.gone:
            raise WorkerLost(f"{self.label(name)} could not be sent its data: it is gone.")
        try:
            return sending.result()[0]
        except Exception as error:
            raise WorkerLost(f"{self.label(name)} could not be sent its data: {type(error).__name__}.") from error

    def run(self, function: Callable[..., Any], names: Sequence[str], *args: Any) -> dict[str, Any]:
        """Call a function in the event loop of some workers, up to a limit, and as long as they are there."""
        addresses = {name: address_of(name) for name in names}
        calling = in_thread(self.client.run, function, *args, workers=list(addresses.values()))
        # Dask would try to reach one that is gone for many seconds.
        outcome = await_while_alive(self, [calling], names, _ANSWERS)
        if outcome.late:
            raise WorkerLost(f"One of {len(names)} workers did not answer within {_ASK_SECONDS:g} s.")
        died = f"One of {len(names)} workers died before it answered."
        if outcome.gone:
            raise WorkerLost(died)
        try:
            found = calling.result()
        except TimeoutError as error:
            raise WorkerLost(f"One of {len(names)} workers did not answer in time.") from error
        except OSError as error:  # a connection that broke: what is called here raises none
            raise WorkerLost(died) from error
        if set(names) - set(self.known()):  # another came at the address of one, and answered
            raise WorkerLost(died)
        return {name: found[address] for name, address in addresses.items()}

    # --- whether they can train

    def make_ready(self, names: Iterable[str]) -> None:
        """Check workers that are new here, and teach them to keep stores."""
        fresh = [name for name in names if name not in self._ready]
        if fresh:
            self._survey(fresh)
            self.run(store.install, fresh)
            self._ready.update(fresh)

    def _survey(self, names: Sequence[str]) -> None:
        """Check that workers have what training needs, and see what they compute with."""
        found = self.run(surveyor(), names)
        ours = surveyor()()
        wrong = {name: told for name, facts in found.items() if (told := what_is_lacking(facts, ours))}
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
            self.cores_of.update({facts["host"]: facts["cores"] for facts in found.values()})
        else:
            self._share_gpus_out(names)

    def _share_gpus_out(self, names: Sequence[str]) -> None:
        """Tell workers which GPU each is to compute on."""
        seen: dict[str, tuple[str, ...]] = self.run(gpus_here, names)
        blind = [name for name, gpus in seen.items() if not gpus]
        if blind:
            raise ConnectError(
                f"{len(blind)} of {len(seen)} workers see no GPU; {self.label(blind[0])} is one.",
                cause=WHY_NO_GPU,
                remedy='compute on cores: connect(..., device="cpu"); or install torch with CUDA where the GPUs are',
            )
        there = self.known()
        self._gpus = {name: gpu for name, gpu in self._gpus.items() if name in there}
        given = share_out(seen, self._gpus)
        self.run(store.take_gpu, names, {address_of(name): gpu for name, gpu in given.items()})
        self._gpus.update(given)
        self.cores_of.update({gpu: 1 for gpus in seen.values() for gpu in gpus})


def _of_no_concern(record: logging.LogRecord) -> bool:
    """Leaves out what Dask logs when a worker dies while it is asked, read or started: a run tells that in words."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info, tuple) and record.exc_info[0] in _CANCELLED
    return not cancelled and not str(record.msg).startswith(_FAMILIAR)


def _is_good(answer: LocalFuture[Any]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None


def _natural(name: Any) -> tuple[int, int, str]:
    return (0, name, "") if isinstance(name, int) else (1, 0, str(name))
