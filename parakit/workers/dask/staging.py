"""What a run brings to those who are to join it, in threads beside it, and lets go of on those who leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from parakit.data.source import ChunkLoader
from parakit.errors import WorkerLost
from parakit.serialization import dumps
from parakit.system.malloc import return_free_memory
from parakit.system.threads import in_thread
from parakit.workers import remote
from parakit.workers.assignment import GroupAssignment
from parakit.workers.dask.channel import SETTING_UP, Channel, Held
from parakit.workers.dask.store import forget
from parakit.workers.dask.worker_ids import address_of, host_of, is_here
from parakit.workers.session import Job

__all__ = ["Brought", "Staging", "chunks_of"]

#: The chunks placed on each member, for training and for validation.
Brought = dict[str, tuple[Any, Any]]

_DISMISS_SECONDS = 5.0  # how long a member may take to let go of a run


class Staging:
    """What a run brings to its members.

    Parameters
    ----------
    channel : Channel
    job : Job
    threads : int
        That torch is to use in each of them.
    """

    def __init__(self, channel: Channel, job: Job, threads: int) -> None:
        self._channel = channel
        self._job = job
        self._threads = threads
        self._blob = dumps(job.recipe)
        self._brought: dict[int, Brought] = {}
        self._touched: set[str] = set()  # workers that hold something of this run

    def bring(self, assignment: GroupAssignment) -> None:
        """Bring recipe and chunks to those who need them."""
        channel = self._channel
        newcomers = [member for member in assignment.members if member not in channel.held]
        try:
            channel.cluster.make_ready(assignment.members)
            self._bring_recipe(newcomers)
            self._brought[assignment.generation] = self.bring_chunks(assignment)
            return_free_memory()  # of what was copied on its way
        finally:
            self._touched.update(newcomers)
            if channel.closed:  # the run ended meanwhile, so nobody else will tell them
                self._brought.clear()
                self.dismiss(newcomers)

    def _bring_recipe(self, newcomers: Sequence[str]) -> None:
        """Let newcomers make their copies of what is trained; those on this machine map the memory that it lies in."""
        memory = self._job.recipe.frozen.memory
        assert memory is not None
        near = [member for member in newcomers if memory.key is not None and is_here(host_of(member))]
        out_of_reach = self._prepare_with(near, lambda _: memory.key)
        far = [member for member in newcomers if member not in near or member in out_of_reach]
        if self._prepare_with(far, lambda member: self._channel.send(memory.array(), member)):
            raise WorkerLost(f"{len(far)} workers did not take the model.")

    def _prepare_with(self, members: Sequence[str], memory: Callable[[str], Any]) -> list[str]:
        """The same, by one way; those that cannot reach the memory."""
        channel = self._channel

        def order(member: str) -> tuple[Any, ...]:
            return channel.send(self._blob, member), memory(member), self._threads, channel.cluster.device

        futures = channel.submit(members, remote.stage, order)
        channel.wait(list(futures.values()), members, channel.patience(SETTING_UP))
        failures = {m: f for m, answer in channel.fetch(futures).items() if (f := answer.failure) is not None}
        others = {member: failure for member, failure in failures.items() if failure.kind != "unreachable"}
        if others:
            raise channel.explain(others)
        return list(failures)

    def bring_chunks(self, assignment: GroupAssignment) -> Brought:
        """Place the chunks that each member gains; Dask's copy is let go of once the member has taken them."""
        wanted = chunks_of(assignment)
        placed = {}
        for member in assignment.members:
            training, validation = (
                tuple(chunk for chunk in chunks if chunk not in held)
                for chunks, held in zip(wanted[member], self._channel.held.get(member, ((), ())), strict=True)
            )
            placed[member] = (
                self.place(member, training, self._job.load),
                self.place(member, validation, self._job.load_validation),
            )
        return placed

    def place(self, member: str, chunks: Sequence[int], load: ChunkLoader) -> Any:
        """Send chunks to a member."""
        if not chunks:
            return {}
        if self._channel.closed:
            raise WorkerLost("The run ended while its chunks were under way.")
        return self._channel.send({chunk: load.pack(chunk) for chunk in chunks}, member)

    def take(self, generation: int) -> Brought:
        """What was brought for a generation; from now on it is its members'."""
        return self._brought.pop(generation)

    def forget(self) -> None:
        """Let go of what was brought for changes that do not come."""
        self._brought.clear()

    def dismiss_others(self, members: Sequence[str]) -> None:
        """Let those go that hold something of this run and are none of its members."""
        self.dismiss([member for member in self._touched if member not in members])

    def dismiss(self, members: Sequence[str]) -> None:
        """Let workers forget the run."""
        channel = self._channel
        # One that died may have been handed what another took up that is at its address now.
        staying = {address_of(m) for m in channel.members if m not in members and not channel.closed}
        present = set(map(address_of, members)).intersection(map(address_of, channel.cluster.names)) - staying
        self._touched.difference_update(members)
        if present:
            forgetting = in_thread(channel.cluster.client.run, forget, self._job.run_id, workers=list(present))
            with suppress(Exception):  # whoever is gone, or does not answer, has nothing to give back
                forgetting.result(_DISMISS_SECONDS)

    def release(self) -> None:
        """Let go of everything; nothing is brought any more."""
        self.forget()
        self._channel.close(_DISMISS_SECONDS)
        self.dismiss(list(self._touched))


def chunks_of(assignment: GroupAssignment) -> dict[str, Held]:
    """The chunks of each member, for training and for validation."""
    validation = assignment.validation.chunks_of if assignment.validation else {}
    return {member: (chunks, validation.get(member, ())) for member, chunks in assignment.training.chunks_of.items()}
