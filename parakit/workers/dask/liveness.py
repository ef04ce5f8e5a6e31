"""The one way to wait for workers here: as long as those who work on something are there and give signs of life.

A member that died is missing from the scheduler's list. One that hangs is still on it: it is found by its heartbeat,
which it gives beside its work. Without a heartbeat, the whole process stands still; with a heartbeat but without
progress, the code that it runs does. Whoever waits for partners in an exchange holds nobody up and is never blamed.

Knows workers by their names alone, and nothing of Dask: who is there, and how they do, is asked through `Present`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future as LocalFuture
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from parakit.workers.commands import Heartbeat

__all__ = ["Limits", "Outcome", "Present", "await_while_alive"]

_CLOSE_LOOK_SECONDS = 0.05  # once some are done and others are not: a partner may just have died
_GRACE_SECONDS = 3.0  # survivors raise well within this after a partner died
_HEARTBEATS_IN_LIMIT = 8


class Present(Protocol):
    """What a wait asks of those who are waited for."""

    @property
    def names(self) -> Collection[str]:
        """The workers there are now."""

    def ask_heartbeat(self, name: str, run_id: str) -> LocalFuture[Heartbeat]:
        """Ask a worker for its heartbeat in a run, without waiting; fails if the worker cannot be asked."""

    def wait_for_one(self, futures: Sequence[Any], limit_seconds: float) -> list[Any]:
        """Wait until one of some futures is done, up to a limit; those that are not."""


@dataclass(frozen=True)
class Limits:
    """How long workers may say nothing; for ever, where nothing is given.

    Parameters
    ----------
    heartbeat_seconds : float
        Without a heartbeat. Without this limit they are asked for none.
    progress_seconds : float
        With a heartbeat, but without progress.
    whole_seconds : float
        For all of it, whatever the heartbeats say.
    look_seconds : float
        How often to look whether everybody is still there.
    """

    heartbeat_seconds: float = inf
    progress_seconds: float = inf
    whole_seconds: float = inf
    look_seconds: float = 0.5


@dataclass(frozen=True)
class Outcome:
    """What came of a wait.

    Attributes
    ----------
    waiting : tuple of futures
        Those that are not done.
    gone : frozenset of str
        Workers that are not there any more.
    hung : mapping of str to str
        Workers that hang, and what was seen.
    late : mapping of str to str
        Workers that have not carried out their order in the whole time that it may take, whatever they do.
    """

    waiting: tuple[Any, ...] = ()
    gone: frozenset[str] = frozenset()
    hung: Mapping[str, str] = field(default_factory=dict)
    late: Mapping[str, str] = field(default_factory=dict)

    @property
    def blamed(self) -> dict[str, str]:
        """Who is there and holds the others up, and what was seen."""
        return {**self.late, **self.hung}


def await_while_alive(
    workers: Present, futures: Sequence[Any], names: Sequence[str], limits: Limits, run_id: str = ""
) -> Outcome:
    """Wait until futures are done, as long as those who work on them are there and give signs of life.

    Parameters
    ----------
    workers : Present
    futures : sequence of Future
        All of Dask's, or all of this process's own threads.
    names : sequence of str
        Who works on them: one each, if there are as many, or all on any.
    limits : Limits
    run_id : str
        In which they are asked for heartbeats.
    """
    return _Wait(workers, futures, names, limits, run_id).outcome()


class _Wait:
    def __init__(
        self, workers: Present, futures: Sequence[Any], names: Sequence[str], limits: Limits, run_id: str
    ) -> None:
        self._workers = workers
        self._waiting = list(futures)
        self._owners = dict(zip(futures, names, strict=True)) if len(futures) == len(names) else {}
        self._names = tuple(names)
        self._limits = limits
        self._began = time.monotonic()
        self._lost_at: float | None = None
        self._heartbeats = _Heartbeats(workers, run_id, self._began)
        self._next_heartbeat = self._began + limits.heartbeat_seconds / 4

    def outcome(self) -> Outcome:
        look = self._limits.look_seconds
        every = len(self._waiting)
        while True:
            began, before = time.monotonic(), len(self._waiting)
            self._waiting = self._workers.wait_for_one(self._waiting, look)
            self._excuse(time.monotonic() - began - look)
            if not self._waiting:
                return Outcome()
            if len(self._waiting) < before:  # the others come in a moment; to ask who is there would take longer
                look = _CLOSE_LOOK_SECONDS
                continue
            gone = frozenset(self._names) - set(self._workers.names)
            if gone and self._is_settled(gone):
                return Outcome(tuple(self._waiting), gone=gone)
            late, hung = ({}, {}) if gone else (self._late(), self._hung())
            if late or hung:
                return Outcome(tuple(self._waiting), hung=hung, late=late)
            look = _CLOSE_LOOK_SECONDS if gone or len(self._waiting) < every else self._limits.look_seconds

    def _excuse(self, late_seconds: float) -> None:
        """Where this process itself stood still, as a stopped or suspended one does, nobody else is to blame."""
        if late_seconds > self._limits.heartbeat_seconds / 4:
            self._began += late_seconds
            self._heartbeats.excuse(late_seconds)

    def _is_settled(self, gone: Collection[str]) -> bool:
        """Whether nothing more can come: all others have answered, or had time enough to notice the loss."""
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        return (
            not self._owners  # what any of them may work on needs what all of them did
            or now > self._lost_at + _GRACE_SECONDS
            or self._workers_on(self._waiting) <= set(gone)
        )

    def _workers_on(self, futures: Sequence[Any]) -> set[str]:
        return {self._owners[future] for future in futures} if self._owners else set(self._names)

    def _late(self) -> dict[str, str]:
        whole = self._limits.whole_seconds
        if time.monotonic() < self._began + whole:
            return {}
        suspects = sorted(self._workers_on(self._waiting))
        blamed = [m for m in suspects if not self._heartbeats.waits(m)] or suspects
        return dict.fromkeys(blamed, f"did not carry out an order within {whole:.1f} s")

    def _hung(self) -> dict[str, str]:
        now, limits = time.monotonic(), self._limits
        suspects = sorted(self._workers_on(self._waiting))
        if now < self._next_heartbeat:
            return {}
        self._next_heartbeat = now + limits.heartbeat_seconds / _HEARTBEATS_IN_LIMIT
        self._heartbeats.take(suspects, now)
        hung = {}
        for member in suspects:
            silent, still = now - self._heartbeats.heard_at(member), self._heartbeats.still_seconds(member)
            if silent > limits.heartbeat_seconds:
                hung[member] = f"gave no sign of life for {silent:.1f} s"
            elif still > limits.progress_seconds:
                hung[member] = f"made no progress in {still:.1f} s, though its process answers"
        return hung


class _Heartbeats:
    """Heartbeats of workers in a run: asked for without waiting, and never more than one at a time of each."""

    def __init__(self, workers: Present, run_id: str, began: float) -> None:
        self._workers = workers
        self._run_id = run_id
        self._began = began
        self._asked: dict[str, Any] = {}
        self._heard: dict[str, tuple[float, Heartbeat]] = {}

    def take(self, members: Sequence[str], now: float) -> None:
        """Read the heartbeats that have come, and ask for the next ones."""
        for member in members:
            asked = self._asked.get(member)
            if asked is not None and asked.done():
                heartbeat = None if asked.cancelled() or asked.exception() else asked.result()
                if heartbeat is not None:
                    self._heard[member] = now, heartbeat
                asked = None
            self._asked[member] = asked or self._workers.ask_heartbeat(member, self._run_id)

    def excuse(self, seconds: float) -> None:
        """Let all that was heard be so much younger."""
        self._began += seconds
        self._heard = {member: (at + seconds, heartbeat) for member, (at, heartbeat) in self._heard.items()}

    def heard_at(self, member: str) -> float:
        """When a member gave its last sign of life, or the wait began."""
        return self._heard[member][0] if member in self._heard else self._began

    def still_seconds(self, member: str) -> float:
        """How long a member has made no progress, as far as is known; 0 for one that waits for partners."""
        _, heartbeat = self._heard.get(member, (0.0, Heartbeat(0.0, False)))
        return 0.0 if heartbeat.waiting else heartbeat.still_seconds

    def waits(self, member: str) -> bool:
        """Whether a member waits for partners."""
        return member in self._heard and self._heard[member][1].waiting
