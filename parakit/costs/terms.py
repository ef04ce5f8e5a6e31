"""The terms of a step on N workers, by a cost model.

Owns one formula: a step is the computing of the slowest worker, the exchange that is not hidden behind it, the update,
and a share of what a segment costs. Vectorised in the number of workers; refuses to know where a model's numbers came
from.

References
----------
Hockney: "The communication challenge for MPP", Parallel Comput. 20 (1994) 389. Li et al.: "PyTorch distributed", PVLDB
13 (2020) 3005, for buckets that overlap with the backward pass. Stich: "Local SGD converges fast and communicates
little", ICLR 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from parakit.costs import collectives
from parakit.costs.breakdown import Breakdown
from parakit.costs.collectives import Counts, like_given, worker_counts
from parakit.costs.order_statistics import maximum_normal, maximum_with_stragglers
from parakit.pacing import segment_seconds

if TYPE_CHECKING:
    from parakit.costs.model import CostModel

__all__ = [
    "breakdown", "computing_seconds", "crowding", "exchange_seconds", "exposed_exchange_seconds",
    "rows", "updating_seconds",
]  # fmt: skip

Floats = npt.NDArray[np.float64]


def rows(model: CostModel, n: Counts, batch_size: int | None = None) -> Any:
    """Rows in the global batch of N workers."""
    batch = model.batch_size if batch_size is None else batch_size
    return batch * worker_counts(n) if model.weak else batch * np.ones_like(worker_counts(n))


def crowding(model: CostModel, n: Counts) -> Any:
    """How many times as long computing takes because workers share cores; 1 where each has its own."""
    counts = worker_counts(n)
    if model.cores is None:
        return like_given(n, np.ones_like(counts))
    here = counts if model.workers_per_node is None else np.minimum(counts, model.workers_per_node)
    return like_given(n, np.maximum(1.0, here * model.threads / model.cores))


def computing_seconds(model: CostModel, n: Counts, share: Any) -> Any:
    """Computing of one of N workers whose share of a step is so many rows."""
    pace = _slowdown(model, worker_counts(n)) / model.relative_speed
    return (model.fixed_seconds + np.asarray(share, np.float64) * model.sample_seconds) * pace


def updating_seconds(model: CostModel, n: Counts) -> Any:
    """The update by one of N workers: all make it, or each its part, at the same time."""
    counts = worker_counts(n)
    # Memory is common on a node alone.
    on_one = counts <= (model.workers_per_node or np.inf)
    parts = np.where(on_one, counts, 1.0) if model.divided_update else np.ones_like(counts)
    return like_given(n, model.update_seconds / parts * _slowdown(model, counts))


def _slowdown(model: CostModel, counts: Floats) -> Floats:
    """How many times as long a worker's own work takes, because workers share cores, and caches and memory."""
    slowdown: Floats = np.asarray(crowding(model, counts)) * (1 + model.contention * _busy_others(model, counts))
    return slowdown


def _busy_others(model: CostModel, counts: Floats) -> Floats:
    """Threads of other workers that compute on the same node at the same time."""
    if model.cores is None:
        return np.zeros_like(counts)
    here = np.minimum(counts, model.workers_per_node or np.inf) * model.threads
    others: Floats = np.maximum(0.0, np.minimum(here, model.cores) - model.threads)
    return others


def breakdown(model: CostModel, n: Counts, batch_size: int | None = None) -> Breakdown:
    """Where the time of a step on N workers goes; floats for one number of workers, arrays for several."""
    counts = worker_counts(n)
    batch = rows(model, counts, batch_size)
    compute = computing_seconds(model, counts, batch / counts)
    slowest = _slowest(model, counts, batch)
    # A worker that none of the rows reaches would be faster than average; nobody waits less than not at all.
    waiting = np.maximum(0.0, slowest - compute)
    update = np.asarray(updating_seconds(model, counts))
    exchanging = np.asarray(exposed_exchange_seconds(model, counts, compute + waiting))
    control = _control(model, compute + waiting + exchanging + update)
    parts = (like_given(n, part) for part in (compute, waiting, exchanging, update, control))
    return Breakdown(n, *parts)


def _slowest(model: CostModel, counts: Floats, batch: Floats) -> Floats:
    """Computing of the worker that all others wait for: the largest share, and the worst luck."""
    largest = computing_seconds(model, counts, np.ceil(batch / counts - 1e-9))
    together = _steps_together(model)
    if together == 1:
        luck = maximum_with_stragglers(counts, model.spread, model.stragglers, model.straggler_times)
    else:
        mean, spread = _luck(model)
        luck = mean + spread / np.sqrt(together) * np.asarray(maximum_normal(counts))
    slowest: Floats = np.asarray(largest * luck)
    return slowest


def _luck(model: CostModel) -> tuple[float, float]:
    """Mean and standard deviation of a worker's computing, stragglers included, as multiples of the usual."""
    p, times = model.stragglers, model.straggler_times
    mean = 1 + p * (times - 1)
    square = (1 + model.spread**2) * (1 - p + p * times**2)
    return mean, float(np.sqrt(max(0.0, square - mean**2)))


def _steps_together(model: CostModel) -> int:
    """Steps that workers do without waiting for each other."""
    return model.local_steps if model.strategy == "local SGD" else 1


def exchange_seconds(model: CostModel, n: Counts, nbytes: float | None = None) -> Any:
    """One exchange among N workers, with nothing going on meanwhile; of all of the gradient, or some bytes of it."""
    counts = worker_counts(n)
    size = model.nbytes if nbytes is None else nbytes
    link = model.network.link
    if model.strategy == "parameter server":
        return collectives.parameter_server(n, size, link, servers=model.servers)
    if model.workers_per_node is None:
        return collectives.all_reduce_seconds(model.algorithm, n, size, link)
    per_node = model.workers_per_node
    inside = (model.within or model.network).link
    on_one = np.asarray(collectives.all_reduce_seconds(model.algorithm, np.minimum(counts, per_node), size, inside))
    spread = np.asarray(
        collectives.hierarchical(
            counts, size, link, within=inside, workers_per_node=per_node, ports=model.ports,
            algorithm="shared memory" if model.algorithm == "shared memory" else "ring",
        )
    )  # fmt: skip
    return like_given(n, np.where(counts <= per_node, on_one, spread))


def exposed_exchange_seconds(model: CostModel, n: Counts, computing: Any) -> Any:
    """What an exchange adds to a step of so many seconds of computing.

    With B buckets, the first can travel when 1/B of the backward pass is done, and the last not before its end:
    max(T_exchange / B, T_exchange - (1 - 1/B) T_backward), in the manner of Li et al. 2020.
    """
    whole = model.buckets * np.asarray(exchange_seconds(model, n, model.nbytes / model.buckets))
    hidden = (1 - 1 / model.buckets) * model.phases[2] * np.asarray(computing)
    exposed = np.maximum(whole / model.buckets, whole - hidden) / _steps_together(model)
    return like_given(n, exposed)


def _control(model: CostModel, step_seconds: Floats) -> Floats:
    """A step's share of what its segment costs."""
    steps = np.maximum(1.0, np.round(segment_seconds(model.control_seconds) / np.maximum(step_seconds, 1e-9)))
    share: Floats = model.control_seconds / steps
    return share
