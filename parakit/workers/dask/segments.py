"""How a run's segments are done on Dask workers: by its members, ordered ahead, or beside the notebook, as tasks.

Where the strategy's text runs, the state is: on the members, or in this process.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed import Future

from parakit.checkpoints.in_shared_memory import SnapshotsKey, SnapshotsReader, open_snapshots
from parakit.checkpoints.state import State, copy_state
from parakit.engines.evaluation import Tally
from parakit.engines.make import holds_parts
from parakit.errors import RunFailed, WorkerLost
from parakit.trees import pack, unpack
from parakit.workers import remote
from parakit.workers.commands import RollbackReport, Segment
from parakit.workers.dask.channel import EVALUATING, SETTING_UP, Channel
from parakit.workers.dask.task_team import TaskTeam
from parakit.workers.dask.worker_ids import address_of
from parakit.workers.session import Job, Report

__all__ = ["MemberSegments", "Segments", "TaskSegments"]


@dataclass(frozen=True)
class _Ordered:
    """A segment that was ordered, and what the members will answer."""

    first: int
    expected_seconds: float
    futures: dict[str, Future[Any]]


class MemberSegments:
    """Segments of a text that runs on the members; they begin one as soon as they have done the one before."""

    on_members = True

    def __init__(self, channel: Channel, job: Job) -> None:
        self._channel = channel
        self._job = job
        self._in_parts = holds_parts(job.strategy)  # each member has a part of the state, and all are needed
        self.intact: tuple[str, ...] = ()
        self.snapshots: SnapshotsReader | None = None
        self._ordered: deque[_Ordered] = deque()  # segments without a report yet
        self._numbers = itertools.count(1)  # of the segments that this generation ordered

    def staying(self, members: Sequence[str]) -> list[str]:
        """Members that go on from what they have; none where that is a part of the state, which is cut anew."""
        return [] if self._in_parts else [m for m in members if m in self.intact]

    def start_for(self, newcomers: Sequence[str], staying: Sequence[str]) -> Any:
        """Newcomers fetch it from the first of those who have it.

        It must be there before that one is told to wait for the newcomers: a worker with several threads might do both
        at once.
        """
        holders = self.intact if self._in_parts else staying
        return self._state_at(holders) if holders else None

    def _state_at(self, holders: Sequence[str], *step: int) -> Future[Any]:
        """The state that members have, at the first of them: its own, or what the parts of all make together."""
        channel, first = self._channel, holders[0]
        asking = holders if self._in_parts else holders[:1]
        asked = channel.order(asking, remote.state, *step)
        state = asked[first]
        if self._in_parts:
            state = channel.order([first], remote.merge, *asked.values())[first]
        channel.wait([state], asking, channel.patience(SETTING_UP))
        return state

    def begin(self, state: State | None, key: SnapshotsKey | None) -> None:
        """Every member has the state by now."""
        self.intact, self._numbers = self._channel.members, itertools.count(1)
        self._look_at(key)

    def _look_at(self, key: SnapshotsKey | None) -> None:
        self.snapshots = open_snapshots(key, self.snapshots)

    def fall_back(self, step: int, standings: Mapping[str, RollbackReport]) -> tuple[str, ...]:
        """Those who say that they have it; all others get it from the first of them. Parts are of no use alone."""
        holders, intact = self.intact, tuple(m for m, standing in standings.items() if standing.intact)
        if self._in_parts:
            intact = holders if set(holders) <= set(intact) else ()
        self.intact, self._numbers = intact if self._in_parts else intact[:1], itertools.count(1)
        return intact

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:
        """Order a segment; workers begin it as soon as they have done the one before it."""
        channel = self._channel
        order = next(self._numbers), first, count, request, bool(self._ordered), self.snapshots is not None
        futures = channel.order(channel.members, remote.advance, *order)
        self._ordered.append(_Ordered(first, expected_seconds, futures))

    def report(self) -> Report:
        """Wait for the end of a segment; if a user's code fails in it, all members are back where it began."""
        ordered = self._ordered.popleft()
        try:
            answers = self._channel.answers(
                ordered.futures, self._channel.patience(work_seconds=ordered.expected_seconds)
            )
        except RunFailed:
            self.abandon()
            self._roll_back(ordered.first)
            raise
        segments: list[Segment] = list(answers.values())
        self._look_at(segments[0].snapshots)
        spans = [segment.seconds for segment in segments if segment.seconds is not None]
        return Report(
            tuple(s.records for s in segments), max(s.commit_seconds for s in segments), max(spans, default=None)
        )

    def abandon(self) -> None:
        """Let go of the segments that were ordered ahead."""
        while self._ordered:
            self._channel.cancel(list(self._ordered.popleft().futures.values()))

    def _roll_back(self, step: int) -> None:
        channel = self._channel
        with suppress(RunFailed, WorkerLost):
            channel.ask(channel.present(channel.members), remote.roll_back, step, limits=channel.patience())

    def halt(self, request: int) -> None:
        """Let one member vote for the end of the segment; one vote ends it for all at the same step."""
        members = self._channel.members
        if members and not self._channel.closed:
            self._channel.beside(self._halt, members[0], request)

    def _halt(self, member: str, request: int) -> None:
        with suppress(Exception):  # a member that is gone ends the segment anyhow
            client = self._channel.cluster.client
            client.run(remote.halt, self._job.run_id, request, workers=[address_of(member)])

    def set_learning_rate(self, value: float) -> None:
        """Every member updates."""
        channel = self._channel
        channel.ask(channel.members, remote.set_learning_rate, value, limits=channel.patience())

    def state(self, step: int) -> State:
        """Any member that has it tells it, or all tell their parts."""
        channel = self._channel
        present = channel.present(self.intact)
        if not present or (self._in_parts and len(present) < len(self.intact)):
            raise WorkerLost("No worker of the run is left to fetch the state from.")
        asked = {present[0]: self._state_at(present, step)}
        return dict(unpack(channel.answers(asked, channel.patience(SETTING_UP))[present[0]]))

    def settle(self) -> None:
        """Let rank 0 keep the present state in its snapshots, if that can be reached."""
        if self.snapshots is not None:
            channel = self._channel
            (key,) = channel.ask(channel.members[:1], remote.commit, limits=channel.patience(SETTING_UP))
            self._look_at(key)

    def evaluate(self) -> Tally:
        """Every member evaluates the chunks that it holds."""
        return _tally(self._channel, None)


