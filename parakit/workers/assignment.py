"""Who is in the group and holds which chunks, before and after a change or a loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parakit.data.ownership import Ownership

__all__ = ["Remnant", "Roster"]


@dataclass(frozen=True)
class Remnant:
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
class Roster:
    """Who is active, and holds which chunks.

    Parameters
    ----------
    generation : int
        Counts rosters of a run; an order of an older one is refused.
    training : Ownership
        Its workers, in this order, are the ranks.
    validation : Ownership or None
        Held by the same workers, or by the first of them.
    """

    generation: int
    training: Ownership
    validation: Ownership | None

    @property
    def members(self) -> tuple[str, ...]:
        """The active workers, in the order of their ranks."""
        return self.training.workers

    def succeed(self, members: Iterable[str], generation: int | None = None) -> Roster:
        """The next generation, or a later one, moving only the chunks that must move."""
        training = self.training.reshard(members)
        validation = self.validation
        if validation is not None:
            validation = validation.reshard(training.workers[: len(validation.sizes)])
        return Roster(self.generation + 1 if generation is None else generation, training, validation)

    def rally(self, members: Iterable[str], remnant: Remnant, generation: int) -> Roster:
        """A generation after a loss, which goes by what the members that are left really hold."""
        training = Ownership(self.training.sizes, _one_owner_each(remnant.training))
        validation = self.validation
        if validation is not None:
            validation = Ownership(validation.sizes, _one_owner_each(remnant.validation))
        return Roster(self.generation, training, validation).succeed(members, generation)


def _one_owner_each(held: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What each holds, without what somebody before it holds too."""
    seen: set[int] = set()
    owned = {}
    for member, chunks in held.items():
        owned[member] = tuple(chunk for chunk in chunks if chunk not in seen)
        seen.update(chunks)
    return owned
