"""Simulated workers: any number of them in this process, on a virtual clock that a cost model moves.

The text of a strategy runs as it is. Each of its verbs does what it does inline (or nothing, where only time is asked
for), and adds virtual seconds that are drawn from a cost model (`parakit.workers.virtual.team`). Owns the pool, its
clock, and the placing of workers on nodes. A run on these workers knows no other time, so its history, plots and panel
show virtual seconds; the losses are real. Nothing here is a measurement, and `kind` says so wherever workers are named.
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import Any

import numpy as np
import torch

from parakit.checkpoints.state import State
from parakit.collectives.base import ExchangeMethod
from parakit.costs.model import CostModel, costs_of
from parakit.costs.networks import find_network
from parakit.data.chunks import DEFAULT_CHUNKS
from parakit.engines.account import StepRecord
from parakit.engines.evaluation import Tally
from parakit.errors import InputError, WorkerCountError
from parakit.strategies.base import requirements_of
from parakit.workers.assignment import GroupAssignment
from parakit.workers.inline import InlineSession, InlineTeam
from parakit.workers.pool import Workers
from parakit.workers.session import Job, Report
from parakit.workers.virtual.team import SimulatedTeam

__all__ = ["ORDINARY", "SimulatedWorkers", "VirtualClock", "simulated"]

#: What is priced where nothing was calibrated: a small convolutional network (3x32x32 pixels, 0.55 M parameters) on
#: cores of an ordinary server, where a sample took 1.26 ms; each worker on a core of its own, nodes of 8.
ORDINARY = CostModel(
    sample_seconds=1.26e-3, batch_size=256, nbytes=2.2e6, fixed_seconds=0.5e-3, update_seconds=0.3e-3,
    control_seconds=5e-3, spread=0.03, network=find_network("10GbE"), within=find_network("shared memory"),
    workers_per_node=8, cores=8, ports=1,
)  # fmt: skip

_BETWEEN_NODES = "10GbE"  # where a machine was calibrated, and nobody says what connects several of them
_FORM_SECONDS = 0.1  # to form a group of processes that are there: 20 to 500 ms with gloo
_REAL_SECONDS = 0.25  # that a segment may take of the real clock, so that requests and pictures do not wait


class VirtualClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """The time now, in seconds."""
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Let some time pass."""
        self.seconds += seconds


