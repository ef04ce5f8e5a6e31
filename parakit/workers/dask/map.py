"""Mapping a function over items on the workers of a cluster, whatever becomes of some of them.

Each item goes to one worker. What a worker that died or hangs has not answered is done again by the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from distributed import Future
from distributed.scheduler import KilledWorker

from parakit.errors import WorkerLost
from parakit.workers.dask.cluster import DaskCluster
from parakit.workers.dask.liveness import Limits, await_while_alive
from parakit.workers.dask.worker_ids import address_of

__all__ = ["map_on"]

_ROUNDS = 5  # each of which loses a worker
_SILENT_SECONDS = 10.0  # without a sign of life
_NOBODY = "no run"


def map_on(
    cluster: DaskCluster, function: Callable[[Any], Any], items: Sequence[Any], limit_seconds: float
) -> list[Any]:
    """Apply an importable function to items; its results in the order of the items.

    Parameters
    ----------
    cluster : DaskCluster
    function : callable
        Its errors are raised here.
    items : sequence
    limit_seconds : float
        For all of it.

    Raises
    ------
    WorkerLost
        If nobody is left, or it is not done in time.
    """
    deadline = time.monotonic() + limit_seconds
    results: dict[int, Any] = {}
    loss = WorkerLost("There is no worker in this pool.", cause="all of them died, or the scheduler is gone")
    for _ in range(_ROUNDS):
        missing = [number for number in range(len(items)) if number not in results]
        if not missing or not cluster.names:
            break
        try:
            _do_some(cluster, function, {number: items[number] for number in missing}, results, deadline)
        except WorkerLost as error:
            loss = error
        if time.monotonic() > deadline:
            break
    left = sum(number not in results for number in range(len(items)))
    if left:
        raise WorkerLost(
            f"{left} of {len(items)} tasks were not done within {limit_seconds:g} s: {str(loss).splitlines()[0]}",
            cause="workers that are busy, hang, or have gone",
            remedy="look at the workers, or allow more: limit_seconds=...",
        )
    return [results[number] for number in range(len(items))]


def _do_some(
    cluster: DaskCluster,
    function: Callable[[Any], Any],
    items: dict[int, Any],
    results: dict[int, Any],
    deadline: float,
) -> None:
    """One round: what comes of it is added to the results."""
    names = cluster.names
    cluster.make_ready(names)
    owners = {number: names[place % len(names)] for place, number in enumerate(items)}
    futures: dict[int, Future[Any]] = {}
    for number, item in items.items():
        placed = cluster.send(item, owners[number], _SILENT_SECONDS, _NOBODY)
        place = address_of(owners[number])
        futures[number] = cluster.client.submit(function, placed, workers=[place], pure=False)
    left = max(0.1, deadline - time.monotonic())
    limits = Limits(_SILENT_SECONDS, left, left)
    outcome = await_while_alive(cluster, list(futures.values()), list(owners.values()), limits, _NOBODY)
    if outcome.waiting:
        cluster.client.cancel(list(outcome.waiting))
    cluster.exclude(outcome.hung)  # and not those that are late: somebody else may need them
    for number, future in futures.items():
        if future not in outcome.waiting and _is_an_answer(future):
            results[number] = future.result(timeout=_SILENT_SECONDS)


def _is_an_answer(future: Future[Any]) -> bool:
    """Whether a future holds what the function returned or raised, and not just that its worker is gone."""
    if future.status == "finished":
        return True
    return future.status == "error" and not isinstance(future.exception(timeout=_SILENT_SECONDS), KilledWorker)
