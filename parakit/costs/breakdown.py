"""The terms of a step on N workers: what a step is made of, and how long each term takes.

Owns one formula: a step is the computing of the slowest worker, the exchange that is not hidden behind it, the update,
and a share of what a segment costs. Vectorised in the number of workers.

References
----------
Hockney: "The communication challenge for MPP", Parallel Comput. 20 (1994) 389. Li et al.: "PyTorch distributed", PVLDB
13 (2020) 3005, for buckets that overlap with the backward pass. Stich: "Local SGD converges fast and communicates
little", ICLR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.costs import collectives
from parakit.costs.collectives import Counts, like_given, worker_counts
from parakit.costs.cost_numbers import CostNumbers
from parakit.costs.order_statistics import maximum_normal, maximum_with_stragglers
from parakit.errors import InputError
from parakit.pacing import segment_seconds

__all__ = ["TERMS", "Breakdown", "StepCosts"]

Floats = npt.NDArray[np.float64]

#: What a step is made of, in the order of a step.
TERMS = ("compute", "waiting", "exchange", "update", "control")


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a step goes, in seconds.

    Attributes
    ----------
    workers : int or array
    compute_seconds : float or array
        Of a worker with an average share and luck.
    waiting_seconds : float or array
        For the slowest worker, because of luck, stragglers and uneven shares.
    exchange_seconds : float or array
        Of the exchange, as far as no computing hides it.
    update_seconds, control_seconds : float or array
    """

    workers: Any
    compute_seconds: Any
    waiting_seconds: Any
    exchange_seconds: Any
    update_seconds: Any
    control_seconds: Any

    @property
    def step_seconds(self) -> Any:
        """All of them together."""
        return sum(self.seconds().values())

    def seconds(self) -> dict[str, Any]:
        """The terms by their names, in the order of `TERMS`."""
        return {term: getattr(self, f"{term}_seconds") for term in TERMS}

    def share(self, term: str) -> Any:
        """The part of a step that a term takes, from 0 to 1."""
        if term not in TERMS:
            raise InputError(f"There is no term {term!r}.", remedy=f"choose one of {', '.join(map(repr, TERMS))}")
        return self.seconds()[term] / self.step_seconds


