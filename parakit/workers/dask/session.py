"""A run's session on Dask workers: how its group is formed, ordered to train, and asked for its state."""

from __future__ import annotations

from concurrent.futures import Future as LocalFuture
from typing import Any

from parakit.checkpoints.in_shared_memory import SnapshotsReader
from parakit.checkpoints.state import State
from parakit.collectives.base import ExchangeMethod
from parakit.engines.evaluation import Tally
from parakit.trees import pack
from parakit.workers import remote
from parakit.workers.assignment import GroupAssignment, Survivors
from parakit.workers.commands import Formed, Orders
from parakit.workers.dask.channel import SETTING_UP, Channel
from parakit.workers.dask.cluster import DaskCluster
from parakit.workers.dask.segments import MemberSegments, Segments, TaskSegments
from parakit.workers.dask.staging import Staging, chunks_of
from parakit.workers.dask.store import WorkerStore
from parakit.workers.dask.worker_ids import address_of, host_of, is_here
from parakit.workers.session import Job, Report

__all__ = ["DaskSession"]


class DaskSession:
    """A run's hold on Dask workers.

    Parameters
    ----------
    cluster : DaskCluster
    job : Job
    threads : int
        That torch is to use in each worker.
    """

    def __init__(self, cluster: DaskCluster, job: Job, threads: int) -> None:
        self._cluster = cluster
        self._job = job
        self._channel = Channel(cluster, job)
        self._staging = Staging(self._channel, job, threads)
        kind = MemberSegments if job.strategy.runs_on == "workers" else TaskSegments
        self._segments: Segments = kind(self._channel, job)
        self.orders_ahead = self._segments.on_members

    # --- membership

    def stage(self, assignment: GroupAssignment) -> LocalFuture[None]:
        """Bring chunks and recipe to those who need them, while the run goes on."""
        return self._channel.beside(self._staging.bring, assignment)

    def form(self, assignment: GroupAssignment, state: State | None) -> ExchangeMethod:
        """Make a staged assignment the active one."""
        channel, members = self._channel, assignment.members
        brought = self._staging.take(assignment.generation)
        staying = self._segments.staying(members)
        given = None if state is None else channel.spread(pack(state), members)
        joining = given
        if state is None and len(staying) < len(members):
            joining = self._segments.start_for([m for m in members if m not in staying], staying)
        store = WorkerStore(address_of(members[0]), self._job.run_id, assignment.generation)

        def order(member: str) -> tuple[Any, ...]:
            start = given if member in staying else joining
            return self._orders(assignment, member), *brought[member], start, store

        channel.speak_for(members, assignment.generation)
        answers = channel.answers(channel.submit(members, remote.form, order), channel.patience(SETTING_UP))
        first: Formed = answers[members[0]]
        self._segments.begin(state, first.snapshots)
        channel.held = chunks_of(assignment)
        self._staging.dismiss_others(members)
        return first.method

    def _orders(self, assignment: GroupAssignment, member: str) -> Orders:
        training, validation = chunks_of(assignment)[member]
        hosts, rank = tuple(map(host_of, assignment.members)), assignment.members.index(member)
        # Whoever hangs is found by its heartbeat, and killed where that is possible; otherwise this limit frees the
        # others.
        limit = self._channel.patience().progress_seconds
        group = self._segments.on_members
        return Orders(
            assignment.generation, rank, hosts, limit,
            training, validation, group, group and rank == 0 and is_here(hosts[rank]),
        )  # fmt: skip

    def regroup(self, generation: int, step: int) -> Survivors:
        """After a loss: who is left, each of them back at a step and deaf to older orders."""
        channel = self._channel
        self._staging.forget()
        self._segments.abandon()
        # Those of a change that was under way as well: they may have become members already.
        reachable = channel.present([*dict.fromkeys([*channel.members, *channel.held])])
        orders = channel.submit(reachable, remote.fall_back, lambda _: (generation, step))
        standings = channel.answers_of_survivors(orders, channel.patience(SETTING_UP))
        channel.speak_for(tuple(standings), generation)
        channel.held = {m: (standing.training, standing.validation) for m, standing in standings.items()}
        intact = self._segments.fall_back(step, standings)
        training, validation = ({m: held[part] for m, held in channel.held.items()} for part in (0, 1))
        return Survivors(training, validation, intact)

    def check(self) -> None:
        """Raise if a member is gone."""
        self._channel.check()

    def label(self, worker: str) -> str:
        """A short name for people."""
        return self._cluster.label(worker)

    def release(self) -> None:
        """Let go of everything on the pool."""
        self._segments.snapshots = None
        self._staging.release()

    # --- segments

    def order(self, first: int, count: int, request: int, expected_seconds: float) -> None:
        """Order a segment."""
        self._segments.order(first, count, request, expected_seconds)

    def report(self) -> Report:
        """Wait for the end of a segment; if a user's code fails in it, all members are back where it began."""
        report = self._segments.report()
        if report.steps:
            self._channel.step_seconds = max(record.wall_seconds for records in report.records for record in records)
        return report

    def halt(self, request: int) -> None:
        """Let the segment that is going on end after its present step."""
        self._segments.halt(request)

    def set_learning_rate(self, value: float) -> None:
        """Let whoever updates go on at another learning rate."""
        self._segments.set_learning_rate(value)

    def evaluate(self) -> Tally:
        """Evaluate the present model on the validation chunks."""
        return self._segments.evaluate()

    # --- state

    def state(self, step: int) -> State:
        """The state of a step to which the last report came."""
        return self._segments.state(step)

    @property
    def snapshots(self) -> SnapshotsReader | None:
        """The commits of rank 0, in memory that it shares with this process, if it does."""
        return self._segments.snapshots

    def settle(self) -> None:
        """Let rank 0 keep the present state in its snapshots, if that can be reached."""
        self._segments.settle()

    def read_surviving_snapshot(self, step: int) -> State | None:
        """The newest commit of at most a step in the memory that rank 0 shares with this process, if it does."""
        return None if self.snapshots is None else self.snapshots.newest(step)
