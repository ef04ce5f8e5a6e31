"""How the members of a process group find each other: a store kept by one worker, read through Dask's own connections.

No port is opened and no file written for it, and on a cluster with TLS the notes are as safe as everything else. A
store belongs to one generation of one run; a note for an older one is refused, so a late task cannot join.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed import Worker, get_worker
from distributed.utils import sync

from parakit.collectives.base import GroupBroken
from parakit.errors import StaleGeneration
from parakit.system.devices import own
from parakit.workers.remote import heartbeat, release

__all__ = ["HEARTBEAT", "WorkerStore", "forget", "install", "take_gpu"]

_HANDLER = "parakit_store"
#: What a worker is asked for a heartbeat by.
HEARTBEAT = "parakit_heartbeat"
_POLL_SECONDS = 0.002
_ASK_SECONDS = 10.0

_notes: dict[str, tuple[int, dict[str, bytes]]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class WorkerStore:
    """The store of a generation, as a member sees it.

    Parameters
    ----------
    keeper : str
        Address of the worker that keeps the notes: the member of rank 0.
    run_id : str
    generation : int
    """

    keeper: str
    run_id: str
    generation: int

    def set(self, key: str, value: bytes) -> None:
        """Leave a note."""
        self._ask(key, value)

    def get(self, key: str, limit_seconds: float) -> bytes:
        """Read a note, waiting until it is there."""
        deadline = time.monotonic() + limit_seconds
        while (value := self._ask(key, None)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"No note {key!r} of generation {self.generation} came in {limit_seconds:g} s.")
            time.sleep(_POLL_SECONDS)
        return value

    def _ask(self, key: str, value: bytes | None) -> bytes | None:
        worker = get_worker()
        if worker.address == self.keeper:
            found = _answer(self.run_id, self.generation, key, value)
        else:
            try:
                found = sync(worker.loop, self._ask_keeper, worker, key, value, callback_timeout=_ASK_SECONDS)
            except (OSError, TimeoutError) as error:
                raise GroupBroken(
                    f"The member that keeps the store cannot be reached: {type(error).__name__}: {error}",
                    cause="it died while the group was formed",
                ) from error
        if found.get("stale"):
            raise StaleGeneration(f"Generation {self.generation} of run {self.run_id} was replaced by a newer one.")
        answer: bytes | None = found["value"]
        return answer

    async def _ask_keeper(self, worker: Worker, key: str, value: bytes | None) -> dict[str, Any]:
        keeper = worker.rpc(self.keeper)
        reply: dict[str, Any] | None = await getattr(keeper, _HANDLER)(
            run_id=self.run_id, generation=self.generation, key=key, value=value
        )
        if reply is None:  # what Dask answers where nobody taught the worker to keep stores
            raise GroupBroken(
                "The member that was to keep the store is gone, and another process is at its address.",
                cause="it died while the group was formed, and was started anew",
            )
        return reply


def _answer(run_id: str, generation: int, key: str, value: bytes | None) -> dict[str, Any]:
    with _lock:
        newest, notes = _notes.get(run_id, (-1, {}))
        if generation < newest:
            return {"stale": True, "value": None}
        if generation > newest:
            notes = {}
            _notes[run_id] = generation, notes
        if value is not None:
            notes[key] = bytes(value)
        return {"stale": False, "value": notes.get(key)}


def install(dask_worker: Worker) -> None:
    """Let a worker keep stores and give heartbeats; done once on every worker of a pool."""

    def handle(run_id: str, generation: int, key: str, value: bytes | None) -> dict[str, Any]:
        return _answer(run_id, generation, key, value)

    def give_heartbeat(run_id: str) -> dict[str, Any]:
        # On the event loop, beside the thread that carries out orders.
        found = heartbeat(run_id)
        return {} if found is None else {"still_seconds": found.still_seconds, "waiting": found.waiting}

    dask_worker.handlers[_HANDLER] = handle
    dask_worker.handlers[HEARTBEAT] = give_heartbeat


def take_gpu(given: Mapping[str, str], dask_worker: Worker) -> None:
    """Compute on the GPU that this worker is given, by its address."""
    own(given[dask_worker.address])


def forget(run_id: str) -> None:
    """Let go of everything that a run holds on this worker."""
    release(run_id)
    with _lock:
        _notes.pop(run_id, None)
