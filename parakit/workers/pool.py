"""The protocol between a run and its workers: narrow, and free of Dask, processes and torch.distributed.

Four nouns. A *pool* (`Workers`) is what `connect` returns. A *session* (`Session`) is a run's hold on a pool. An
*assignment* (`GroupAssignment`) says who is active and holds what. A *team* (`Team`) is what a strategy's text sees.

One text of an algorithm serves every kind of worker. A strategy whose text runs on the workers is written as if for
one of them, and each verb stands for what all do at once; a session in one process gives the verbs the meaning of all
workers together. Parts are opaque to the text: only the team that made one knows what it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from parakit.data.chunks import DEFAULT_CHUNKS
from parakit.errors import PoolError, WorkerCountError
from parakit.formatting import unit_of
from parakit.workers.session import Job, Session

__all__ = ["Workers"]


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

    @abstractmethod
    def open(self, job: Job) -> Session:
        """Begin a run."""

    @property
    def most(self) -> int:
        """The most workers that this pool can have or grow to."""
        return self.size

    def grow(self, count: int) -> None:
        """Begin to grow to a number of workers; returns at once. Refused where there are no more to be had."""
        self.check_count(count)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Apply an importable function to items, on the workers; here, where they are in this process."""
        self.check_open()
        return [function(item) for item in items]

    def _close(self) -> None:  # noqa: B027  # a pool may have started nothing
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
