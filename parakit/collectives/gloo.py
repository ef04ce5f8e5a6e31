"""Process groups: how resident workers add their gradients. The only importer of torch.distributed.

A group belongs to one generation of one run and is never reused: when membership changes, a new one is formed in the
living processes. Groups are objects of their own and leave torch's global default group alone, which may be the
user's. Workers find each other through a *store*, a small key-value store that the caller provides, so that no store
of torch's has to listen on a port.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parakit.collectives.base import ExchangeMethod, GroupBroken, ProcessGroup, Store

__all__ = ["GlooGroup"]


class _TorchStore(dist.Store):  # type: ignore[name-defined,misc]  # torch exports it without saying so
    """A store, in the form in which torch asks for it."""

    def __init__(self, store: Store, limit_seconds: float) -> None:
        super().__init__()
        self._store = store
        self._limit = limit_seconds

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, bytes(value))

    def get(self, key: str) -> bytes:
        return self._store.get(key, self._limit)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        limit = self._limit if timeout is None else timeout.total_seconds()
        for key in keys:
            self._store.get(key, limit)


class GlooGroup(ProcessGroup):
    """Members that add vectors over connections; a single member needs no partners.

    Parameters
    ----------
    store : Store
        Of this generation alone.
    rank, size : int
        The place of this member, and how many there are.
    host : str
        Address of the interface to listen on, such as "127.0.0.1".
    limit_seconds : float
        The longest that any operation may wait for a member.

    Raises
    ------
    GroupBroken
        If the others do not come in time.
    """

    method = ExchangeMethod("gloo")

    def __init__(self, store: Store, rank: int, size: int, host: str, limit_seconds: float) -> None:
        self.rank, self.size = rank, size
        self._gloo: Any = None
        if size == 1:
            return
        options = _gloo_options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=limit_seconds)
        try:
            self._gloo = dist.ProcessGroupGloo(_TorchStore(store, limit_seconds), rank, size, options)
        except (RuntimeError, TimeoutError) as error:
            raise GroupBroken(
                f"The process group of {size} workers was not formed within {limit_seconds:g} s: {_first_line(error)}",
                cause="a worker died while it was joining, or a firewall stands between the workers",
            ) from error

    def all_reduce(self, vector: Tensor) -> None:
        """Replace a vector by the sum of every member's, in place.

        Raises
        ------
        GroupBroken
            If a member does not answer.
        """
        self.all_reduce_each([vector])

    def all_reduce_each(self, vectors: Sequence[Tensor]) -> None:
        """Replace several vectors by the sums of every member's, in place, all at the same time.

        Raises
        ------
        GroupBroken
            If a member does not answer.
        """
        if self.size == 1:
            return
        gloo = self._gloo
        if gloo is None:
            raise GroupBroken("The process group was closed.")
        try:
            for work in [gloo.allreduce([vector]) for vector in vectors]:
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(
                f"Worker of rank {self.rank} lost the others in an all-reduce: {_first_line(error)}",
                cause="a worker died or hangs",
            ) from error

    def close(self) -> None:
        """Leave the group: the others' operations fail at once instead of at their limit."""
        gloo, self._gloo = self._gloo, None
        if gloo is not None:
            gloo.abort()


def _gloo_options() -> Any:
    # Its public name, Options, is that of the base class and has no devices.
    return dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