class TaskSegments:
    """Segments of a text that runs beside the notebook, and keeps the state here."""

    on_members = False
    snapshots: SnapshotsReader | None = None

    def __init__(self, channel: Channel, job: Job) -> None:
        self._channel = channel
        self._team = TaskTeam(channel, job)
        self.intact: tuple[str, ...] = ()
        self._ordered = (0, 0, 0)

    def staying(self, members: Sequence[str]) -> list[str]:
        """Members that have what is here."""
        return [m for m in members if m in self.intact]

    def start_for(self, newcomers: Sequence[str], staying: Sequence[str]) -> Any:
        """A copy of what is here."""
        return self._channel.spread(pack(copy_state(self._team.replica.live_state())), newcomers)

    def begin(self, state: State | None, key: SnapshotsKey | None) -> None:
        """Take the state over."""
        self.intact = self._channel.members
        if state is not None:
            self._team.replica.load(state)

    def fall_back(self, step: int, standings: Mapping[str, RollbackReport]) -> tuple[str, ...]:
        """The state is here, and everybody gets it anew."""
        self.intact = ()
        return self._channel.members if self._team.replica.fall_back(step) else ()

    def abandon(self) -> None:
        """Nothing is ordered ahead."""

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:
        """Note what is to be done."""
        self._ordered = first, count, request

    def report(self) -> Report:
        """Do the segment that was ordered; if a user's code fails in it, the state is what it was before."""
        try:
            return self._team.segment(*self._ordered)
        except RunFailed:
            self._team.replica.roll_back()
            raise

    def halt(self, request: int) -> None:
        """End the segment after its present step."""
        self._team.halted = max(self._team.halted, request)

    def set_learning_rate(self, value: float) -> None:
        """Only the optimizer that is here updates."""
        self._team.replica.set_learning_rate(value)

    def state(self, step: int) -> State:
        """What is here."""
        return dict(copy_state(self._team.replica.live_state()))

    def settle(self) -> None:
        """There are no snapshots."""

    def evaluate(self) -> Tally:
        """Every member evaluates what is here on the chunks that it holds."""
        return _tally(self._channel, self._team.values())


Segments = MemberSegments | TaskSegments


def _tally(channel: Channel, values: State | None) -> Tally:
    return sum(channel.ask(channel.members, remote.evaluate, values, limits=channel.patience(EVALUATING)), Tally())
