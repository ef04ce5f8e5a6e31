"""Sending values to workers, as long as they give signs of life: Dask itself would wait for a stopped one for ever."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from parakit.errors import WorkerLost
from parakit.system.threads import in_thread
from parakit.workers.dask.liveness import Heartbeats
from parakit.workers.dask.worker_ids import address_of

if TYPE_CHECKING:
    from parakit.workers.dask.pool import DaskWorkers

__all__ = ["send"]

_LOOK_SECONDS = 0.25


def send(pool: DaskWorkers, run_id: str, value: Any, name: str, silent_seconds: float) -> Any:
    """A value in the memory of a worker, as a future.

    Parameters
    ----------
    pool : DaskWorkers
    run_id : str
        In which the worker is asked for its heartbeat.
    value : object
    name : str
        The worker.
    silent_seconds : float
        How long it may give no sign of life. However long the value travels, it goes on while there are some.

    Raises
    ------
    WorkerLost
        If it gives none, and is done without from then on; or if it is gone.
    """
    sending = in_thread(pool.client.scatter, [value], workers=[address_of(name)], hash=False)
    heartbeats = Heartbeats(pool, run_id, time.monotonic())
    while not sending.done():
        try:
            sending.exception(_LOOK_SECONDS)
        except TimeoutError:
            now = time.monotonic()
            heartbeats.take([name], now)
            if now - heartbeats.heard_at(name) > silent_seconds:
                pool.exclude([name])
                raise WorkerLost(
                    f"{pool.label(name)} gave no sign of life for {silent_seconds:g} s while data were sent to it."
                ) from None
    error = sending.exception()
    if error is not None:
        raise WorkerLost(f"{pool.label(name)} could not be sent its data: {type(error).__name__}.") from error
    return sending.result()[0]
