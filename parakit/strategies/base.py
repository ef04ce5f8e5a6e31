"""What a strategy is, and the verbs of the team that its text sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from parakit.collectives.base import Exchange
from parakit.collectives.compressed import Codec

__all__ = [
    "Part",
    "Requirements",
    "RunsOn",
    "Strategy",
    "Team",
    "requirements_of",
]

Part = Any
RunsOn = Literal["workers", "driver"]


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

    It may have any of the attributes of `Requirements` too, and an `engine` (`parakit.engines.make`).

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
class Requirements:
    """What a strategy asks of the workers that it runs on, with what holds where it does not say.

    Attributes
    ----------
    exchange : {"auto", "shared memory", "gloo"}
        How gradients are to be added up.
    shard : bool
        Whether workers that share memory may divide the update among them; `sum_for_update` heeds it.
    codec : Codec or None
        In which form gradients travel from process to process; then each of those does the whole update.
    """

    exchange: Exchange = "auto"
    shard: bool = False
    codec: Codec | None = None

    @property
    def divides(self) -> bool:
        """Whether the update may be divided, where workers have memory in common."""
        return self.shard and self.exchange != "gloo" and self.codec is None


def requirements_of(strategy: Strategy) -> Requirements:
    """What a strategy asks for, by its attributes of these names."""
    asked: dict[str, Any] = {each.name: getattr(strategy, each.name, each.default) for each in fields(Requirements)}
    return Requirements(**asked)
