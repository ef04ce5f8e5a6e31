"""The mechanistic cost model: what a training step costs on any number of workers, and what would change that.

Every term has a cause, so the model can be asked what-if questions that a curve through throughputs cannot answer. Its
numbers are in `parakit.costs.cost_numbers`, their formula in `parakit.costs.breakdown`. It refuses to fit curves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from parakit.costs.breakdown import StepCosts
from parakit.costs.calibration import calibrate
from parakit.costs.explanation import explain, gains, table
from parakit.events.history import History

__all__ = ["CostModel", "costs_of"]


class CostModel(StepCosts):
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
