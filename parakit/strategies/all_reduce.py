"""Synchronous data parallelism by all-reduce: resident workers add their gradients, and each updates its replica."""

from __future__ import annotations

from dataclasses import dataclass

from parakit.errors import InputError
from parakit.workers.base import EXCHANGES, Exchange, Part, RunsOn, Team

__all__ = ["AllReduce"]


@dataclass(frozen=True, repr=False)
class AllReduce:
    """Every worker computes its share, all add up, every worker does the same update.

    The replicas stay equal because each adds the same sums in the same order. One exchange of the size of the model
    a step: workers of one host sum in memory that they share; over connections, with a ring, 2 (N - 1) / N times the
    gradient's bytes pass each of N workers.

    Parameters
    ----------
    exchange : {"auto", "shared memory", "gloo"}
        "auto" shares memory where all workers can, and uses torch.distributed's gloo otherwise.

    References
    ----------
    Patarasuk, Yuan: "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib.
    Comput. 69 (2009) 117.
    """

    exchange: Exchange = "auto"

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise InputError(f"exchange is {self.exchange!r}; it must be one of {', '.join(map(repr, EXCHANGES))}.")

    def __repr__(self) -> str:
        return "AllReduce()" if self.exchange == "auto" else f"AllReduce(exchange={self.exchange!r})"

    @property
    def runs_on(self) -> RunsOn:
        """On every worker at once."""
        return "workers"

    def step(self, team: Team, step: int) -> None:
        """Do one step of training."""

        def summed() -> Part:
            mine = team.gradient(step)
            return team.all_reduce(mine)

        team.update(summed)
