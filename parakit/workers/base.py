"""The protocol between a run and its workers: narrow, and free of Dask, processes and torch.distributed.

Four nouns. A *pool* (`Workers`) is what `connect` returns. A *crew* (`Crew`) is a run's hold on a pool. A *roster*
(`Roster`) says who is active and holds what. A *team* (`Team`) is what a strategy's text sees.

One text of an algorithm serves every kind of worker. A strategy whose text runs on the workers is written as if for
one of them, and each verb stands for what all do at once; a crew in one process gives the verbs the meaning of all
workers together. Parts are opaque to the text: only the team that made one knows what it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from parakit.chunks import DEFAULT_CHUNKS, Ownership
from parakit.commits import State
from parakit.data import Samples
from parakit.devices import unit_of
from parakit.errors import PoolError, WorkerCountError
from parakit.evaluation import Tally
from parakit.recipe import Recipe
from parakit.replica import StepRecord
from parakit.vault import OpenVault
from parakit.workers.layout import equal_counts, hierarchical

__all__ = [
    "EXCHANGES",
    "Crew",
    "Excerpt",
    "Exchange",
    "Job",
    "Part",
    "Remnant",
    "Report",
    "Roster",
    "RunsOn",
    "Strategy",
    "Team",
    "Workers",
]

Part = Any
RunsOn = Literal["workers", "driver"]
#: How resident workers add their gradients up.
Exchange = Literal["auto", "shared memory", "gloo"]
EXCHANGES: tuple[Exchange, ...] = ("auto", "shared memory", "gloo")


class Team(Protocol):
    """The verbs of a strategy.

    A text that runs on the workers uses `gradient`, `sum_for_update` or `all_reduce`, and `update`; one that runs
    beside the notebook uses `map_gradients`, `add` and `update`.
    """

    def gradient(self, step: int) -> Part:
        """The gradient sum of this worker's share of a step."""

    def all_reduce(self, part: Part) -> Part:
        """The sum of every worker's part, on every worker."""

    def sum_for_update(self, part: Part) -> Part:
        """The sum of every worker's part, as far as the update that follows needs it here.

        Where workers divide the update among them, each has its slice of the gradient alone.
        """

    def map_gradients(self, step: int) -> Sequence[Part]:
        """The gradient sums of all workers, where they were computed."""

    def add(self, parts: Sequence[Part]) -> Part:
        """The sum of some parts, wherever there is room."""

    def update(self, summed: Callable[[], Part]) -> None:
        """One step of the optimizer; calls `summed` as often as the optimizer evaluates a step."""


class Strategy(Protocol):
    """An algorithm of data-parallel training.

    Attributes
    ----------
    runs_on : {"workers", "driver"}
        Where the text runs: on every worker at once, or once, beside the notebook.
    """

    @property
    def runs_on(self) -> RunsOn:
        """Where the text runs."""

    def step(self, team: Team, step: int) -> None:
        """Do one step of training."""


@dataclass(frozen=True)
class Job:
    """What a pool needs to know of a run.

    Parameters
    ----------
    run_id : str
        Unique; separates runs on one pool.
    recipe : Recipe
    strategy : Strategy
    load, load_validation : callable
        Give the samples of a chunk from its source, as often as they are lost.
    limit_seconds : float
        The longest that a worker may say nothing beyond what its work should take.
    threads : int or None
        That torch uses in each worker; None for those of the pool.
    pieces : sequence of int64 arrays
        The rows of the data that make up each chunk, as far as anybody knows.
    """

    run_id: str
    recipe: Recipe
    strategy: Strategy
    load: Callable[[int], Samples]
    load_validation: Callable[[int], Samples]
    limit_seconds: float
    threads: int | None = None
    pieces: Sequence[npt.NDArray[np.int64]] = ()

    def rows(self, step: int, chunks: Iterable[int] | None = None) -> list[int]:
        """Which rows of the data the holder of some chunks has in a step; of all chunks, if none are given."""
        order = self.recipe.order
        if not self.pieces:
            return []
        chosen = range(len(order.sizes)) if chunks is None else chunks
        return [int(row) for chunk in chosen for row in self.pieces[chunk][order.rows(step, chunk)]]


@dataclass(frozen=True)
class Remnant:
    """Who is left of a group after a loss, and what they hold.

    Parameters
    ----------
    training, validation : mapping of str to tuple of int
        The chunks of each member that is left. Where a change was under way, two may hold the same one.
    intact : tuple of str
        The members that have the state to go on from.
    """

    training: Mapping[str, tuple[int, ...]]
    validation: Mapping[str, tuple[int, ...]]
    intact: tuple[str, ...]


