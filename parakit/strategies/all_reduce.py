"""Synchronous data parallelism by all-reduce: resident workers add their gradients, and each updates its replica."""

from __future__ import annotations

from dataclasses import dataclass

from parakit.workers.base import Part, RunsOn, Team

__all__ = ["AllReduce"]


@dataclass(frozen=True)
class AllReduce:
    """Every worker computes its share, all add up, every worker does the same update.

    The replicas stay equal because each adds the same sums in the same order. One exchange of the size of the model
    a step; with a ring, 2 (N - 1) / N times the gradient's bytes pass each of N workers.

    References
    ----------
    Patarasuk, Yuan: "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib.
    Comput. 69 (2009) 117.
    """

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
