"""Commands out to a run's members, as pinned tasks, and their answers in, as long as the members live."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future as LocalFuture
from concurrent.futures import wait
from typing import Any

from distributed import Future

from parakit.errors import BatchDependent, Diverged, RunFailed, WorkerLost
from parakit.failures.run_failed import code_failure
from parakit.system.threads import in_thread
from parakit.workers.commands import Answer, Failure
from parakit.workers.dask.cluster import DaskCluster
from parakit.workers.dask.liveness import Limits, Outcome, await_while_alive
from parakit.workers.dask.worker_ids import address_of
from parakit.workers.session import Job

__all__ = ["EVALUATING", "SETTING_UP", "Channel", "Held", "answer_of"]

#: The chunks that a member holds, for training and for validation.
Held = tuple[tuple[int, ...], tuple[int, ...]]

# Times the limit for which code may make no progress:
SETTING_UP = 3.0  # while data and recipes are unpacked
EVALUATING = 10.0  # without a sign from within
_UNKNOWN = 6.0  # before anybody knows how long a step takes
_SLOW_STEPS = 10.0  # so many times as long as the last ones may a step take
_FETCH_LIMITS = 1.25  # after which answers are given up; who hangs is found before
_FETCH_LOOK_SECONDS = 0.2
_TELLING = ("diverged", "checked", "code", "stale", "group")  # which failure explains the others


class Channel:
    """Between a run and those of its members that belong to the present generation.

    Parameters
    ----------
    cluster : DaskCluster
    job : Job

    Attributes
    ----------
    members : tuple of str
        In the order of their ranks.
    held : dict of str to Held
        What members hold of the data.
    step_seconds : float or None
        What the last steps took.
    closed : bool
        Whether the run has ended.
    """

    def __init__(self, cluster: DaskCluster, job: Job) -> None:
        self.cluster = cluster
        self.members: tuple[str, ...] = ()
        self.held: dict[str, Held] = {}
        self.step_seconds: float | None = None
        self.closed = False
        self._job = job
        self._generation = -1
        self._count = itertools.count()
        self._beside: set[LocalFuture[None]] = set()  # what goes on in threads of its own

    def speak_for(self, members: Sequence[str], generation: int) -> None:
        """Speak for a group from now on."""
        self.members, self._generation = tuple(members), generation

    def present(self, members: Sequence[str]) -> list[str]:
        """Those of some members that are there."""
        there = self.cluster.names
        return [member for member in members if member in there]

    def check(self) -> None:
        """Raise if a member is gone."""
        gone = set(self.members) - set(self.cluster.names)
        if gone:
            raise self._lost(gone)

    def patience(self, times: float = 1.0, work_seconds: float = 0.0) -> Limits:
        """How long members may say nothing; longer as long as nobody knows how long a step takes."""
        limit = self._job.limit_seconds
        progress = times * max(limit, _SLOW_STEPS * self.step_seconds) if self.step_seconds else _UNKNOWN * limit
        return Limits(limit, progress, progress + 5 * work_seconds + limit)

    def beside(self, function: Callable[..., None], *args: Any) -> LocalFuture[None]:
        """Do something in a thread of its own, for which the run's end waits."""
        going_on = in_thread(function, *args)
        self._beside.add(going_on)
        going_on.add_done_callback(self._beside.discard)
        return going_on

    def close(self, seconds: float) -> None:
        """Wait for what goes on: a pool may close next, and cut connections off that are being opened."""
        self.closed = True
        wait(tuple(self._beside), seconds)

    # --- out

    def order(self, members: Sequence[str], function: Callable[..., Answer], *args: Any) -> dict[str, Future[Any]]:
        """Give some members an order of the present generation."""
        return self.submit(members, function, lambda _: (self._generation, *args))

    def submit(
        self, members: Sequence[str], function: Callable[..., Answer], args: Callable[[str], tuple[Any, ...]]
    ) -> dict[str, Future[Any]]:
        """A task for each of some members, on it: what it is to do in this run, and with what."""
        return {m: self.submit_to([m], function, self._job.run_id, *args(m)) for m in members}

    def submit_to(self, members: Sequence[str], function: Callable[..., Answer], *args: Any) -> Future[Any]:
        """A task on one of some members; never shared with an equal one."""
        key = f"parakit-{function.__name__}-{self._job.run_id}-{next(self._count)}"
        places = list(map(address_of, members))
        return self.cluster.client.submit(function, *args, key=key, pure=False, workers=places)

    def send(self, value: Any, member: str) -> Any:
        """Place a value on a member, for as long as it gives signs of life."""
        return self.cluster.send(value, member, self._job.limit_seconds, self._job.run_id)

    def spread(self, value: Any, members: Sequence[str]) -> Any:
        """Scatter a value to members, each of which gets a copy."""
        places, limit = list(map(address_of, members)), self._job.limit_seconds
        scattering = in_thread(self.cluster.client.scatter, value, workers=places, broadcast=True, hash=False)
        try:
            return scattering.result(limit)
        except Exception as error:
            raise WorkerLost(
                f"{len(members)} workers did not take a value within {limit:g} s ({type(error).__name__}).",
                cause="a worker that is gone or hangs, or a very slow network",
            ) from error

    # --- in

    def ask(self, members: Sequence[str], function: Callable[..., Answer], *args: Any, limits: Limits) -> list[Any]:
        """Give some members an order of the present generation; what each answered, in their order."""
        return list(self.answers(self.order(members, function, *args), limits).values())

    def answers(self, futures: Mapping[str, Future[Any]], limits: Limits) -> dict[str, Any]:
        """Wait for answers, and return their values; the first failure that explains the others is raised."""
        self.wait(list(futures.values()), list(futures), limits)
        answers = self.fetch(futures)
        failures = {member: answer.failure for member, answer in answers.items() if answer.failure is not None}
        if failures:
            raise self.explain(failures)
        return {member: answer.value for member, answer in answers.items()}

    def answers_of_survivors(self, futures: Mapping[str, Future[Any]], limits: Limits) -> dict[str, Any]:
        """What members answer; those that are gone, hang or fail are left out."""
        outcome = self._outcome(list(futures.values()), list(futures), limits)
        waiting = set(outcome.waiting)
        answers = self.fetch({m: future for m, future in futures.items() if future not in waiting})
        return {m: answer.value for m, answer in answers.items() if answer.failure is None}

    def wait(self, futures: Sequence[Any], members: Sequence[str], limits: Limits | None = None) -> None:
        """Wait until futures are done, as long as those who work on them are there and do not hang."""
        outcome = self._outcome(futures, members, limits or self.patience())
        if outcome.gone:
            raise self._lost(outcome.gone)
        if outcome.blamed:
            raise self._hanging(outcome.blamed)

    def _outcome(self, futures: Sequence[Any], members: Sequence[str], limits: Limits) -> Outcome:
        """What comes of orders; those that nobody will carry out are let go of, and so are workers that hang."""
        outcome = await_while_alive(self.cluster, futures, members, limits, self._job.run_id)
        self.cluster.cancel(outcome.waiting)
        self.cluster.exclude(outcome.blamed)
        return outcome

    def fetch(self, futures: Mapping[str, Future[Any]]) -> dict[str, Answer]:
        """The answers of futures that are done: all in one request, or one by one if any is lost."""
        fetching = in_thread(self.cluster.client.gather, list(futures.values()))
        limit = self._job.limit_seconds
        limits = Limits(limit, whole_seconds=_FETCH_LIMITS * limit, look_seconds=_FETCH_LOOK_SECONDS)
        outcome = await_while_alive(self.cluster, [fetching], list(futures), limits, self._job.run_id)
        if outcome.hung:
            self.cluster.exclude(outcome.hung)
            raise self._hanging(outcome.hung)
        if outcome.late:
            raise WorkerLost(f"{len(futures)} answers could not be fetched within {limits.whole_seconds:g} s.")
        if not outcome.gone and fetching.exception() is None:
            return dict(zip(futures, fetching.result(), strict=True))
        # Who died after answering took the answer along, and Dask waits for somebody to compute it again.
        self.cluster.cancel([futures[member] for member in outcome.gone])
        return {member: answer_of(future, limit) for member, future in futures.items()}

    # --- what went wrong

    def explain(self, failures: Mapping[str, Failure]) -> RunFailed | WorkerLost:
        """The error that a user should see: code that raised explains a lost partner, not the other way round."""
        gone = set(self.members) - set(self.cluster.names)
        member, failure = min(failures.items(), key=lambda item: _TELLING.index(item[1].kind))
        if failure.kind == "diverged":
            return Diverged(failure.text, step=failure.step)
        if failure.kind == "checked":
            return BatchDependent(failure.text)
        if failure.kind == "code":
            return self._failed(member, failure)
        if gone:
            return self._lost(gone)
        return WorkerLost(f"{self.cluster.label(member)} cannot go on: {failure.text}")

    def _failed(self, member: str, failure: Failure) -> RunFailed:
        """What a user should read about an error that came up on a worker."""
        held = self.held.get(member)
        rows = [] if held is None or failure.step < 0 else self._job.rows(failure.step, held[0])
        inline = "'inline'" if self.cluster.device == "cpu" else f"'inline', device='{self.cluster.device}'"
        failed = code_failure(
            f"Step {failure.step} failed on {self.cluster.label(member)}", failure, rows,
            remedy=f"try the same batch in this notebook: pk.train(..., on=pk.connect({inline})) raises it here",
        )  # fmt: skip
        failed.__cause__ = failure.raised()
        return failed

    def _hanging(self, hang: Mapping[str, str]) -> WorkerLost:
        told = "; ".join(f"{self.cluster.label(m)} {seen}" for m, seen in hang.items())
        return WorkerLost(
            f"{len(hang)} of {len(self.members)} workers hang: {told}.",
            cause="a stopped process, code that waits for ever, or a worker that is busy with other tasks",
            remedy="if steps or loading take that long, allow more: train(..., limit_seconds=...)",
        )

    def _lost(self, gone: Collection[str]) -> WorkerLost:
        names = ", ".join(sorted(map(self.cluster.label, gone)))
        return WorkerLost(
            f"{len(gone)} of {len(self.members)} workers died: {names}.",
            cause="the process was killed, ran out of memory, or its machine was taken away",
        )


def answer_of(future: Future[Any], limit_seconds: float) -> Answer:
    """The answer of a future that is done; a task that Dask itself gave up on answers that its worker is lost."""
    try:
        answer: Answer = future.result(timeout=limit_seconds)
    except Exception as error:
        return Answer(failure=Failure("group", -1, type(error).__name__, f"{type(error).__name__}: {error}"))
    return answer