@dataclass(frozen=True)
class Roster:
    """Who is active, and holds which chunks.

    Parameters
    ----------
    generation : int
        Counts rosters of a run; an order of an older one is refused.
    training : Ownership
        Its workers, in this order, are the ranks.
    validation : Ownership or None
        Held by the same workers, or by the first of them.
    """

    generation: int
    training: Ownership
    validation: Ownership | None

    @property
    def members(self) -> tuple[str, ...]:
        """The active workers, in the order of their ranks."""
        return self.training.workers

    def succeed(self, members: Iterable[str], generation: int | None = None) -> Roster:
        """The next generation, or a later one, moving only the chunks that must move."""
        training = self.training.reshard(members)
        validation = self.validation
        if validation is not None:
            validation = validation.reshard(training.workers[: len(validation.sizes)])
        return Roster(self.generation + 1 if generation is None else generation, training, validation)

    def rally(self, members: Iterable[str], remnant: Remnant, generation: int) -> Roster:
        """A generation after a loss, which goes by what the members that are left really hold."""
        training = Ownership(self.training.sizes, _one_owner_each(remnant.training))
        validation = self.validation
        if validation is not None:
            validation = Ownership(validation.sizes, _one_owner_each(remnant.validation))
        return Roster(self.generation, training, validation).succeed(members, generation)


def _one_owner_each(held: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What each holds, without what somebody before it holds too."""
    seen: set[int] = set()
    owned = {}
    for member, chunks in held.items():
        owned[member] = tuple(chunk for chunk in chunks if chunk not in seen)
        seen.update(chunks)
    return owned


@dataclass(frozen=True)
class Excerpt:
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
    excerpt : Excerpt or None
        Whose records they are, if not everybody's.
    """

    records: tuple[list[StepRecord], ...]
    commit_seconds: float
    seconds: float | None = None
    excerpt: Excerpt | None = None

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.records[0])


class Crew(Protocol):
    """A run's hold on a pool. Only the run's own thread calls it, `halt` excepted."""

    #: Whether a segment can be ordered while the one before it goes on.
    orders_ahead: bool

    @property
    def vault(self) -> OpenVault | None:
        """Commits that this process can read, whatever becomes of the workers; None where there are none."""

    def prepare(self, roster: Roster) -> Future[None]:
        """Begin to bring what a roster needs to its members, while the run goes on."""

    def muster(self, roster: Roster, state: State | None) -> None:
        """Make a prepared roster the active one.

        Parameters
        ----------
        roster : Roster
        state : State or None
            Where all members are to start from; None to go on from what the members that stay have.

        Raises
        ------
        WorkerLost
            If a member was lost meanwhile. Then, and after the same error from any other verb, the next verbs are
            `regroup`, `prepare` and `muster`.
        """

    def order(self, first: int, count: int, wish: int, expected_seconds: float) -> None:
        """Order a segment; where `orders_ahead`, also one that is to follow on one that was not reported yet.

        As long as there is an order without a report, no other verb but these two is used, unless one of them raised.

        Parameters
        ----------
        first, count : int
            The steps: `first` to `first + count - 1`.
        wish : int
            The number of the newest wish that was heeded; a `halt` with a higher number ends the segment early.
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

    def regroup(self, generation: int, step: int) -> Remnant:
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

    def halt(self, wish: int) -> None:
        """Ask the segment that is going on to end after its present step; returns at once, from any thread."""

    def set_learning_rate(self, value: float) -> None:
        """Let all members go on at another learning rate; only between segments."""

    def state(self, step: int) -> State:
        """The state of a step to which the last report came."""

    def settle(self) -> None:
        """Let the present state be in the `vault`, if there is one; not while a segment goes on.

        Raises
        ------
        WorkerLost
            If a member was lost.
        """

    def salvage(self, step: int) -> State | None:
        """The newest commit of at most a step that can be read here, workers or no workers; None if there is none.

        May be asked for at any time, also while a segment goes on that was ordered when the run was at this step.
        """

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks."""

    def label(self, worker: str) -> str:
        """A short name for people."""

    def release(self) -> None:
        """Let go of everything that the run holds on the pool; never raises for workers that are gone."""


@dataclass
class _Hold:
    run_id: str
    let_go: Callable[[], None] = field(repr=False)


