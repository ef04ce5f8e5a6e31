"""Who owns which chunks, and which of them move when the owners change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from parakit.data.chunks import (
    _WORTH_MOVING,
)
from parakit.errors import WorkerCountError

__all__ = ["ChunkAssignment"]


@dataclass(frozen=True)
class ChunkAssignment:
    """Which worker holds which chunks.

    Parameters
    ----------
    sizes : tuple of int
        Rows in each chunk.
    chunks_of : mapping of str to tuple of int
        The chunks of each worker, ascending; every chunk has exactly one owner.
    """

    sizes: tuple[int, ...]
    chunks_of: Mapping[str, tuple[int, ...]]

    @classmethod
    def share_out(cls, sizes: Sequence[int], workers: Iterable[str]) -> ChunkAssignment:
        """Share the chunks out among workers that hold none yet."""
        return cls(tuple(sizes), {}).reshard(workers)

    @property
    def workers(self) -> tuple[str, ...]:
        """The owners, in the order of their ranks."""
        return tuple(self.chunks_of)

    def reshard(self, workers: Iterable[str]) -> ChunkAssignment:
        """The ownership for another set of workers, moving only the chunks that must move.

        Chunks of workers that left go to whoever holds least; then chunks move from the fullest to the emptiest as
        long as the gap between them is worth a move.

        Parameters
        ----------
        workers : iterable of str
            The new workers, in the order of their ranks.

        Returns
        -------
        ChunkAssignment

        Raises
        ------
        WorkerCountError
            With no workers, a repeated one, or more workers than chunks.
        """
        names = tuple(workers)
        if not 1 <= len(names) <= len(self.sizes) or len(set(names)) != len(names):
            raise WorkerCountError(
                f"{len(names)} workers cannot share {len(self.sizes)} chunks.",
                cause="each worker needs a name of its own and at least one chunk",
                remedy=f"ask for 1 to {len(self.sizes)} workers, or cut more chunks",
            )
        held = {name: list(self.chunks_of.get(name, ())) for name in names}
        kept = {chunk for chunks in held.values() for chunk in chunks}
        orphans = [chunk for chunk in range(len(self.sizes)) if chunk not in kept]
        for chunk in sorted(orphans, key=lambda c: -self.sizes[c]):
            min(held.values(), key=self._load).append(chunk)
        while move := self._worthwhile_move(held):
            chunk, giver, taker = move
            giver.remove(chunk)
            taker.append(chunk)
        return ChunkAssignment(self.sizes, {name: tuple(sorted(chunks)) for name, chunks in held.items()})

    def gains(self, after: ChunkAssignment) -> dict[str, tuple[int, ...]]:
        """The chunks each worker of `after` must load, compared with this ownership."""
        return {
            name: tuple(c for c in chunks if c not in set(self.chunks_of.get(name, ())))
            for name, chunks in after.chunks_of.items()
        }

    def _load(self, chunks: Iterable[int]) -> int:
        return sum(self.sizes[chunk] for chunk in chunks)

    def _worthwhile_move(self, held: Mapping[str, list[int]]) -> tuple[int, list[int], list[int]] | None:
        by_load = sorted(held.values(), key=self._load)
        taker = by_load[0]
        for giver in reversed(by_load[1:]):
            gap = self._load(giver) - self._load(taker)
            movable = [c for c in giver if gap >= _WORTH_MOVING * self.sizes[c]]
            if movable and len(giver) > 1:
                return max(movable, key=lambda c: (self.sizes[c], c)), giver, taker
        return None
