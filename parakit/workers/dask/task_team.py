"""The team of a strategy that runs beside the notebook: its parts are tasks on Dask workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from distributed import Future

from parakit.checkpoints.state import State
from parakit.engines.account import EXCHANGE, UPDATE, StepRecord
from parakit.engines.make import make_engine
from parakit.errors import RunError
from parakit.failures.run_failed import code_failure
from parakit.gradients.gradient_sum import GradientSum
from parakit.trees import pack
from parakit.workers import remote
from parakit.workers.commands import Answer, Failure
from parakit.workers.dask.channel import Channel, answer_of
from parakit.workers.session import Job, Report

__all__ = ["TaskTeam", "squared_norm"]


class TaskTeam:
    """The team that a strategy's text sees when it runs beside the notebook: parts are tasks on Dask workers."""

    def __init__(self, channel: Channel, job: Job) -> None:
        self._channel = channel
        self._job = job
        with job.recipe.settings.in_force():
            self.replica = make_engine(job.recipe)
        self.replica.own_memory()
        self.halted = 0
        self._measuring = False
        self._norms: list[Future[Any]] = []  # of the members' mean gradients in the first step of a segment

    def segment(self, first: int, count: int, request: int) -> Report:
        """Run the strategy's text for some steps."""
        committed = self.replica.commit()
        self._measuring, self._norms = len(self._channel.members) > 1, []
        if self._measuring:
            self.replica.measure_norms()
        for step in range(first, first + count):
            self._make(step)
            if self.halted > request:
                break
        self.replica.finish_segment(alone=True)
        return Report(self._collect(), committed)

    def _make(self, step: int) -> None:
        """One step; an error that comes up here, in the optimizer or its schedule, is told with the step."""
        try:
            self._job.strategy.step(self, step)
        except RunError:
            raise
        except Exception as error:
            raise code_failure(
                f"Step {step} failed in the notebook's process", Failure.of("code", step, error),
                self._job.rows(step),
                remedy="run.model holds the last state that was kept; parakit.train(..., resume=run) goes on from it",
            ) from error  # fmt: skip

    def map_gradients(self, step: int) -> list[Future[Any]]:
        """One task a member, over the chunks it holds, at the present parameters."""
        channel = self._channel
        flat = self.replica.flat_parameters().numpy()
        parameters = channel.spread(flat, channel.members)
        parts = [
            channel.order([member], remote.map_gradient, step, rank, parameters)[member]
            for rank, member in enumerate(channel.members)
        ]
        if self._measuring:
            self._measuring = False
            # Where the parts are: they need not travel for it, and nobody waits before the segment's end.
            self._norms = [
                channel.submit_to([member], squared_norm, part)
                for member, part in zip(channel.members, parts, strict=True)
            ]
        return parts

    def add(self, parts: Sequence[Future[Any]]) -> Future[Any]:
        """A task that adds some parts."""
        return self._channel.submit_to(self._channel.members, remote.add, *parts)

    def update(self, summed: Callable[[], Future[Any]]) -> None:
        """One step of the driver's optimizer."""
        self.replica.update(lambda: self._gathered(summed))

    def _gathered(self, summed: Callable[[], Future[Any]]) -> GradientSum:
        """The sum that the members' tasks come to; the wait for it is no part of the update."""
        began = perf_counter()
        total = self._fetch(summed())
        self.replica.account.seconds[EXCHANGE] += perf_counter() - began
        return total

    def _fetch(self, root: Future[Any]) -> GradientSum:
        channel = self._channel
        channel.wait([root], channel.members)
        answer = answer_of(root, self._job.limit_seconds)
        if answer.failure is not None:
            raise channel.explain({channel.members[max(0, answer.failure.rank)]: answer.failure})
        total: GradientSum = answer.value
        return total

    def gradient(self, step: int) -> Any:
        """Not for a text that runs beside the notebook."""
        raise NotImplementedError("gradient is a verb of strategies that run on the workers")

    def all_reduce(self, part: Any) -> Any:
        """Not for a text that runs beside the notebook."""
        raise NotImplementedError("all_reduce is a verb of strategies that run on the workers")

    def sum_for_update(self, part: Any) -> Any:
        """Not for a text that runs here."""
        raise NotImplementedError("sum_for_update is a verb of strategies that run on the workers")

    def values(self) -> State:
        """The present parameters and buffers, as arrays."""
        return dict(pack(self.replica.values()))

    def _collect(self) -> tuple[list[StepRecord], ...]:
        """Every member's accounts, completed by what the driver knows; averages the running statistics."""
        channel = self._channel
        alone = len(channel.members) == 1
        collected = channel.ask(channel.members, remote.collect, alone, limits=channel.patience())
        self.replica.adopt(collected)
        together = self.replica.account.take_records()
        norms = [answer_of(norm, self._job.limit_seconds).value for norm in self._norms] or [None] * len(collected)
        return tuple(
            [_completed(record, one.records, norm) for record in together]
            for one, norm in zip(collected, norms, strict=True)
        )


def squared_norm(part: Answer) -> Answer:
    """The squared 2-norm of a part's mean gradient; a task on the worker that has the part."""
    return part if part.failure is not None else Answer(part.value.mean_squared_norm)


def _completed(step: StepRecord, parts: Sequence[StepRecord], norm: float | None) -> StepRecord:
    """A member's account of a step: what it computed is its own; the wall time left is exchange and waiting."""
    mine = [part for part in parts if part.step == step.step]
    seconds = [sum(column) for column in zip(*(part.seconds for part in mine), strict=True)]
    computing = sum(seconds)
    seconds[UPDATE] = step.seconds[UPDATE]
    seconds[EXCHANGE] = max(0.0, step.wall_seconds - computing - step.seconds[UPDATE])
    norms = None if norm is None or step.norms is None else (norm, step.norms[1])
    return StepRecord(step.step, step.loss, step.learning_rate, seconds, step.wall_seconds, mine[-1].samples, norms)
