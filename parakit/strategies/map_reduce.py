"""Synchronous data parallelism as map and reduce: the textbook shape, for learning and for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from parakit.errors import InputError
from parakit.strategies.base import Part, RunsOn, Team

__all__ = ["MapReduce"]


@dataclass(frozen=True)
class MapReduce:
    """Map a gradient task over the workers' chunks, reduce the sums in a tree, update beside the notebook.

    Every step sends the parameters out and the gradient back as tasks, so its cost is dominated by the scheduling of
    tasks (some milliseconds each) unless the model is slow. `AllReduce` computes the same numbers.

    Parameters
    ----------
    fan_in : int
        How many sums one task of the tree adds; at least 2.

    References
    ----------
    Dean, Ghemawat: "MapReduce: Simplified Data Processing on Large Clusters", OSDI 2004.
    """

    fan_in: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.fan_in, bool) or not isinstance(self.fan_in, int) or self.fan_in < 2:
            raise InputError(f"A tree must add at least 2 sums at a time; fan_in is {self.fan_in!r}.")

    @property
    def runs_on(self) -> RunsOn:
        """Once, beside the notebook."""
        return "driver"

    def step(self, team: Team, step: int) -> None:
        """Do one step of training."""

        def summed() -> Part:
            parts = list(team.map_gradients(step))
            while len(parts) > 1:
                parts = [team.add(parts[i : i + self.fan_in]) for i in range(0, len(parts), self.fan_in)]
            return parts[0]

        team.update(summed)
