"""What the driver and the workers say to each other: orders, answers, and signs of life, as frozen records.

All of it travels, so it holds plain values only; nothing here does anything.
"""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from parakit.checkpoints.in_shared_memory import SnapshotsKey
from parakit.collectives.base import ExchangeMethod
from parakit.engines.account import StepRecord
from parakit.errors import ParakitError
from parakit.failures.source_lines import Place, places_of, raised_by_parakit
from parakit.serialization import dumps

__all__ = ["Answer", "Failure", "Formed", "Heartbeat", "Orders", "RollbackReport", "Segment"]


@dataclass(frozen=True)
class Failure:
    """Why an order could not be carried out.

    Attributes
    ----------
    kind : {"diverged", "checked", "code", "group", "stale", "unreachable"}
        The loss or a parameter is not finite; a share does not add up of its parts; the model, the loss or the
        optimizer raised; a partner was lost; the order was of an older generation; or memory is out of reach.
    step : int
        Steps that were done.
    error, text : str
        The error's type, and its message.
    rank : int
        Of the worker it came up on; -1 if it is the one that answers.
    places : tuple of Place
        The user's own lines of code that it came through.
    ours : bool
        Whether parakit's own code raised it, and no code of the user's was on the way.
    cause : bytes
        The pickled error; empty if it cannot be pickled.
    in_parts : bool
        Whether it is a `ParakitError`, whose message says what is the case, where, why, and what to do.
    """

    kind: str
    step: int
    error: str
    text: str
    rank: int = -1
    places: tuple[Place, ...] = ()
    ours: bool = False
    cause: bytes = b""
    in_parts: bool = False

    @classmethod
    def of(cls, kind: str, step: int, error: BaseException, rank: int = -1) -> Failure:
        """What is to be told of an error."""
        cause = b""
        with suppress(Exception):
            cause = dumps(error)
        return cls(
            kind, step, type(error).__name__, str(error) or repr(error), rank, places_of(error),
            raised_by_parakit(error), cause, isinstance(error, ParakitError),
        )  # fmt: skip

    def raised(self) -> BaseException | None:
        """The error itself, where it could travel."""
        with suppress(Exception):
            error: Any = pickle.loads(self.cause) if self.cause else None
            return error if isinstance(error, BaseException) else None
        return None


@dataclass(frozen=True)
class Answer:
    """What came of an order: a value, or a failure."""

    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Orders:
    """One member's part of an assignment.

    Parameters
    ----------
    generation, rank : int
    hosts : tuple of str
        By rank, where each member listens; its process group is to listen there too.
    limit_seconds : float
        For each operation of the group.
    training, validation : tuple of int
        All chunks the member is to hold.
    group : bool
        Whether the members talk to each other.
    snapshots : bool
        Whether to keep commits where the notebook's process can hold on to them.
    """

    generation: int
    rank: int
    hosts: tuple[str, ...]
    limit_seconds: float
    training: tuple[int, ...]
    validation: tuple[int, ...]
    group: bool
    snapshots: bool

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.hosts)


@dataclass(frozen=True)
class Formed:
    """What a member tells of the group that it is in now.

    Attributes
    ----------
    method : ExchangeMethod
        How it exchanges gradients.
    snapshots : SnapshotsKey or None
        Where the member's commits can be found, if others can reach them.
    """

    method: ExchangeMethod
    snapshots: SnapshotsKey | None


@dataclass(frozen=True)
class Segment:
    """What a worker did in a segment, and where its commits can be found, if they can.

    Attributes
    ----------
    records : list of StepRecord
    commit_seconds : float
    seconds : float or None
        From the end of the segment before it to its own, by the clock of the worker; None if it was ordered later.
    snapshots : SnapshotsKey or None
    """

    records: list[StepRecord]
    commit_seconds: float
    seconds: float | None
    snapshots: SnapshotsKey | None = None


@dataclass(frozen=True)
class RollbackReport:
    """Where a member stands after a loss.

    Attributes
    ----------
    intact : bool
        Whether it has the state that was asked for.
    training, validation : tuple of int
        The chunks that it holds.
    """

    intact: bool
    training: tuple[int, ...]
    validation: tuple[int, ...]


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life, given beside the work.

    Attributes
    ----------
    still_seconds : float
        Since the last sign of progress; 0 while no order is being carried out.
    waiting : bool
        Whether it waits for partners: then it is not the one that holds the others up.
    """

    still_seconds: float
    waiting: bool