class StepCosts(CostNumbers):
    """What a step takes by some numbers."""

    def rows(self, n: Counts, batch_size: int | None = None) -> Any:
        """Rows in the global batch of N workers."""
        batch = self.batch_size if batch_size is None else batch_size
        return batch * worker_counts(n) if self.weak else batch * np.ones_like(worker_counts(n))

    def crowding(self, n: Counts) -> Any:
        """How many times as long computing takes because workers share cores; 1 where each has its own."""
        counts = worker_counts(n)
        if self.cores is None:
            return like_given(n, np.ones_like(counts))
        here = counts if self.workers_per_node is None else np.minimum(counts, self.workers_per_node)
        return like_given(n, np.maximum(1.0, here * self.threads / self.cores))

    def computing_seconds(self, n: Counts, rows: Any) -> Any:
        """Computing of one of N workers that has some rows of a step."""
        pace = self._slowdown(worker_counts(n)) / self.relative_speed
        return (self.fixed_seconds + np.asarray(rows, np.float64) * self.sample_seconds) * pace

    def updating_seconds(self, n: Counts) -> Any:
        """The update by one of N workers: all make it, or each its part, at the same time."""
        counts = worker_counts(n)
        # Memory is common on a node alone.
        on_one = counts <= (self.workers_per_node or np.inf)
        parts = np.where(on_one, counts, 1.0) if self.divided_update else np.ones_like(counts)
        return like_given(n, self.update_seconds / parts * self._slowdown(counts))

    def _slowdown(self, counts: Floats) -> Floats:
        """How many times as long a worker's own work takes, because workers share cores, and caches and memory."""
        slowdown: Floats = np.asarray(self.crowding(counts)) * (1 + self.contention * self._busy_others(counts))
        return slowdown

    def _busy_others(self, counts: Floats) -> Floats:
        """Threads of other workers that compute on the same node at the same time."""
        if self.cores is None:
            return np.zeros_like(counts)
        here = np.minimum(counts, self.workers_per_node or np.inf) * self.threads
        others: Floats = np.maximum(0.0, np.minimum(here, self.cores) - self.threads)
        return others

    def breakdown(self, n: Counts, batch_size: int | None = None) -> Breakdown:
        """Where the time of a step on N workers goes.

        Parameters
        ----------
        n : int or array
        batch_size : int, optional
            Another one than the model's own.

        Returns
        -------
        Breakdown
            Floats for one number of workers, arrays for several.
        """
        counts = worker_counts(n)
        batch = self.rows(counts, batch_size)
        compute = self.computing_seconds(counts, batch / counts)
        slowest = self._slowest(counts, batch)
        # A worker that none of the rows reaches would be faster than average; nobody waits less than not at all.
        waiting = np.maximum(0.0, slowest - compute)
        update = np.asarray(self.updating_seconds(counts))
        exchanging = np.asarray(self.exposed_exchange_seconds(counts, compute + waiting))
        control = self._control(compute + waiting + exchanging + update)
        parts = (like_given(n, part) for part in (compute, waiting, exchanging, update, control))
        return Breakdown(n, *parts)

    def _slowest(self, counts: Floats, batch: Floats) -> Floats:
        """Computing of the worker that all others wait for: the largest share, and the worst luck."""
        largest = self.computing_seconds(counts, np.ceil(batch / counts - 1e-9))
        together = self._steps_together()
        if together == 1:
            luck = maximum_with_stragglers(counts, self.spread, self.stragglers, self.straggler_times)
        else:
            mean, spread = self._luck()
            luck = mean + spread / np.sqrt(together) * np.asarray(maximum_normal(counts))
        slowest: Floats = np.asarray(largest * luck)
        return slowest

    def _luck(self) -> tuple[float, float]:
        """Mean and standard deviation of a worker's computing, stragglers included, as multiples of the usual."""
        p, times = self.stragglers, self.straggler_times
        mean = 1 + p * (times - 1)
        square = (1 + self.spread**2) * (1 - p + p * times**2)
        return mean, float(np.sqrt(max(0.0, square - mean**2)))

    def _steps_together(self) -> int:
        """Steps that workers do without waiting for each other."""
        return self.local_steps if self.strategy == "local SGD" else 1

    def exchange_seconds(self, n: Counts, nbytes: float | None = None) -> Any:
        """One exchange among N workers, with nothing going on meanwhile.

        Parameters
        ----------
        n : int or array
        nbytes : float, optional
            Of a part of the gradient. Default: all of it.
        """
        counts = worker_counts(n)
        size = self.nbytes if nbytes is None else nbytes
        link = self.network.link
        if self.strategy == "parameter server":
            return collectives.parameter_server(n, size, link, servers=self.servers)
        if self.workers_per_node is None:
            return collectives.all_reduce_seconds(self.algorithm, n, size, link)
        per_node = self.workers_per_node
        inside = (self.within or self.network).link
        on_one = np.asarray(collectives.all_reduce_seconds(self.algorithm, np.minimum(counts, per_node), size, inside))
        spread = np.asarray(
            collectives.hierarchical(
                counts, size, link, within=inside, workers_per_node=per_node, ports=self.ports,
                algorithm="shared memory" if self.algorithm == "shared memory" else "ring",
            )
        )  # fmt: skip
        return like_given(n, np.where(counts <= per_node, on_one, spread))

    def exposed_exchange_seconds(self, n: Counts, computing_seconds: Any) -> Any:
        """What an exchange adds to a step: with buckets, all but the part that the backward pass hides.

        With B buckets, the first can travel when 1/B of the backward pass is done, and the last not before its end:
        max(T_exchange / B, T_exchange - (1 - 1/B) T_backward), in the manner of Li et al. 2020.
        """
        whole = self.buckets * np.asarray(self.exchange_seconds(n, self.nbytes / self.buckets))
        hidden = (1 - 1 / self.buckets) * self.phases[2] * np.asarray(computing_seconds)
        exposed = np.maximum(whole / self.buckets, whole - hidden) / self._steps_together()
        return like_given(n, exposed)

    def _control(self, step_seconds: Floats) -> Floats:
        """A step's share of what its segment costs."""
        steps = np.maximum(1.0, np.round(segment_seconds(self.control_seconds) / np.maximum(step_seconds, 1e-9)))
        share: Floats = self.control_seconds / steps
        return share

    def step_seconds(self, n: Counts, batch_size: int | None = None) -> Any:
        """Time of a step on N workers; a float, or an array where several numbers are given."""
        return self.breakdown(n, batch_size).step_seconds

    def throughput(self, n: Counts, batch_size: int | None = None) -> Any:
        """Samples a second on N workers."""
        return like_given(n, self.rows(n, batch_size) / np.asarray(self.step_seconds(n, batch_size)))

    def predict(self, n: Counts) -> Any:
        """The same as `throughput`, under the name that laws of scaling have for it."""
        return self.throughput(n)

    def speedup(self, n: Counts) -> Any:
        """Throughput of N workers over that of one."""
        return like_given(n, np.asarray(self.throughput(n)) / self.throughput(1))
