"""The mechanistic cost model: the numbers that a step costs, and what would change that.

Owns these numbers and what they can be; their formula is in `parakit.costs.terms`. Every term has a cause, so the
model can be asked what-if questions that a curve through throughputs cannot answer. It refuses to fit curves, and to
know where its numbers came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from parakit.costs import terms
from parakit.costs.breakdown import Breakdown, explain, gains, table
from parakit.costs.calibration import calibrate
from parakit.costs.collectives import Counts, algorithm_named, like_given
from parakit.costs.networks import NETWORKS, Network, machine_named, network_named
from parakit.costs.order_statistics import check_probability
from parakit.errors import InputError
from parakit.events.history import History

__all__ = ["CostModel", "costs_of"]

_SHARED = "shared memory"
_ON_ONE_HOST = (_SHARED, "loopback")  # networks
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
        What every other busy core of a node adds to the time of computing and of the update, as a share of it: they
        share caches and memory. Counted where `cores` is known.
    update_seconds : float
        Of the optimizer, for each step.
    divided_update : bool
        Whether workers divide the update among them, as they can where all of them are on one node.
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
        Of the all-reduce; see `parakit.costs.collectives.ALGORITHMS`.
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
    simulated : bool
        Whether it was calibrated from simulated runs, and not from measured ones.
    remarks : tuple of str
        What was assumed in calibrating.

    Examples
    --------
    >>> from parakit.costs.model import CostModel
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
    divided_update: bool = False
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
    simulated: bool = False
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", network_named(self.network))
        object.__setattr__(self, "algorithm", algorithm_named(self.algorithm))
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
            Of the exchange. Default: what the runs say of themselves; a ring where they say nothing.
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
            cores", which sets the workers of a node, its cores, ports, speed and networks. Workers that shared memory
            use a ring on a network that is named, and each updates everything, unless an algorithm or nodes are given.

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
        changed = dataclasses.replace(self, **changes)
        apart = isinstance(changes.get("network"), str) and changed.network.name not in _ON_ONE_HOST
        if apart and changed.algorithm == _SHARED and "algorithm" not in changes and changed.workers_per_node is None:
            return dataclasses.replace(changed, algorithm="ring", divided_update=False)
        return changed

    # --- the terms

    def rows(self, n: Counts, batch_size: int | None = None) -> Any:
        """Rows in the global batch of N workers."""
        return terms.rows(self, n, batch_size)

    def crowding(self, n: Counts) -> Any:
        """How many times as long computing takes because workers share cores; 1 where each has its own."""
        return terms.crowding(self, n)

    def computing_seconds(self, n: Counts, rows: Any) -> Any:
        """Computing of one of N workers that has some rows of a step."""
        return terms.computing_seconds(self, n, rows)

    def updating_seconds(self, n: Counts) -> Any:
        """The update by one of N workers: all make it, or each its part, at the same time."""
        return terms.updating_seconds(self, n)

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
        return terms.breakdown(self, n, batch_size)

    def exchange_seconds(self, n: Counts, nbytes: float | None = None) -> Any:
        """One exchange among N workers, with nothing going on meanwhile.

        Parameters
        ----------
        n : int or array
        nbytes : float, optional
            Of a part of the gradient. Default: all of it.
        """
        return terms.exchange_seconds(self, n, nbytes)

    def exposed_exchange_seconds(self, n: Counts, computing_seconds: Any) -> Any:
        """What an exchange adds to a step: with buckets, all but the part that the backward pass hides."""
        return terms.exposed_exchange_seconds(self, n, computing_seconds)

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
        alone; whether they teach as much is another question (`parakit.events.noise_scale`).
        """
        return explain(self, n)

    def _repr_html_(self) -> str:
        return table(self)

    def __repr__(self) -> str:
        each = " a worker" if self.weak else ""
        said = " (simulated)" if self.simulated else ""
        return (
            f"<CostModel{said}: {1e3 * self.sample_seconds:.3g} ms a sample, batch {self.batch_size:,}{each}, "
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
