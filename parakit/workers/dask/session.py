"""A run's session on Dask workers: orders go out as pinned tasks, answers come back, each wait has a limit."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future as LocalFuture
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed import Future

from parakit.checkpoints.in_shared_memory import SnapshotsReader, open_snapshots
from parakit.checkpoints.state import State, copy_state
from parakit.data.samples import Samples
from parakit.engines.evaluation import Tally
from parakit.engines.make import holds_parts
from parakit.errors import BatchDependent, Diverged, RunFailed, WorkerLost
from parakit.failures.run_failed import code_failed
from parakit.serialization import dumps
from parakit.system.malloc import return_free_memory
from parakit.system.threads import in_thread
from parakit.trees import pack, unpack
from parakit.workers import remote
from parakit.workers.assignment import GroupAssignment, Survivors
from parakit.workers.commands import Answer, Failure, Orders, RollbackReport, Segment
from parakit.workers.dask.liveness import Limits, Outcome, watch
from parakit.workers.dask.sending import send
from parakit.workers.dask.store import WorkerStore, forget
from parakit.workers.dask.task_team import TaskTeam, settled
from parakit.workers.dask.worker_ids import address_of, host_of, is_here
from parakit.workers.session import Job, Report

if TYPE_CHECKING:
    from parakit.workers.dask.pool import DaskWorkers

__all__ = ["DaskSession"]

_Held = tuple[tuple[int, ...], tuple[int, ...]]

_FETCH_SECONDS = 0.2  # after which a fetch looks whether everybody is still there
_HEARTBEAT_SECONDS = 0.5  # for a heartbeat of a member that nothing else is heard of
_DISMISS_SECONDS = 5.0  # how long a member may take to let go of a run
# Times the limit for which code may make no progress:
_SETTING_UP = 3.0  # while data and recipes are unpacked
_EVALUATING = 10.0  # without a sign from within
_UNKNOWN = 6.0  # before anybody knows how long a step takes
_SLOW_STEPS = 10.0  # so many times as long as the last ones may a step take
_TELLING = ("diverged", "checked", "code", "stale", "group")  # which failure explains the others


class DaskSession:
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
        self._member = job.strategy.runs_on == "workers"
        self._in_parts = holds_parts(job.strategy)
        self.orders_ahead = self._member
        self._blob = dumps(job.recipe)
        #: Names of the active workers, in the order of their ranks.
        self.members: tuple[str, ...] = ()
        self._generation = -1
        self._held: dict[str, _Held] = {}  # the chunks that members hold, for training and for validation
        self._intact: tuple[str, ...] = ()  # members that have the present state
        self._snapshots: SnapshotsReader | None = None  # of the member of rank 0, if it can be reached
        self._step_seconds: float | None = None
        self._ordered: deque[_Ordered] = deque()  # segments without a report yet
        self._numbers = itertools.count(1)  # of the segments that this generation ordered
        self._beside: set[LocalFuture[None]] = set()  # what goes on in threads of its own
        self._brought: dict[int, dict[str, tuple[Any, Any]]] = {}
        self._touched: set[str] = set()  # workers that hold something of this run
        self._released = False
        self._count = itertools.count()
        self._driver = None if self._member else TaskTeam(self, job)

    # --- membership

    def stage(self, assignment: GroupAssignment) -> LocalFuture[None]:
        """Bring chunks and recipe to those who need them, while the run goes on."""
        return self._go_on_beside(self._bring, assignment)

    def _go_on_beside(self, function: Callable[..., None], *args: Any) -> LocalFuture[None]:
        going_on = in_thread(function, *args)
        self._beside.add(going_on)
        going_on.add_done_callback(self._beside.discard)
        return going_on

    def _bring(self, assignment: GroupAssignment) -> None:
        newcomers = [member for member in assignment.members if member not in self._held]
        threads = self._job.threads or self._pool.threads
        try:
            self._pool.make_ready(assignment.members)
            self._stage(newcomers, threads)
            self._brought[assignment.generation] = self._load_for(assignment)
            return_free_memory()  # of what was copied on its way
        finally:
            self._touched.update(newcomers)
            if self._released:  # the run ended meanwhile, so nobody else will tell them
                self._brought.clear()
                self._dismiss(newcomers)

    def _stage(self, newcomers: Sequence[str], threads: int) -> None:
        """Let newcomers make their copies of what is trained; those on this machine map the memory that it lies in."""
        memory = self._job.recipe.frozen.memory
        assert memory is not None
        near = [member for member in newcomers if memory.key is not None and is_here(host_of(member))]
        out_of_reach = self._prepare_with(near, threads, lambda _: memory.key)
        far = [member for member in newcomers if member not in near or member in out_of_reach]
        if self._prepare_with(far, threads, lambda member: self._sent(memory.array(), member)):
            raise WorkerLost(f"{len(far)} workers did not take the model.")

    def _prepare_with(self, members: Sequence[str], threads: int, memory: Callable[[str], Any]) -> list[str]:
        """The same, by one way; those that cannot reach the memory."""

        def order(member: str) -> tuple[Any, ...]:
            return self._job.run_id, self._sent(self._blob, member), memory(member), threads, self._pool.device

        futures = self._submit(members, remote.stage, order)
        self.watch(list(futures.values()), members, self.patience(_SETTING_UP))
        failures = {m: f for m, answer in self._fetched(futures).items() if (f := answer.failure) is not None}
        others = {member: failure for member, failure in failures.items() if failure.kind != "unreachable"}
        if others:
            raise self.explained(others)
        return list(failures)

    def _load_for(self, assignment: GroupAssignment) -> dict[str, tuple[Any, Any]]:
        """Place the chunks that each member gains; Dask's copy is let go of once the member has taken them."""
        wanted = _chunks_of(assignment)
        placed = {}
        for member in assignment.members:
            training, validation = (
                tuple(chunk for chunk in chunks if chunk not in held)
                for chunks, held in zip(wanted[member], self._held.get(member, ((), ())), strict=True)
            )
            placed[member] = (
                self._place(member, training, self._job.load),
                self._place(member, validation, self._job.load_validation),
            )
        return placed

    def _place(self, member: str, chunks: Sequence[int], load: Callable[[int], Samples]) -> Any:
        if not chunks:
            return {}
        if self._released:
            raise WorkerLost("The run ended while its chunks were under way.")
        return self._sent({chunk: load(chunk).packed() for chunk in chunks}, member)

    def _sent(self, value: Any, member: str) -> Any:
        return send(self._pool, self._job.run_id, value, member, self._job.limit_seconds)

    def form(self, assignment: GroupAssignment, state: State | None) -> None:
        """Make a staged assignment the active one."""
        brought = self._brought.pop(assignment.generation)
        staying = [m for m in assignment.members if m in self._intact and not self._in_parts]
        given = None if state is None else self.spread(pack(state), assignment.members)
        joining = given
        if state is None and len(staying) < len(assignment.members):
            holders = self._intact if self._in_parts else staying
            joining = self._state_for_newcomers(holders, [m for m in assignment.members if m not in staying])

        def order(member: str) -> tuple[Any, ...]:
            training, validation = brought[member]
            start = given if member in staying else joining
            return (
                self._job.run_id,
                self._orders(assignment, member),
                training,
                validation,
                start,
                self._store(assignment),
            )

        self._belong(assignment.members, assignment.generation)
        answers = self._answers(self._submit(assignment.members, remote.form, order), self.patience(_SETTING_UP))
        self._snapshots = open_snapshots(answers[assignment.members[0]], self._snapshots)
        if self._driver is not None and state is not None:
            self._driver.replica.load(state)
        self._intact, self._held = assignment.members, _chunks_of(assignment)
        self._dismiss([member for member in self._touched if member not in assignment.members])

    def regroup(self, generation: int, step: int) -> Survivors:
        """After a loss: who is left, each of them back at a step and deaf to older orders."""
        self._brought.clear()
        self._abandon()
        # Those of a change that was under way as well: they may have become members already.
        reachable = [m for m in {**dict.fromkeys(self.members), **self._held} if m in self._pool.names]
        orders = self._submit(reachable, remote.fall_back, lambda _: (self._job.run_id, generation, step))
        standings = self._those_who_answer(orders, self.patience(_SETTING_UP))
        self._belong(tuple(standings), generation)
        self._held = {m: (standing.training, standing.validation) for m, standing in standings.items()}
        if self._driver is not None:
            intact = self.members if self._driver.replica.fall_back(step) else ()
            self._intact = ()  # the state is the driver's, and everybody gets it anew
        else:
            holders, intact = self._intact, tuple(m for m, standing in standings.items() if standing.intact)
            if self._in_parts:  # of no use unless every part is left
                intact = holders if set(holders) <= set(intact) else ()
            self._intact = intact if self._in_parts else intact[:1]  # from whom all others get it
        return Survivors(
            {m: held for m, (held, _) in self._held.items()}, {m: held for m, (_, held) in self._held.items()}, intact
        )

    def _belong(self, members: tuple[str, ...], generation: int) -> None:
        """Speak for a group from now on."""
        self.members, self._generation, self._numbers = members, generation, itertools.count(1)

    def _those_who_answer(self, futures: Mapping[str, Future[Any]], limits: Limits) -> dict[str, RollbackReport]:
        """What members answer; those that are gone, hang or fail are left out."""
        outcome = watch(self._pool, self._job.run_id, list(futures.values()), list(futures), limits)
        self._give_up(outcome)
        waiting = set(outcome.waiting)
        answers = self._fetched({m: future for m, future in futures.items() if future not in waiting})
        return {m: answer.value for m, answer in answers.items() if answer.failure is None}

    def check(self) -> None:
        """Raise if a member is gone."""
        gone = set(self.members) - set(self._pool.names)
        if gone:
            raise self._lost(gone)

    def _asked_for_state(self, holders: Sequence[str], *step: int) -> Future[Any]:
        """The state that members have, at the first of them: its own, or what their parts make together."""
        asking = holders if self._in_parts else holders[:1]
        asked = self._submit(asking, remote.state, lambda member: self.order_for(member, *step))
        state = asked[holders[0]]
        if self._in_parts:
            state = self.submit_to(holders[:1], remote.merge, *self.order_for(holders[0]), *asked.values())
        self.watch([state], asking, self.patience(_SETTING_UP))
        return state

    def _state_for_newcomers(self, staying: Sequence[str], newcomers: Sequence[str]) -> Any:
        if self._driver is not None:
            return self.spread(pack(copy_state(self._driver.replica.live_state())), newcomers)
        if not staying:
            return None
        # Newcomers fetch it from the first of those who stay. It must be there before that one is told to wait for
        # the newcomers: a worker with several threads might do both at once.
        return self._asked_for_state(staying)

    def spread(self, value: Any, members: Sequence[str]) -> Any:
        """Scatter a value to members, each of which gets a copy."""

        def scatter() -> Any:
            return self._client.scatter(value, workers=list(map(address_of, members)), broadcast=True, hash=False)

        try:
            return in_thread(scatter).result(self._job.limit_seconds)
        except Exception as error:
            raise WorkerLost(
                f"{len(members)} workers did not take a value within {self._job.limit_seconds:g} s "
                f"({type(error).__name__}).",
                cause="a worker that is gone or hangs, or a very slow network",
            ) from error

    def _orders(self, assignment: GroupAssignment, member: str) -> Orders:
        training, validation = _chunks_of(assignment)[member]
        hosts, rank = tuple(host_of(member) for member in assignment.members), assignment.members.index(member)
        # Whoever hangs is found by its heartbeat, and killed where that is possible; otherwise this limit frees the
        # others.
        limit = self.patience().progress_seconds
        return Orders(
            assignment.generation, rank, hosts, limit,
            training, validation, self._member, self._member and rank == 0 and is_here(hosts[rank]),
        )  # fmt: skip

    def _store(self, assignment: GroupAssignment) -> WorkerStore:
        return WorkerStore(address_of(assignment.members[0]), self._job.run_id, assignment.generation)

    def order_for(self, member: str, *more: Any) -> tuple[Any, ...]:
        """The arguments of an order of the present generation."""
        return self._job.run_id, self._generation, *more

    def label(self, worker: str) -> str:
        """A short name for people."""
        return self._pool.label(worker)

    def release(self) -> None:
        """Let go of everything on the pool."""
        self._released = True
        self._brought.clear()
        self._snapshots = None
        deadline = time.monotonic() + _DISMISS_SECONDS
        for going_on in tuple(self._beside):  # a pool may close next, and cut connections off that are being opened
            with suppress(Exception):
                going_on.result(max(0.0, deadline - time.monotonic()))
        self._dismiss(list(self._touched))

    def _dismiss(self, members: Sequence[str]) -> None:
        # One that died may have been handed what another took up that is at its address now.
        staying = {address_of(m) for m in self.members if m not in members and not self._released}
        present = set(map(address_of, members)).intersection(map(address_of, self._pool.names)) - staying
        self._touched.difference_update(members)
        if present:
            with suppress(Exception):  # whoever is gone, or does not answer, has nothing to give back
                in_thread(self._client.run, forget, self._job.run_id, workers=list(present)).result(_DISMISS_SECONDS)

    # --- segments

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:
        """Order a segment; workers begin it as soon as they have done the one before it."""
        futures = {}
        if self._driver is None:
            order = next(self._numbers), first, count, request, bool(self._ordered), self._snapshots is not None
            futures = self._submit(self.members, remote.advance, lambda member: self.order_for(member, *order))
        self._ordered.append(_Ordered(first, count, request, expected_seconds, futures))

    def report(self) -> Report:
        """Wait for the end of a segment; if a user's code fails in it, all members are back where it began."""
        ordered = self._ordered.popleft()
        try:
            report = self._report(ordered)
        except RunFailed:
            self._abandon()
            self._roll_back(ordered.first)
            raise
        if report.steps:
            self._step_seconds = max(record.wall_seconds for records in report.records for record in records)
        return report

    def _report(self, ordered: _Ordered) -> Report:
        if self._driver is not None:
            return self._driver.segment(ordered.first, ordered.count, ordered.request)
        answers = self._answers(ordered.futures, self.patience(work_seconds=ordered.expected_seconds))
        segments: list[Segment] = list(answers.values())
        self._snapshots = open_snapshots(segments[0].snapshots, self._snapshots)
        spans = [segment.seconds for segment in segments if segment.seconds is not None]
        return Report(
            tuple(s.records for s in segments), max(s.commit_seconds for s in segments), max(spans, default=None)
        )

    def _abandon(self) -> None:
        """Let go of the segments that were ordered ahead."""
        while self._ordered:
            self._client.cancel(list(self._ordered.popleft().futures.values()))

    def patience(self, times: float = 1.0, work_seconds: float = 0.0) -> Limits:
        """How long members may say nothing; longer as long as nobody knows how long a step takes."""
        limit = self._job.limit_seconds
        progress = times * max(limit, _SLOW_STEPS * self._step_seconds) if self._step_seconds else _UNKNOWN * limit
        return Limits(limit, progress, progress + 5 * work_seconds + limit)

    def _roll_back(self, step: int) -> None:
        if self._driver is not None:
            self._driver.replica.roll_back()
            return
        present = [m for m in self.members if m in self._pool.names]
        with suppress(RunFailed, WorkerLost):
            orders = self._submit(present, remote.roll_back, lambda member: self.order_for(member, step))
            self._answers(orders, self.patience())

    def halt(self, request: int) -> None:
        """Let one member vote for the end of the segment; one vote ends it for all at the same step."""
        members = self.members
        if self._driver is not None:
            self._driver.halted = max(self._driver.halted, request)
        elif members and not self._released:
            self._go_on_beside(self._halt_one, members[0], request)

    def _halt_one(self, member: str, request: int) -> None:
        with suppress(Exception):  # a member that is gone ends the segment anyhow
            self._client.run(remote.halt, self._job.run_id, request, workers=[address_of(member)])

    def set_learning_rate(self, value: float) -> None:
        """Let whoever updates go on at another learning rate: the driver, or else every member."""
        if self._driver is not None:
            self._driver.replica.set_learning_rate(value)
        else:
            self.everyone(remote.set_learning_rate, value, limits=self.patience())

    def state(self, step: int) -> State:
        """The state of a step to which the last report came."""
        if self._driver is not None:
            return dict(copy_state(self._driver.replica.live_state()))
        present = [m for m in self._intact if m in self._pool.names]
        if not present or (self._in_parts and len(present) < len(self._intact)):
            raise WorkerLost("No worker of the run is left to fetch the state from.")
        asked = self._asked_for_state(present, step)
        return dict(unpack(self._answers({present[0]: asked}, self.patience(_SETTING_UP))[present[0]]))

    @property
    def snapshots(self) -> SnapshotsReader | None:
        """The commits of rank 0, in memory that it shares with this process, if it does."""
        return self._snapshots

    def settle(self) -> None:
        """Let rank 0 keep the present state in its snapshots, if that can be reached."""
        if self._snapshots is None or self._driver is not None:
            return
        keeping = self._submit(self.members[:1], remote.commit, self.order_for)
        answers = self._answers(keeping, self.patience(_SETTING_UP))
        self._snapshots = open_snapshots(answers[self.members[0]], self._snapshots)

    def read_surviving_snapshot(self, step: int) -> State | None:
        """The newest commit of at most a step in the memory that rank 0 shares with this process, if it does."""
        return None if self._snapshots is None else self._snapshots.newest(step)

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks."""
        values = None if self._driver is None else self._driver.values()
        tallies = self.everyone(remote.evaluate, values, limits=self.patience(_EVALUATING)).values()
        return sum(tallies, Tally())

    # --- orders and answers

    def everyone(self, function: Callable[..., Answer], *args: Any, limits: Limits) -> dict[str, Any]:
        """Give all members an order of the present generation; what each answered, in the order of ranks."""
        futures = self._submit(self.members, function, lambda member: self.order_for(member, *args))
        return self._answers(futures, limits)

    def _submit(
        self, members: Sequence[str], function: Callable[..., Answer], args: Callable[[str], tuple[Any, ...]]
    ) -> dict[str, Future[Any]]:
        return {member: self.submit_to([member], function, *args(member)) for member in members}

    def submit_to(self, members: Sequence[str], function: Callable[..., Answer], *args: Any) -> Future[Any]:
        """A task on one of some members; never shared with an equal one."""
        key = f"parakit-{function.__name__}-{self._job.run_id}-{next(self._count)}"
        return self._client.submit(function, *args, key=key, pure=False, workers=list(map(address_of, members)))

    def _answers(self, futures: Mapping[str, Future[Any]], limits: Limits) -> dict[str, Any]:
        """Wait for answers, and return their values; the first failure that explains the others is raised."""
        self.watch(list(futures.values()), list(futures), limits)
        answers = self._fetched(futures)
        failures = {member: answer.failure for member, answer in answers.items() if answer.failure is not None}
        if failures:
            raise self.explained(failures)
        return {member: answer.value for member, answer in answers.items()}

    def _fetched(self, futures: Mapping[str, Future[Any]]) -> dict[str, Answer]:
        """The answers of futures that are done: all in one request, or one by one if any is lost."""
        fetching = in_thread(self._client.gather, list(futures.values()))
        deadline = time.monotonic() + self._job.limit_seconds
        while time.monotonic() < deadline:
            try:
                return dict(zip(futures, fetching.result(_FETCH_SECONDS), strict=True))
            except TimeoutError:
                # Who died after answering took the answer along, and Dask waits for somebody to compute it again.
                gone = set(futures) - set(self._pool.names)
                if gone:
                    self._client.cancel([futures[member] for member in gone])
                    break
            except Exception:
                break
        else:
            silent = self._silent(futures)
            self._pool.exclude(silent)
            if silent:
                raise self._hanging(silent)
            raise WorkerLost(f"{len(futures)} answers could not be fetched within {self._job.limit_seconds:g} s.")
        return {member: settled(future, self._job.limit_seconds) for member, future in futures.items()}

    def watch(self, futures: Sequence[Future[Any]], members: Sequence[str], limits: Limits | None = None) -> None:
        """Wait until futures are done, as long as those who work on them are there and do not hang."""
        outcome = watch(self._pool, self._job.run_id, futures, members, limits or self.patience())
        self._give_up(outcome)
        if outcome.gone:
            raise self._lost(set(outcome.gone))
        hang = {**outcome.late, **outcome.hung}
        if hang:
            raise self._hanging(hang)

    def _silent(self, members: Iterable[str]) -> dict[str, str]:
        """Of members that answered, but whose answers cannot be had: those that hang since, and what is seen of it."""
        asked = {member: self._pool.ask_heartbeat(member, self._job.run_id) for member in members}
        deadline = time.monotonic() + _HEARTBEAT_SECONDS
        while time.monotonic() < deadline and not all(heartbeat.done() for heartbeat in asked.values()):
            time.sleep(_FETCH_SECONDS / 10)
        seen = f"gave no sign of life for {self._job.limit_seconds + _HEARTBEAT_SECONDS:.1f} s"
        return {
            member: seen
            for member, heartbeat in asked.items()
            if not heartbeat.done() or heartbeat.exception() is not None
        }

    def _hanging(self, hang: Mapping[str, str]) -> WorkerLost:
        told = "; ".join(f"{self.label(m)} {seen}" for m, seen in hang.items())
        return WorkerLost(
            f"{len(hang)} of {len(self.members)} workers hang: {told}.",
            cause="a stopped process, code that waits for ever, or a worker that is busy with other tasks",
            remedy="if steps or loading take that long, allow more: train(..., limit_seconds=...)",
        )

    def _give_up(self, outcome: Outcome) -> None:
        """Let go of orders that nobody will carry out, and of workers that hang."""
        if outcome.waiting:
            self._client.cancel(list(outcome.waiting))
        self._pool.exclude({**outcome.late, **outcome.hung})

    def _lost(self, gone: set[str]) -> WorkerLost:
        names = ", ".join(sorted(self.label(m) for m in gone))
        return WorkerLost(
            f"{len(gone)} of {len(self.members)} workers died: {names}.",
            cause="the process was killed, ran out of memory, or its machine was taken away",
        )

    @property
    def _inline(self) -> str:
        return "'inline'" if self._pool.device == "cpu" else f"'inline', device='{self._pool.device}'"

    def _failed(self, member: str, failure: Failure) -> RunFailed:
        """What a user should read about an error that came up on a worker."""
        rows = self._rows_of(member, failure.step)
        failed = code_failed(
            f"Step {failure.step} failed on {self.label(member)}", failure, rows,
            remedy="try the same batch in this notebook: "
            f"pk.train(..., on=pk.connect({self._inline})) raises it here",
        )  # fmt: skip
        failed.__cause__ = failure.raised()
        return failed

    def _rows_of(self, member: str, step: int) -> list[int]:
        """Which rows of the data a member had in a step."""
        held = self._held.get(member)
        return [] if held is None or step < 0 else self._job.rows(step, held[0])

    def explained(self, failures: Mapping[str, Failure]) -> RunFailed | WorkerLost:
        """The error that a user should see: code that raised explains a lost partner, not the other way round."""
        gone = set(self.members) - set(self._pool.names)
        member, failure = min(failures.items(), key=lambda item: _TELLING.index(item[1].kind))
        if failure.kind == "diverged":
            return Diverged(failure.text, step=failure.step)
        if failure.kind == "checked":
            return BatchDependent(failure.text)
        if failure.kind == "code":
            return self._failed(member, failure)
        if gone:
            return self._lost(gone)
        return WorkerLost(f"{self.label(member)} cannot go on: {failure.text}")


@dataclass(frozen=True)
class _Ordered:
    """A segment that was ordered, and what the members will answer."""

    first: int
    count: int
    request: int
    expected_seconds: float
    futures: dict[str, Future[Any]]


def _chunks_of(assignment: GroupAssignment) -> dict[str, _Held]:
    """The chunks of each member, for training and for validation."""
    validation = assignment.validation.chunks_of if assignment.validation else {}
    return {member: (chunks, validation.get(member, ())) for member, chunks in assignment.training.chunks_of.items()}
