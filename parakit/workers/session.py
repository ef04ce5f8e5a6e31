"""A run's session on a pool: how a group is formed, ordered to train, and asked for its state."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from parakit.checkpoints.in_shared_memory import SnapshotsReader
from parakit.checkpoints.state import State
from parakit.collectives.base import ExchangeMethod
from parakit.data.source import ChunkLoader
from parakit.engines.account import StepRecord
from parakit.engines.evaluation import Tally
from parakit.engines.recipe import Recipe
from parakit.strategies.base import Strategy
from parakit.workers.assignment import GroupAssignment, Survivors

__all__ = [
    "Job",
    "Report",
    "SampledRanks",
    "Session",
]


@dataclass(frozen=True)
class Job:
    """What a pool needs to know of a run.

    Parameters
    ----------
    run_id : str
        Unique; separates runs on one pool.
    recipe : Recipe
    strategy : Strategy
    load, load_validation : ChunkLoader
        Give the samples of a chunk from its source, as often as they are lost; the second has none without validation.
    limit_seconds : float
        The longest that a worker may say nothing beyond what its work should take.
    threads : int or None
        That torch uses in each worker; None for those of the pool.
    """

    run_id: str
    recipe: Recipe
    strategy: Strategy
    load: ChunkLoader
    load_validation: ChunkLoader
    limit_seconds: float
    threads: int | None = None

    def rows(self, step: int, chunks: Iterable[int] | None = None) -> list[int]:
        """Which rows of the data the holder of some chunks has in a step; of all chunks, if none are given."""
        order, pieces = self.recipe.order, self.load.pieces
        chosen = range(len(order.sizes)) if chunks is None else chunks
        return [int(row) for chunk in chosen for row in pieces[chunk][order.rows(step, chunk)]]


@dataclass(frozen=True)
class SampledRanks:
    """Of which members there are records, where there are too many for all to have them.

    Parameters
    ----------
    ranks : tuple of int
        Of those that have, ascending.
    world_size : int
        Of the group.
    exchange_seconds : tuple of float
        Of each step: the smallest time that any member of the group spent in it, waiting included.
    """

    ranks: tuple[int, ...]
    world_size: int
    exchange_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """What the members did in a segment.

    Attributes
    ----------
    records : tuple of lists of StepRecord
        One list a member, by rank; all of the same length.
    commit_seconds : float
        The longest that a member took to keep its state.
    seconds : float or None
        From the end of the segment before to the end of this one, by the clocks of the members: the longest of them.
        None if it was ordered later than that end; then it took what the driver's clock says.
    excerpt : SampledRanks or None
        Whose records they are, if not everybody's.
    """

    records: tuple[list[StepRecord], ...]
    commit_seconds: float
    seconds: float | None = None
    excerpt: SampledRanks | None = None

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.records[0])


class Session(Protocol):
    """A run's hold on a pool. Only the run's own thread calls it, `halt` excepted."""

    #: Whether a segment can be ordered while the one before it goes on.
    orders_ahead: bool

    @property
    def snapshots(self) -> SnapshotsReader | None:
        """Snapshots that this process can read, whatever becomes of the workers; None where there are none."""

    def stage(self, assignment: GroupAssignment) -> Future[None]:
        """Begin to bring what an assignment needs to its members, while the run goes on."""

    def form(self, assignment: GroupAssignment, state: State | None) -> ExchangeMethod:
        """Make a staged assignment the active one; the group that was formed says how it exchanges gradients.

        Parameters
        ----------
        assignment : GroupAssignment
        state : State or None
            Where all members are to start from; None to go on from what the members that stay have.

        Raises
        ------
        WorkerLost
            If a member was lost meanwhile. Then, and after the same error from any other verb, the next verbs are
            `regroup`, `stage` and `form`.
        """

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:
        """Order a segment; where `orders_ahead`, also one that is to follow on one that was not reported yet.

        As long as there is an order without a report, no other verb but these two is used, unless one of them raised.

        Parameters
        ----------
        first, count : int
            The steps: `first` to `first + count - 1`.
        request : int
            The number of the newest request that was applied; a `halt` with a higher number ends the segment early.
        expected_seconds : float
            What the segment should take.
        """

    def report(self) -> Report:
        """Wait for the end of the segment that was ordered first; all members then stand where it ended.

        A segment that was ordered ahead has no steps if the one before it ended early: it was left out.

        Raises
        ------
        WorkerLost
            If a member was lost.
        RunFailed
            If the user's code failed. Then all members are back where the segment began.
        """

    def regroup(self, generation: int, step: int) -> Survivors:
        """After a loss: find out who is left, and let them go back to a step.

        Parameters
        ----------
        generation : int
            Later than any before; orders of older ones are refused from now on.
        step : int
            One that all members had finished.
        """

    def check(self) -> None:
        """Raise `WorkerLost` if a member is gone; for times in which no order would notice."""

    def halt(self, request: int) -> None:
        """Ask the segment that is going on to end after its present step; returns at once, from any thread."""

    def set_learning_rate(self, value: float) -> None:
        """Let all members go on at another learning rate; only between segments."""

    def state(self, step: int) -> State:
        """The state of a step to which the last report came."""

    def settle(self) -> None:
        """Let the present state be in the `snapshots`, if there is one; not while a segment goes on.

        Raises
        ------
        WorkerLost
            If a member was lost.
        """

    def read_surviving_snapshot(self, step: int) -> State | None:
        """The newest commit of at most a step that can be read here, workers or no workers; None if there is none.

        May be asked for at any time, also while a segment goes on that was ordered when the run was at this step.
        """

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks."""

    def label(self, worker: str) -> str:
        """A short name for people."""

    def release(self) -> None:
        """Let go of everything that the run holds on the pool; never raises for workers that are gone."""
