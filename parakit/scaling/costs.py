"""The mechanistic cost model: what a step costs on N workers, term by term, and what would change that.

Owns one formula: a step is the computing of the slowest worker, the exchange that is not hidden behind it, the update,
and a share of what a segment costs. Every term has a cause, so the model can be asked what-if questions that a curve
through throughputs cannot answer. It refuses to fit curves, and to know where its numbers came from.

References
----------
Hockney: "The communication challenge for MPP", Parallel Comput. 20 (1994) 389. Li et al.: "PyTorch distributed", PVLDB
13 (2020) 3005, for buckets that overlap with the backward pass. Stich: "Local SGD converges fast and communicates
little", ICLR 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from parakit.errors import InputError
from parakit.events import History
from parakit.scaling import exchange
from parakit.scaling.breakdown import Breakdown, explain, gains, table
from parakit.scaling.calibration import calibrate
from parakit.scaling.exchange import Counts, like_given, worker_counts
from parakit.scaling.networks import NETWORKS, Network, machine_named, network_named
from parakit.scaling.waiting import check_probability, maximum_normal, maximum_with_stragglers

__all__ = ["CostModel", "costs_of"]

Floats = npt.NDArray[np.float64]

SEGMENT_SECONDS = 0.25
_STRATEGIES = ("all-reduce", "parameter server", "local SGD")


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a training step costs on any number of workers.

    Parameters
    ----------
    sample_seconds : float
        Of computing a sample (data, forward, backward), on a core of its own.
    batch_size : int
        Rows in the global batch; those of each worker where `weak`.
    nbytes : float
        Bytes that each worker exchanges in a step: of its gradient.
    fixed_seconds : float
        Of computing, for each step, however few samples.
    contention : float
        What every other busy core of a node adds to the time of a sample, as a share of it: they share caches and
        memory. Counted where `cores` is known.
    update_seconds : float
        Of the optimizer, for each step.
    control_seconds : float
        Of orders, commit and report, for each segment of a quarter of a second.
    spread : float
        Relative standard deviation of a worker's computing.
    stragglers, straggler_times : float
        How likely a worker straggles in a step, and how many times as long it takes then.
    phases : tuple of three floats
        Shares of data, forward and backward in computing.
    network : Network or str
        What workers exchange through; between nodes where there are several.
    algorithm : str
        Of the all-reduce; see `parakit.scaling.exchange.ALGORITHMS`.
    workers_per_node : int, optional
        With it, more workers than that are spread over nodes, and the exchange is hierarchical.
    within : Network or str, optional
        Network within a node. Default: the same.
    ports : int, optional
        Network ports of a node. Default: one a worker.
    cores : int, optional
        Of a node (of the one machine, without `workers_per_node`); workers beyond them take turns. None: never
        too few.
    threads : int
        Of each worker.
    relative_speed : float
        Of a core, as a multiple of the one that was measured.
    buckets : int
        Pieces in which the gradient is exchanged while the backward pass goes on; 1 exchanges after it.
    weak : bool
        Whether the batch grows with the workers.
    strategy : {"all-reduce", "parameter server", "local SGD"}
    servers : int
        Of the parameter server.
    local_steps : int
        Steps of local SGD between two exchanges.
    task_seconds : float
        Of a task, where a strategy is made of tasks.
    remarks : tuple of str
        What was assumed in calibrating.

    Examples
    --------
    >>> from parakit.scaling.costs import CostModel
    >>> costs = CostModel(sample_seconds=1e-3, batch_size=256, nbytes=4_000_000, network="1GbE")
    >>> round(costs.speedup(8), 1)
    2.8
    >>> round(costs.with_(network="25GbE").speedup(8), 1)
    7.4
    """

    name: ClassVar[str] = "mechanistic"

    sample_seconds: float
    batch_size: int
    nbytes: float
    fixed_seconds: float = 0.0
    contention: float = 0.0
    update_seconds: float = 0.0
    control_seconds: float = 0.0
    spread: float = 0.0
    stragglers: float = 0.0
    straggler_times: float = 3.0
    phases: tuple[float, float, float] = (0.0, 1 / 3, 2 / 3)
    network: Network = NETWORKS["loopback"]
    algorithm: str = "ring"
    workers_per_node: int | None = None
    within: Network | None = None
    ports: int | None = None
    cores: int | None = None
    threads: int = 1
    relative_speed: float = 1.0
    buckets: int = 1
    weak: bool = False
    strategy: str = "all-reduce"
    servers: int = 1
    local_steps: int = 1
    task_seconds: float = 1e-3
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_named(self.network))
        object.__setattr__(self, "algorithm", exchange.algorithm_named(self.algorithm))
        if self.within is not None:
            object.__setattr__(self, "within", network_named(self.within))
        _check_numbers(self)

    @classmethod
    def from_history(
        cls, history: History | Iterable[History], *, algorithm: str | None = None, **changes: Any
    ) -> CostModel:
        """The cost model of what was trained, calibrated from its own events.

        Parameters
        ----------
        history : History, or several
            Of runs of one model. Steps at several worker counts give latency and bandwidth of the exchange; with one
            count, or one worker, some of it is assumed, and `remarks` says what.
        algorithm : str, optional
            Of the exchange. Default: shared memory where the pool says so, else a ring.
        **changes
            As for `with_`.

        Raises
        ------
        InputError
            If there are too few steps.
        """
        found = vars(calibrate(history, algorithm=algorithm))
        return cls(**found).with_(**changes)

    def with_(self, **changes: Any) -> CostModel:
        """What if: the same model, but for some changes.

        Parameters
        ----------
        **changes
            Any of the parameters, such as network="10GbE", batch_size=1024, stragglers=0.0; and machine="server, 16
            cores", which sets the workers of a node, its cores, ports, speed and networks.

        Raises
        ------
        InputError
            If there is no such parameter, or a value cannot be.
        """
        machine = changes.pop("machine", None)
        if machine is not None:
            changes = _of_machine(machine) | changes
        known = [part.name for part in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise InputError(
                f"A cost model has no {', '.join(unknown)}.", remedy=f"change any of {', '.join([*known, 'machine'])}"
            )
        return dataclasses.replace(self, **changes)

    # --- the terms

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
        pace = np.asarray(self.crowding(n)) / self.relative_speed
        sample = self.sample_seconds * (1 + self.contention * self._busy_others(worker_counts(n)))
        return (self.fixed_seconds + np.asarray(rows, np.float64) * sample) * pace

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
        rows = self.rows(counts, batch_size)
        compute = self.computing_seconds(counts, rows / counts)
        slowest = self._slowest(counts, rows)
        # A worker that none of the rows reaches would be faster than average; nobody waits less than not at all.
        waiting = np.maximum(0.0, slowest - compute)
        update = np.full_like(counts, self.update_seconds) * self.crowding(counts)
        exchanging = np.asarray(self.exposed_exchange_seconds(counts, compute + waiting))
        control = self._control(compute + waiting + exchanging + update)
        parts = (like_given(n, part) for part in (compute, waiting, exchanging, update, control))
        return Breakdown(n, *parts)

    def _slowest(self, counts: Floats, rows: Floats) -> Floats:
        """Computing of the worker that all others wait for: the largest share, and the worst luck."""
        largest = self.computing_seconds(counts, np.ceil(rows / counts - 1e-9))
        together = self._steps_together
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

    @property
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
            return exchange.parameter_server(n, size, link, servers=self.servers)
        if self.workers_per_node is None:
            return exchange.all_reduce_seconds(self.algorithm, n, size, link)
        per_node = self.workers_per_node
        inside = (self.within or self.network).link
        on_one = np.asarray(exchange.all_reduce_seconds(self.algorithm, np.minimum(counts, per_node), size, inside))
        spread = np.asarray(
            exchange.hierarchical(counts, size, link, within=inside, workers_per_node=per_node, ports=self.ports)
        )
        return like_given(n, np.where(counts <= per_node, on_one, spread))

    def exposed_exchange_seconds(self, n: Counts, computing_seconds: Any) -> Any:
        """What an exchange adds to a step: with buckets, all but the part that the backward pass hides.

        With B buckets, the first can travel when 1/B of the backward pass is done, and the last not before its end:
        max(T_exchange / B, T_exchange - (1 - 1/B) T_backward), in the manner of Li et al. 2020.
        """
        whole = self.buckets * np.asarray(self.exchange_seconds(n, self.nbytes / self.buckets))
        hidden = (1 - 1 / self.buckets) * self.phases[2] * np.asarray(computing_seconds)
        exposed = np.maximum(whole / self.buckets, whole - hidden) / self._steps_together
        return like_given(n, exposed)

    def _control(self, step_seconds: Floats) -> Floats:
        """A step's share of what its segment costs."""
        steps = np.maximum(1.0, np.round(SEGMENT_SECONDS / np.maximum(step_seconds, 1e-9)))
        share: Floats = self.control_seconds / steps
        return share

    # --- what follows

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

    def gains(self, n: int) -> dict[str, float]:
        """What some changes would do at N workers: throughput with each over throughput now, the best first."""
        return gains(self, n)

    def explain(self, n: int) -> str:
        """Where the time goes at N workers, and which change would help most, in words.

        The advice is computed: every change is tried in the model. A larger batch is praised for its samples a second
        alone; whether they teach as much is another question (`parakit.scaling.noise`).
        """
        return explain(self, n)

    def _repr_html_(self) -> str:
        return table(self)

    def __repr__(self) -> str:
        each = " a worker" if self.weak else ""
        return (
            f"<CostModel: {1e3 * self.sample_seconds:.3g} ms a sample, batch {self.batch_size:,}{each}, "
            f"{self.nbytes / 1e6:.3g} MB by {self.how} over {self.network}>"
        )

    @property
    def how(self) -> str:
        """The way of exchanging, in words."""
        if self.strategy == "parameter server":
            return f"{self.strategy} ({self.servers})"
        local = f" every {self.local_steps} steps" if self.strategy == "local SGD" else ""
        return self.algorithm + local


def costs_of(given: Any) -> CostModel | None:
    """The cost model that something is, has as its `costs`, or can be calibrated to by its history; None if none."""
    if isinstance(given, CostModel):
        return given
    found = getattr(given, "costs", None)
    if isinstance(found, CostModel):
        return found
    history = getattr(given, "history", given)
    return CostModel.from_history(history) if isinstance(history, History) else None


def _of_machine(machine: Any) -> dict[str, Any]:
    """What a machine means for a cost model."""
    node = machine_named(machine)
    return {
        "workers_per_node": node.cores, "cores": node.cores, "ports": node.ports, "threads": 1,
        "relative_speed": node.relative_speed, "within": node.within, "network": node.between,
    }  # fmt: skip


_AT_LEAST_0 = (
    "sample_seconds", "fixed_seconds", "contention", "update_seconds", "control_seconds", "spread", "nbytes",
    "task_seconds",
)  # fmt: skip
_ABOVE_0 = ("relative_speed",)
_WHOLE = ("batch_size", "buckets", "servers", "local_steps", "threads")
_WHOLE_OR_NONE = ("workers_per_node", "cores", "ports")


def _check_numbers(model: CostModel) -> None:
    for name in (*_AT_LEAST_0, *_ABOVE_0):
        value = getattr(model, name)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 <= value < float("inf") or (name in _ABOVE_0 and value == 0):
            least = "above 0" if name in _ABOVE_0 else "of at least 0"
            raise InputError(f"{name} of a cost model is {value!r}; it must be a finite number {least}.")
    for name in (*_WHOLE, *_WHOLE_OR_NONE):
        value = getattr(model, name)
        if value is None and name in _WHOLE_OR_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} of a cost model is {value!r}; it must be a whole number of at least 1.")
    if model.sample_seconds + model.fixed_seconds == 0:
        raise InputError("A cost model computes in no time: sample_seconds and fixed_seconds are both 0.")
    check_probability("stragglers", model.stragglers)
    if not model.straggler_times >= 1:
        raise InputError(f"straggler_times is {model.straggler_times!r}; stragglers take at least 1 time as long.")
    if model.strategy not in _STRATEGIES:
        raise InputError(
            f"There is no strategy {model.strategy!r} to price.", remedy=f"one of {', '.join(_STRATEGIES)}"
        )
    if len(model.phases) != 3 or min(model.phases) < 0 or abs(sum(model.phases) - 1) > 1e-6:
        raise InputError(f"phases is {model.phases!r}; the shares of data, forward and backward must add up to 1.")
