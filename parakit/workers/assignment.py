"""Who is in the group and holds which chunks, before and after a change or a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parakit.data.ownership import ChunkAssignment

__all__ = ["GroupAssignment", "Survivors"]


@dataclass(frozen=True)
class Survivors:
    """Who is left of a group after a loss, and what they hold.

    Parameters
    ----------
    training, validation : mapping of str to tuple of int
        The chunks of each member that is left. Where a change was under way, two may hold the same one.
    intact : tuple of str
        The members that have the state to go on from.
    """

    training: Mapping[str, tuple[int, ...]]
    validation: Mapping[str, tuple[int, ...]]
    intact: tuple[str, ...]


@dataclass(frozen=True)
class GroupAssignment:
    """Who is active, and holds which chunks.

    Parameters
    ----------
    generation : int
        Counts assignments of a run; an order of an older one is refused.
    training : ChunkAssignment
        Its workers, in this order, are the ranks.
    validation : ChunkAssignment or None
        Held by the same workers, or by the first of them.
    """

    generation: int
    training: ChunkAssignment
    validation: ChunkAssignment | None

    @property
    def members(self) -> tuple[str, ...]:
        """The active workers, in the order of their ranks."""
        return self.training.workers

    def rebalance(self, members: Iterable[str], generation: int | None = None) -> GroupAssignment:
        """The next generation, or a later one, moving only the chunks that must move."""
        training = self.training.reshard(members)
        validation = self.validation
        if validation is not None:
            validation = validation.reshard(training.workers[: len(validation.sizes)])
        return GroupAssignment(self.generation + 1 if generation is None else generation, training, validation)

    def rebalance_after_loss(self, members: Iterable[str], remnant: Survivors, generation: int) -> GroupAssignment:
        """A generation after a loss, which goes by what the members that are left really hold."""
        training = ChunkAssignment(self.training.sizes, _one_owner_each(remnant.training))
        validation = self.validation
        if validation is not None:
            validation = ChunkAssignment(validation.sizes, _one_owner_each(remnant.validation))
        return GroupAssignment(self.generation, training, validation).rebalance(members, generation)


def _one_owner_each(held: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What each holds, without what somebody before it holds too."""
    seen: set[int] = set()
    owned = {}
    for member, chunks in held.items():
        owned[member] = tuple(chunk for chunk in chunks if chunk not in seen)
        seen.update(chunks)
    return owned
