"""Synchronous data parallelism by all-reduce: resident workers add their gradients, and all have the same update."""

from __future__ import annotations

from dataclasses import dataclass

from parakit.collectives.base import EXCHANGES, Exchange
from parakit.errors import InputError
from parakit.strategies.base import Part, RunsOn, Team

__all__ = ["AllReduce"]


@dataclass(frozen=True, repr=False)
class AllReduce:
    """Every worker computes its share, all add up, and the same update is made everywhere.

    One exchange of the size of the model a step. Over connections every worker gets the whole sum and does the whole
    update: with a ring, 2 (N - 1) / N times the gradient's bytes pass each of N workers. Workers of one host sum in
    memory that they share, where parameters and the optimizer's state can lie too: then each worker sums and updates
    its own slice of them, and the second half of the exchange is not needed. That is the same update for optimizers
    that go element by element, as torch's own do but for LBFGS and some others; with those, and with a class of one's
    own, every worker does the whole update.

    Parameters
    ----------
    exchange : {"auto", "shared memory", "gloo"}
        "auto" shares memory where all workers can, and uses torch.distributed's gloo otherwise; where some share a
        host and others do not, both: each worker exchanges its slice with its peers on the other hosts.
    shard : bool
        Whether workers that share memory may divide the update among them.

    References
    ----------
    Patarasuk, Yuan: "Bandwidth optimal all-reduce algorithms for clusters of workstations", J. Parallel Distrib.
    Comput. 69 (2009) 117. Rajbhandari, Rasley, Ruwase, He: "ZeRO: Memory optimizations toward training trillion
    parameter models", SC20 (its first stage).
    """

    exchange: Exchange = "auto"
    shard: bool = True

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            raise InputError(f"exchange is {self.exchange!r}; it must be one of {', '.join(map(repr, EXCHANGES))}.")
        if not isinstance(self.shard, bool):
            raise InputError(f"shard is {self.shard!r}; it must be True or False.")

    def __repr__(self) -> str:
        said = [] if self.exchange == "auto" else [f"exchange={self.exchange!r}"]
        said += [] if self.shard else ["shard=False"]
        return f"AllReduce({', '.join(said)})"

    @property
    def runs_on(self) -> RunsOn:
        """On every worker at once."""
        return "workers"

    def step(self, team: Team, step: int) -> None:
        """Do one step of training."""

        def summed() -> Part:
            mine = team.gradient(step)
            return team.sum_for_update(mine)

        team.update(summed)
