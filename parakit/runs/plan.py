"""Plans: a run, fully checked, before anything of it has begun."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parakit.checkpoints import Checkpoints
from parakit.checkpoints.state import State
from parakit.events.records import RunStart
from parakit.workers.assignment import GroupAssignment
from parakit.workers.session import Job

__all__ = ["Plan", "Resumption", "Saving"]


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on from.

    Parameters
    ----------
    state : State
    source : str
        In words.
    rate : float or None
        A learning rate to go on at, if not that of the state.
    """

    state: State = field(repr=False)
    source: str
    rate: float | None

    @property
    def step(self) -> int:
        """Steps that were done before."""
        return int(self.state["step"])


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go, and how often."""

    checkpoints: Checkpoints
    every_seconds: float


@dataclass(frozen=True)
class Plan:
    """A run, fully checked.

    Parameters
    ----------
    job : Job
    assignment : GroupAssignment
        Of the first generation.
    workers, steps : int
        How many to begin with, and how far to go.
    start : RunStart
        What the history begins with.
    rate : float
        Learning rate of the optimizer as it is made; NaN where it has none.
    identity : dict
        What must be the same for another run to go on from this one.
    resumption : Resumption or None
    saving : Saving or None
    notes : tuple of str
        What the history says of it at the beginning.
    """

    job: Job
    assignment: GroupAssignment
    workers: int
    steps: int
    start: RunStart
    rate: float
    identity: dict[str, Any] = field(repr=False)
    resumption: Resumption | None = None
    saving: Saving | None = None
    notes: tuple[str, ...] = ()
