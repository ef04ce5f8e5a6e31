"""A member's process group, as its engine sees it: whoever waits there holds nobody up, and the time is booked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from parakit.collectives.base import ProcessGroup, ReduceScatterGroup, Summed
from parakit.engines.account import EXCHANGE, StepAccount

__all__ = ["TimedGroup"]


class TimedGroup:
    """A process group whose waits are told and booked; `parakit.engines.base.Group` says what each verb does.

    Parameters
    ----------
    group : ProcessGroup
    rank : int
    vector : tensor or None
        From which the group adds without a copy.
    account : StepAccount
    waits : callable
        Told when this member begins to wait for the others (True), and when it goes on (False).
    """

    def __init__(
        self, group: ProcessGroup, rank: int, vector: Tensor | None, account: StepAccount, waits: Callable[[bool], None]
    ) -> None:
        self._group, self._account, self._waits = group, account, waits
        self.rank, self.size, self.vector = rank, group.size, vector
        self.divides = isinstance(group, ReduceScatterGroup) and group.method.divided

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        start = perf_counter()
        self._waits(True)
        yield
        self._waits(False)
        self._account.seconds[EXCHANGE] += perf_counter() - start

    @property
    def _dividing(self) -> ReduceScatterGroup:
        assert isinstance(self._group, ReduceScatterGroup)
        return self._group

    def sum(self, values: Tensor) -> None:
        """Over all members."""
        with self._exchanging():
            self._group.all_reduce(values)

    def sum_gradient(self, vector: Tensor, tail: int) -> None:
        """Over all members, in the form in which gradients travel."""
        with self._exchanging():
            self._group.all_reduce_gradient(vector, tail)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Over all members; no part of a step."""
        self._waits(True)
        self._group.average(tensors)
        self._waits(False)

    def reduce_scatter(self, vector: Tensor, *, tail: int, own: Sequence[Tensor] | None) -> Summed:
        """Each has a slice of the sum."""
        with self._exchanging():
            return self._dividing.reduce_scatter(vector, tail=tail, own=own)

    def memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """In common on this host."""
        return self._dividing.common(numel, dtype)

    def slice_of(self, numel: int) -> slice:
        """Of a vector in common."""
        return self._dividing.slices(numel)[self._dividing.place]

    def barrier(self) -> None:
        """For those of this host."""
        with self._exchanging():
            self._dividing.barrier()

    def add(self, values: Tensor) -> None:
        """Over those of this host."""
        with self._exchanging():
            self._dividing.add_in_common(values)
