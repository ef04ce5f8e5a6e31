"""What a run can do next: one record for each thing, decided in `next_action` and carried out by `RunLoop`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Action",
    "AskForWorkers",
    "AwaitReport",
    "AwaitStaged",
    "CheckMembers",
    "CloseEpoch",
    "DropChange",
    "EndGrowth",
    "Fail",
    "Finish",
    "Form",
    "GiveUp",
    "GoOn",
    "Keep",
    "Lose",
    "Measure",
    "OrderSegment",
    "Recover",
    "SetLearningRate",
    "Stage",
    "StageFirst",
    "StandStill",
    "Wait",
]


@dataclass(frozen=True)
class StageFirst:
    """Bring what they need to the workers that the run begins with."""


@dataclass(frozen=True)
class AwaitStaged:
    """Wait for a group that is being staged, for a moment."""

    seconds: float


@dataclass(frozen=True)
class Form:
    """Make the staged group the active one."""


@dataclass(frozen=True)
class Lose:
    """Take workers for lost."""

    fact: str
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Recover:
    """Wait, find out who is left, and stage a group of them where the run can go on from."""

    after_seconds: float = 0.0


@dataclass(frozen=True)
class Fail:
    """End the run by the last loss."""


@dataclass(frozen=True)
class Keep:
    """Have a newer copy of the state; while workers are busy, only one that can be read without them."""

    save: bool
    busy: bool


@dataclass(frozen=True)
class CloseEpoch:
    """Note the end of an epoch, after an evaluation if there is one."""

    epoch: int
    evaluate: bool


@dataclass(frozen=True)
class OrderSegment:
    """Order some steps, under the number of a request."""

    first: int
    count: int
    number: int


@dataclass(frozen=True)
class AwaitReport:
    """Wait for the report of the segment that was ordered first."""


@dataclass(frozen=True)
class SetLearningRate:
    """Let all members go on at another learning rate."""

    rate: float


@dataclass(frozen=True)
class AskForWorkers:
    """Ask the cluster for more workers than there are."""

    target: int
    there: int


@dataclass(frozen=True)
class EndGrowth:
    """Wait no longer for workers that the cluster was asked for."""


@dataclass(frozen=True)
class Stage:
    """Begin to bring what they need to the members of another group, for the sake of a target."""

    target: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class DropChange:
    """Forget a staged group of which somebody was lost; whoever is there then is tried next."""


@dataclass(frozen=True)
class GiveUp:
    """Stop trying for a worker count."""

    target: int
    why: str


@dataclass(frozen=True)
class StandStill:
    """Keep the state, and be paused."""


@dataclass(frozen=True)
class GoOn:
    """Be paused no longer."""


@dataclass(frozen=True)
class Measure:
    """Time plain PyTorch while the run stands still."""


@dataclass(frozen=True)
class CheckMembers:
    """See whether all members are there, as no order would notice."""


@dataclass(frozen=True)
class Wait:
    """Wait for a request with another number, for a moment."""

    number: int
    seconds: float


@dataclass(frozen=True)
class Finish:
    """End the run; with the state of its end, unless there never was a group."""

    keep: bool = True


Action = (
    StageFirst | AwaitStaged | Form | Lose | Recover | Fail | Keep | CloseEpoch | OrderSegment | AwaitReport
    | SetLearningRate | AskForWorkers | EndGrowth | Stage | DropChange | GiveUp | StandStill | GoOn | Measure
    | CheckMembers | Wait | Finish
)  # fmt: skip