def simulated(
    n: int,
    *,
    like: Any = None,
    network: Any = None,
    stragglers: float | None = None,
    arithmetic: bool = True,
    seed: int = 0,
    cores_per_node: int | None = None,
    machine: Any = None,
) -> SimulatedWorkers:
    """Workers that do not exist: train, sweep or open a panel on them to see what that many would do.

    Losses are those of real training, on any number of workers; times are drawn from a cost model. Runs on these
    workers live by a virtual clock, so a run that would take an hour may take minutes here, or the reverse.

    Parameters
    ----------
    n : int
        How many.
    like : study, CostModel, Run or History, optional
        What a step costs: something with a cost model as its `costs`, a cost model, or what one is calibrated from.
        Where that was measured on one machine, there are as many such machines as are needed, each with one worker a
        core. Default: `ORDINARY`, with the size of the model that is trained.
    network : str or Network, optional
        Between nodes, such as "1GbE"; see `parakit.costs.networks.NETWORKS`. Default: that of `like`, or 10GbE
        between several of a machine that was measured alone.
    stragglers : float, optional
        How likely a worker straggles in a step, from 0 to below 1. Default: as `like`.
    arithmetic : bool
        Whether to train really. If not, only times are simulated: the model stays as it is, its losses are NaN, and a
        thousand steps of a thousand workers take a second or two.
    seed : int
        Of the draws; a run with the same seed takes the same virtual time, to the last digit.
    cores_per_node : int, optional
        Cores of each node, one worker a core. Default: as `like`.
    machine : str or Machine, optional
        What nodes are; see `parakit.costs.networks.MACHINES`.

    Returns
    -------
    SimulatedWorkers

    Raises
    ------
    WorkerCountError
        If n is no whole number of at least 1.
    InputError
        If the network or the machine is not known, stragglers is no probability, or `like` has no costs.

    Examples
    --------
    >>> import torch, parakit as pk
    >>> from parakit.workers.virtual.pool import simulated
    >>> digits = pk.datasets.digits()
    >>> far = simulated(16, network="1GbE")
    >>> run = pk.train(torch.nn.Linear(64, 10), digits.train, on=far, steps=20).wait(progress=False)
    >>> run.world_size, run.history.of(pk.events.RunStart)[0].pool
    (16, 'simulated, virtual clock')
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise WorkerCountError(
            f"The number of simulated workers is {n!r}; it must be a whole number of at least 1.",
            remedy="such as simulated(64)",
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; it must be a whole number of at least 0.")
    costs = ORDINARY if like is None else _costs_of(like)
    if machine is not None:
        costs = costs.with_(machine=machine)
    costs = _placed(costs, network, cores_per_node if machine is None or cores_per_node else costs.cores)
    if stragglers is not None:
        costs = costs.with_(stragglers=stragglers)
    return SimulatedWorkers(int(n), costs, arithmetic=arithmetic, seed=seed, fitting=like is None)


def _costs_of(like: Any) -> CostModel:
    """The cost model that something has, is, or can be calibrated to."""
    found = costs_of(like)
    if found is not None:
        return found
    raise InputError(
        f"like is {type(like).__name__}, which does not say what a step costs.",
        remedy="give a study (parakit.sweep), a run that has ended, its history, or a CostModel; or leave it out",
    )


def _placed(costs: CostModel, network: Any, cores_per_node: int | None) -> CostModel:
    """The workers on nodes: a machine that was measured becomes one of many."""
    between = None if network is None else find_network(network)
    # The text of a strategy says when to exchange, so an exchange is priced whole.
    costs = costs.with_(strategy="all-reduce") if costs.strategy == "local SGD" else costs
    if costs.workers_per_node is None and (cores_per_node or costs.cores):
        cores = cores_per_node or costs.cores or 1
        return costs.with_(
            workers_per_node=max(1, cores // costs.threads), cores=cores, within=costs.network,
            network=between or _BETWEEN_NODES, ports=costs.ports or 1,
        )  # fmt: skip
    if cores_per_node is not None:
        costs = costs.with_(workers_per_node=max(1, cores_per_node // costs.threads), cores=cores_per_node)
    return costs if between is None else costs.with_(network=between)


class SimulatedWorkers(Workers):
    """A pool of workers that do not exist, from `simulated`.

    Parameters
    ----------
    count : int
    costs : CostModel
        What things cost; its batch size is that of the run.
    arithmetic : bool
        Whether to train really.
    seed : int
        Of the draws.
    fitting : bool
        Whether the bytes of an exchange are those of the model that is trained, not those of the cost model.
    """

    simulated = True

    def __init__(
        self, count: int, costs: CostModel, *, arithmetic: bool = True, seed: int = 0, fitting: bool = False
    ) -> None:
        super().__init__()
        self.costs = costs
        self.arithmetic = bool(arithmetic)
        self._virtual = VirtualClock()
        self.clock = self._virtual
        self.threads = costs.threads
        self.cores = _cores(costs, count)
        self.chunks = max(DEFAULT_CHUNKS, count)
        self.kind = "simulated, virtual clock" + ("" if arithmetic else ", timing only")
        self._seed = seed
        self._fitting = fitting
        self._names = tuple(f"simulated {number}" for number in range(count))

    @property
    def names(self) -> tuple[str, ...]:
        """All workers that there could be."""
        return self._names

    def grow(self, count: int) -> None:
        """Refused: that many are all there are.

        Raises
        ------
        WorkerCountError
            If there are fewer.
        """
        if count > self.most:
            raise WorkerCountError(
                f"{count} workers were asked for, but this pool ({self.kind}) has {self.most}.",
                remedy=f"simulated({count})",
            )

    def open(self, job: Job) -> SimulatedSession:
        """Begin a run."""
        costs = self.costs
        if self._fitting:
            sizes = [4 * p.numel() for p in job.recipe.parts().model.parameters() if p.requires_grad]
            costs = costs.with_(nbytes=sum(sizes))
        if (codec := requirements_of(job.strategy).codec) is not None:
            costs = costs.with_(nbytes=codec.nbytes(round(costs.nbytes / 4), torch.float32))
        kind = SimulatedSession if self.arithmetic else TimedSession
        return kind(job, costs, self._virtual, self._seed)


def _cores(costs: CostModel, count: int) -> int:
    """Cores of all the nodes that so many workers are on."""
    if costs.cores is None:
        return count * costs.threads
    nodes = 1 if costs.workers_per_node is None else -(-count // costs.workers_per_node)
    return nodes * costs.cores


class SimulatedSession(InlineSession):
    """A run's hold on simulated workers: what is computed is computed inline, and the clock is moved beside it."""

    def __init__(self, job: Job, costs: CostModel, clock: VirtualClock, seed: int) -> None:
        super().__init__(job, torch.get_num_threads())
        self._costs = costs
        self._clock = clock
        self._steps_at_once = 1
        self._workers = 0
        self._timed = SimulatedTeam(self._inner_team(), costs, job.recipe.order, seed)
        # It has the verbs of the team that it wraps; its parts differ, which are opaque to a strategy.
        self._team = self._timed  # type: ignore[assignment]

    def _inner_team(self) -> InlineTeam | None:
        return self._team

    def form(self, assignment: GroupAssignment, state: State | None) -> ExchangeMethod:
        """Make an assignment the active one, in virtual time."""
        super().form(assignment, state)
        return self._seat(assignment)

    def _seat(self, assignment: GroupAssignment) -> ExchangeMethod:
        """Seat the workers; what is priced is the algorithm of the cost model, or tasks."""
        self._timed.seat(assignment)
        self._workers = len(assignment.members)
        self._clock.advance(_FORM_SECONDS)
        return ExchangeMethod("tasks" if self._job.strategy.runs_on == "driver" else self._costs.algorithm)

    def _advance(self, first: int, count: int, request: int) -> Report:
        """Do a segment; a shorter one, where the real clock would let requests wait."""
        began = perf_counter()
        part = min(count, self._steps_at_once)
        records = self._do(first, part, request)
        steps = len(records[0])
        pace = max(1e-9, (perf_counter() - began) / steps)
        self._steps_at_once = max(1, min(4 * self._steps_at_once, int(_REAL_SECONDS / pace)))
        # Virtual workers would have done all of it with the same orders, so a part has its share of what those cost.
        self._clock.advance(self._timed.take_seconds() + self._costs.control_seconds * part / count)
        return Report(records, 0.0, excerpt=self._timed.take_excerpt())

    def _do(self, first: int, count: int, request: int) -> tuple[list[StepRecord], ...]:
        self._timed.forget()  # what a segment left that was rolled back
        return super()._advance(first, count, request).records

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks, in virtual time."""
        tally = super().evaluate()
        self._clock.advance(self._evaluating_seconds(tally.samples))
        return tally

    def _evaluating_seconds(self, rows: float) -> float:
        """Of reading and a forward pass, shared by the workers."""
        computing = self._costs.computing_seconds(self._workers, math.ceil(rows / self._workers))
        return float(computing) * (1 - self._costs.phases[2])


class TimedSession(SimulatedSession):
    """Simulated workers that compute nothing: the strategy's text runs over parts that hold no numbers."""

    def _inner_team(self) -> InlineTeam | None:
        return None

    def form(self, assignment: GroupAssignment, state: State | None) -> ExchangeMethod:
        """Make an assignment the active one; no chunk is loaded."""
        if state is not None:
            self._engine.load(state)
        self._validation_rows = 0 if assignment.validation is None else sum(assignment.validation.sizes)
        return self._seat(assignment)

    def _do(self, first: int, count: int, request: int) -> tuple[list[StepRecord], ...]:
        self._timed.forget()
        self._timed.rate = self._engine.learning_rate
        for step in range(first, first + count):
            self._job.strategy.step(self._timed, step)
            self._engine.step = step + 1
            if self._halt > request:
                break
        return self._timed.take_records()

    def evaluate(self) -> Tally:
        """Takes its virtual time; there is no model worth evaluating, so the loss is NaN."""
        self._clock.advance(self._evaluating_seconds(self._validation_rows))
        return Tally(loss_sum=math.nan)