class Workers(ABC):
    """A pool of workers, from `connect`.

    A context manager; on leaving, what was started here is stopped, and what was not is left as it was.
    """

    #: Says on what the workers run, for people.
    kind: str
    #: Threads that torch uses in each worker.
    threads: int
    #: Cores that this pool's workers can use at once; where they compute on GPUs, how many of those there are.
    cores: int
    #: Where the workers compute: "cpu" or "cuda".
    device: str = "cpu"
    #: Tells the time of runs on this pool, in seconds; virtual where the workers are simulated.
    clock: Callable[[], float] = perf_counter
    #: Whether the workers, and all times, are only simulated.
    simulated: bool = False
    #: Whether workers take turns in one process: whoever computes has the machine to itself, and nothing travels.
    in_turns: bool = False
    #: Whether every worker can map what this process has in shared memory.
    maps_memory: bool = False
    #: Pieces to cut data into, unless a run asks for another number.
    chunks: int = DEFAULT_CHUNKS

    def __init__(self) -> None:
        self._hold: _Hold | None = None
        self._closed = False

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The workers there are now, in the order in which they become active."""

    @property
    @abstractmethod
    def most(self) -> int:
        """The most workers that this pool can have or grow to."""

    @abstractmethod
    def grow(self, count: int) -> None:
        """Begin to grow to a number of workers; returns at once."""

    @abstractmethod
    def open(self, job: Job) -> Crew:
        """Begin a run."""

    @abstractmethod
    def map(self, function: Callable[[Any], Any], items: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Apply an importable function to items, on the workers."""

    @abstractmethod
    def _close(self) -> None:
        """Stop what was started here."""

    @property
    def size(self) -> int:
        """Workers there are now."""
        return len(self.names)

    @property
    def closed(self) -> bool:
        """Whether the pool was closed."""
        return self._closed

    @property
    def one_host(self) -> bool:
        """Whether all workers are processes of one host; False where nobody knows."""
        return False

    @property
    def memory_limits(self) -> tuple[int, ...]:
        """Bytes that each worker may use, as far as somebody set a limit; 0 where nobody did."""
        return ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of each worker, in their order, as far as a group can tell; empty where nobody knows."""
        return ()

    def exchange_of(self, strategy: Strategy) -> str:
        """How a strategy's gradients are added up on this pool: one of `parakit.events.EXCHANGE_WAYS`.

        What is expected at the start of a run: where a host has too little shared memory after all, workers that may
        choose make connections instead, and an optimizer whose update cannot be divided is run by all of them.
        """
        if strategy.runs_on == "driver":
            return "tasks"
        if self.device != "cpu":
            return "gloo"
        wished = getattr(strategy, "exchange", "auto")
        if wished == "auto" and hierarchical(self.hosts):
            way = "hierarchical"
        elif wished == "shared memory" or (wished == "auto" and (self.one_host or len(set(self.hosts)) == 1)):
            way = "shared memory"
        else:
            return "gloo"
        return f"{way}, divided update" if equal_counts(self.hosts) and getattr(strategy, "shard", False) else way

    def check_count(self, count: Any, *, most: int | None = None) -> int:
        """A number of workers that this pool can serve.

        Raises
        ------
        WorkerCountError
            If it is no whole number, below 1, or above what there are (or could be).
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise WorkerCountError(
                f"The number of workers is {count!r}; it must be a whole number of at least 1.",
                remedy=f"ask for 1 to {self.size} workers",
            )
        limit = self.size if most is None else most
        if count > limit:
            raise WorkerCountError(
                f"{count} workers were asked for, but this pool ({self.kind}) has {self.size}"
                + (f" and can grow to {limit}." if limit > self.size else "."),
                remedy=f"ask for at most {limit}, or connect to more workers: parakit.connect({count})",
            )
        return count

    def hold(self, run_id: str, let_go: Callable[[], None]) -> None:
        """Reserve the pool for a run; `let_go` ends that run if the pool is closed.

        Raises
        ------
        PoolError
            If the pool is closed, or another run holds it.
        """
        self.check_open()
        if self._hold is not None:
            raise PoolError(
                f"This pool is busy: run {self._hold.run_id} is training on it.",
                cause="two runs on the same workers would wait for each other's processes",
                remedy="run.wait() or run.stop() the other run first, or connect to a second pool",
            )
        self._hold = _Hold(run_id, let_go)

    def free(self, run_id: str) -> None:
        """End the reservation of a run."""
        if self._hold is not None and self._hold.run_id == run_id:
            self._hold = None

    def check_open(self) -> None:
        """Raise `PoolError` if the pool was closed."""
        if self._closed:
            raise PoolError("This pool is closed.", remedy="connect again: workers = parakit.connect(...)")

    def close(self) -> None:
        """End the run that holds the pool, if any, and stop what was started here. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._hold is not None:
            self._hold.let_go()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"<Workers: {self.kind}, closed>"
        many = "1 worker" if self.size == 1 else f"{self.size} workers"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        noun = unit_of(self.device)
        there = f"1 {noun}" if self.cores == 1 else f"{self.cores} {noun}s"
        crowded = f"; more workers than {noun}s" if self.size * self.threads > self.cores else ""
        return f"<Workers: {self.kind}, {many} of {threads} each, {there}{crowded}>"
