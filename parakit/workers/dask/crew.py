"""A run's crew on Dask workers: orders go out as pinned tasks, answers come back, and nobody is waited for in vain."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future as LocalFuture
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import cloudpickle
from distributed import Future

from parakit.chunks import Ownership
from parakit.data import Samples, pack, unpack
from parakit.errors import RunFailed, WorkerLost
from parakit.evaluation import Tally
from parakit.machine import in_thread
from parakit.replica import State, copy_state
from parakit.workers import resident
from parakit.workers.base import Job, Report, Roster
from parakit.workers.dask.driver import DriverTeam, settled
from parakit.workers.dask.rendezvous import WorkerBoard, forget
from parakit.workers.resident import Answer, Failure, Orders, Segment

if TYPE_CHECKING:
    from parakit.workers.dask.pool import DaskWorkers

__all__ = ["DaskCrew"]

_LOOK_SECONDS = 0.5  # how often a wait looks whether everybody is still there
_DISMISS_SECONDS = 5.0  # how long a member may take to let go of a run
_GRACE_SECONDS = 5.0  # survivors raise well within this after a partner died


class DaskCrew:
    """A run's hold on Dask workers.

    Parameters
    ----------
    pool : DaskWorkers
    job : Job
    """

    def __init__(self, pool: DaskWorkers, job: Job) -> None:
        self._pool = pool
        self._client = pool.client
        self._job = job
        self._resident = job.strategy.runs_on == "workers"
        self._blob = cloudpickle.dumps((job.recipe, job.strategy))
        self._roster: Roster | None = None
        self._brought: dict[int, dict[str, tuple[Any, Any]]] = {}
        self._touched: set[str] = set()  # workers that hold something of this run
        self._released = False
        self._count = itertools.count()
        self._driver = None if self._resident else DriverTeam(self, job)

    # --- membership

    def prepare(self, roster: Roster) -> LocalFuture[None]:
        """Bring chunks and recipe to those who need them, while the run goes on."""
        return in_thread(self._bring, roster)

    def _bring(self, roster: Roster) -> None:
        before = self._roster
        staying = set(before.members) if before else set()
        newcomers = [member for member in roster.members if member not in staying]
        try:
            self._pool.make_ready(roster.members)
            order = self._job.run_id, self._blob, self._pool.threads
            made = self._submit(newcomers, resident.prepare, lambda _: order)
            self._brought[roster.generation] = self._load_for(roster, before)
            self._answers(made, self._job.limit_seconds)
        finally:
            self._touched.update(newcomers)
            if self._released:  # the run ended meanwhile, so nobody else will tell them
                self._brought.clear()
                self._dismiss(newcomers)

    def _load_for(self, roster: Roster, before: Roster | None) -> dict[str, tuple[Any, Any]]:
        """Place the chunks that each member gains; Dask's copy is let go of once the member has taken them."""
        training = _gained(before.training if before else None, roster.training)
        validation = _gained(before.validation if before else None, roster.validation)
        return {
            member: (
                self._place(member, training.get(member, ()), self._job.load),
                self._place(member, validation.get(member, ()), self._job.load_validation),
            )
            for member in roster.members
        }

    def _place(self, member: str, chunks: Sequence[int], load: Callable[[int], Samples]) -> Any:
        if not chunks:
            return {}
        packed = {chunk: load(chunk).packed() for chunk in chunks}
        return self._client.scatter([packed], workers=[member], hash=False)[0]

    def muster(self, roster: Roster, state: State | None) -> None:
        """Make a prepared roster the active one."""
        before, brought = self._roster, self._brought.pop(roster.generation)
        staying = [m for m in roster.members if before and m in before.members]
        given = None if state is None else self.spread(pack(state), roster.members)
        joining = given
        if state is None and len(staying) < len(roster.members):
            joining = self._state_for_newcomers(staying)

        def order(member: str) -> tuple[Any, ...]:
            training, validation = brought[member]
            start = given if member in staying else joining
            return self._job.run_id, self._orders(roster, member), training, validation, start, self._board(roster)

        self._roster = roster
        self._answers(self._submit(roster.members, resident.muster, order), self._job.limit_seconds)
        if self._driver is not None and state is not None:
            self._driver.replica.load(state)
        self._dismiss([member for member in self._touched if member not in roster.members])

    def _state_for_newcomers(self, staying: Sequence[str]) -> Any:
        if self._driver is not None:
            return pack(copy_state(self._driver.replica.live_state()))
        if not staying:
            return None
        # Newcomers fetch it from the first of those who stay. It must be there before that one is told to wait for
        # the newcomers: a worker with several threads might do both at once.
        asked = self._submit(staying[:1], resident.state, self.order_for)
        self.watch(list(asked.values()), staying[:1], self._job.limit_seconds)
        return asked[staying[0]]

    def spread(self, value: Any, members: Sequence[str]) -> Any:
        """Scatter a value to members, each of which gets a copy."""

        def scatter() -> Any:
            return self._client.scatter(value, workers=list(members), broadcast=True, hash=False)

        try:
            return in_thread(scatter).result(self._job.limit_seconds)
        except TimeoutError as error:
            raise WorkerLost(
                f"{len(members)} workers did not take a value within {self._job.limit_seconds:g} s.",
                cause="a worker that hangs, or a very slow network",
            ) from error

    def _orders(self, roster: Roster, member: str) -> Orders:
        validation = roster.validation.chunks_of if roster.validation else {}
        host = member.split("://")[-1].rsplit(":", 1)[0].strip("[]")
        return Orders(
            roster.generation, roster.members.index(member), len(roster.members), host, self._job.limit_seconds,
            roster.training.chunks_of[member], validation.get(member, ()), self._resident,
        )  # fmt: skip

    def _board(self, roster: Roster) -> WorkerBoard:
        return WorkerBoard(roster.members[0], self._job.run_id, roster.generation)

    def order_for(self, member: str, *more: Any) -> tuple[Any, ...]:
        """The arguments of an order of the present generation."""
        return self._job.run_id, self._generation, *more

    @property
    def _generation(self) -> int:
        assert self._roster is not None
        return self._roster.generation

    @property
    def members(self) -> tuple[str, ...]:
        """Addresses of the active workers, in the order of their ranks."""
        return self._roster.members if self._roster else ()

    def label(self, worker: str) -> str:
        """A short name for people."""
        return self._pool.label(worker)

    def release(self) -> None:
        """Let go of everything on the pool."""
        self._released = True
        self._brought.clear()
        self._dismiss(list(self._touched))

    def _dismiss(self, members: Sequence[str]) -> None:
        there = self._pool.names
        present = [member for member in members if member in there]
        self._touched.difference_update(members)
        if present:
            with suppress(Exception):  # whoever is gone, or does not answer, has nothing to give back
                in_thread(self._client.run, forget, self._job.run_id, workers=present).result(_DISMISS_SECONDS)

    # --- segments

    def advance(self, first: int, count: int, wish: int, expected_seconds: float) -> Report:
        """Do a segment; if it fails, the members that can be reached are back at the last commit."""
        limit = self._job.limit_seconds + 5 * expected_seconds
        try:
            if self._driver is not None:
                return self._driver.segment(first, count, wish)
            answers = self.everyone(resident.advance, first, count, wish, limit_seconds=limit)
        except (RunFailed, WorkerLost):
            self._roll_back()
            raise
        segments: list[Segment] = list(answers.values())
        return Report(tuple(s.records for s in segments), max(s.commit_seconds for s in segments))

    def _roll_back(self) -> None:
        if self._driver is not None:
            self._driver.replica.roll_back()
            return
        present = [m for m in self.members if m in self._pool.names]
        with suppress(RunFailed, WorkerLost):
            self._answers(self._submit(present, resident.roll_back, self.order_for), self._job.limit_seconds)

    def halt(self, wish: int) -> None:
        """Let one member vote for the end of the segment; one vote ends it for all at the same step."""
        members = self.members
        if self._driver is not None:
            self._driver.halted = max(self._driver.halted, wish)
        elif members:
            in_thread(self._halt_one, members[0], wish)

    def _halt_one(self, member: str, wish: int) -> None:
        with suppress(Exception):  # a member that is gone ends the segment anyhow
            self._client.run(resident.halt, self._job.run_id, wish, workers=[member])

    def set_learning_rate(self, value: float) -> None:
        """Let whoever updates go on at another learning rate: the driver, or else every member."""
        if self._driver is not None:
            self._driver.replica.set_learning_rate(value)
        else:
            self.everyone(resident.set_learning_rate, value, limit_seconds=self._job.limit_seconds)

    def state(self) -> State:
        """The state after the last segment."""
        if self._driver is not None:
            return dict(copy_state(self._driver.replica.live_state()))
        present = [m for m in self.members if m in self._pool.names][:1]
        if not present:
            raise WorkerLost("No worker of the run is left to fetch the state from.")
        answers = self._answers(self._submit(present, resident.state, self.order_for), self._job.limit_seconds)
        return dict(unpack(answers[present[0]]))

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks."""
        values = None if self._driver is None else self._driver.values()
        limit = 10 * self._job.limit_seconds
        tallies = self.everyone(resident.evaluate, values, limit_seconds=limit).values()
        return sum(tallies, Tally())

    # --- orders and answers

    def everyone(self, function: Callable[..., Answer], *args: Any, limit_seconds: float) -> dict[str, Any]:
        """Give all members an order of the present generation; what each answered, in the order of ranks."""
        futures = self._submit(self.members, function, lambda member: self.order_for(member, *args))
        return self._answers(futures, limit_seconds)

    def _submit(
        self, members: Sequence[str], function: Callable[..., Answer], args: Callable[[str], tuple[Any, ...]]
    ) -> dict[str, Future[Any]]:
        return {member: self.submit_to([member], function, *args(member)) for member in members}

    def submit_to(self, members: Sequence[str], function: Callable[..., Answer], *args: Any) -> Future[Any]:
        """A task on one of some members; never shared with an equal one."""
        key = f"parakit-{function.__name__}-{self._job.run_id}-{next(self._count)}"
        return self._client.submit(function, *args, key=key, pure=False, workers=list(members))

    def _answers(self, futures: Mapping[str, Future[Any]], limit_seconds: float) -> dict[str, Any]:
        """Wait for answers, and return their values; the first failure that explains the others is raised."""
        self.watch(list(futures.values()), futures.keys(), limit_seconds)
        answers = self._fetched(futures)
        failures = {member: answer.failure for member, answer in answers.items() if answer.failure is not None}
        if failures:
            raise self.explained(failures)
        return {member: answer.value for member, answer in answers.items()}

    def _fetched(self, futures: Mapping[str, Future[Any]]) -> dict[str, Answer]:
        """The answers of futures that are done: all in one request, or one by one if any is lost."""
        try:
            return dict(zip(futures, self._client.gather(list(futures.values())), strict=True))
        except Exception:
            return {member: settled(future) for member, future in futures.items()}

    def watch(self, futures: Sequence[Future[Any]], members: Any, limit_seconds: float) -> None:
        """Wait until futures are done, as long as those who work on them are there."""
        deadline = time.monotonic() + limit_seconds
        lost_at = None
        while True:
            _, waiting = self._pool.wait(futures, _LOOK_SECONDS)
            if not waiting:
                return
            now = time.monotonic()
            gone = set(members) - set(self._pool.names)
            if gone and lost_at is None:
                lost_at = now
            if (lost_at is not None and now > lost_at + _GRACE_SECONDS) or now > deadline:
                break
            if lost_at is not None and all(f.done() for m, f in zip(members, futures, strict=False) if m not in gone):
                break
        self._client.cancel(list(waiting))
        if gone:
            raise self._lost(gone)
        raise WorkerLost(
            f"{len(waiting)} orders were not answered within {limit_seconds:.1f} s.",
            cause="a worker that hangs, or is busy with somebody else's tasks",
            remedy="look at the workers, or allow more: train(..., limit_seconds=...)",
        )

    def _lost(self, gone: set[str]) -> WorkerLost:
        names = ", ".join(sorted(self.label(m) for m in gone))
        return WorkerLost(
            f"{len(gone)} of {len(self.members)} workers died: {names}.",
            cause="the process was killed, ran out of memory, or its machine was taken away",
        )

    def explained(self, failures: Mapping[str, Failure]) -> RunFailed | WorkerLost:
        """The error that a user should see: code that raised explains a lost partner, not the other way round."""
        gone = set(self.members) - set(self._pool.names)
        member, failure = min(failures.items(), key=lambda item: ("code", "stale", "group").index(item[1].kind))
        if failure.kind == "code":
            return RunFailed(
                f"Step {failure.step} failed on {self.label(member)}: {failure.error}: {failure.text}",
                cause="the model, the loss or the optimizer raised this error in its own code",
                remedy="try the same batch in this notebook: pk.train(..., on=pk.connect('inline')) raises it here",
            )
        if gone:
            return self._lost(gone)
        return WorkerLost(f"{self.label(member)} cannot go on: {failure.text}")


def _gained(before: Ownership | None, after: Ownership | None) -> dict[str, tuple[int, ...]]:
    """The chunks that each owner must load."""
    if after is None:
        return {}
    return before.gains(after) if before else dict(after.chunks_of)
