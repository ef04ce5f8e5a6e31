"""Chunks in the hands of one worker, and which of their rows belong to a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from parakit.data.chunks import EpochOrder
from parakit.data.samples import Samples
from parakit.data.source import Unread
from parakit.errors import ParakitError
from parakit.system.devices import CPU

__all__ = ["LocalChunks"]


class LocalChunks:
    """The chunks that one worker holds, laid end to end in one piece of memory.

    Parameters
    ----------
    order : EpochOrder, optional
        Needed to ask for the share of a step.
    device : torch.device
        In whose memory they are.
    """

    def __init__(self, order: EpochOrder | None = None, device: torch.device = CPU) -> None:
        self._order = order
        self._device = device
        self._chunks: dict[int, Samples] = {}
        self._all: Samples | None = None
        self._epoch = -1
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._ends: list[int] = []

    def another(self) -> LocalChunks:
        """Of the same order and device, without chunks as yet."""
        return LocalChunks(self._order, self._device)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of the chunks held, ascending."""
        return tuple(self._chunks)

    @property
    def samples(self) -> Samples | None:
        """All rows held, or None."""
        return self._all

    @property
    def each(self) -> Mapping[int, Samples]:
        """The rows of each chunk."""
        return self._chunks

    def change(self, keep: Iterable[int], adopt: Mapping[int, Samples]) -> None:
        """Let go of all chunks but some, and take in others."""
        chosen = {n: self._chunks[n] for n in keep} | {n: samples.on(self._device) for n, samples in adopt.items()}
        numbers = sorted(chosen)
        if tuple(numbers) == self.chunks and not adopt:
            return
        self._all = Samples.join([chosen[n] for n in numbers]) if numbers else None
        ends = np.cumsum([0] + [len(chosen[n]) for n in numbers])
        # The pieces are views from here on, so a chunk is held once.
        self._chunks = {
            n: self._all.slice(int(first), int(end))
            for n, first, end in zip(numbers, ends[:-1], ends[1:], strict=True)
            if self._all is not None
        }
        self._epoch = -1

    def take_over(self, wanted: tuple[int, ...], brought: Mapping[int, Samples | Unread]) -> None:
        """Hold the chunks that are wanted, some of which were brought, packed or to be read here.

        Raises
        ------
        ParakitError
            If one of them is neither here nor brought.
        """
        adopted = {chunk: samples.unpack() for chunk, samples in brought.items() if chunk in wanted}
        self.change([c for c in wanted if c in self.chunks and c not in adopted], adopted)
        if self.chunks != tuple(sorted(wanted)):
            raise ParakitError(f"This worker holds the chunks {self.chunks} where {wanted} are wanted.")

    def share(self, step: int) -> Samples | None:
        """The rows of a step's global batch that are held here, or None if there are none."""
        assert self._order is not None
        epoch, batch = divmod(step, self._order.steps_per_epoch)
        if epoch != self._epoch:
            rows, ends = self._order.epoch_rows(epoch, self.chunks)
            self._epoch, self._rows, self._ends = epoch, torch.from_numpy(rows).to(self._device), ends.tolist()
        first, end = self._ends[batch : batch + 2]
        return self._all.take(self._rows[first:end]) if self._all is not None and end > first else None

    def places(self, step: int) -> Tensor:
        """Where the rows of `share` are in the global batch, which goes chunk by chunk; int64, on the CPU."""
        assert self._order is not None
        batch = step % self._order.steps_per_epoch
        taken = np.diff(self._order.boundaries[batch : batch + 2], axis=0)[0]
        firsts = np.cumsum(taken) - taken
        mine = [np.arange(firsts[chunk], firsts[chunk] + taken[chunk]) for chunk in self.chunks]
        return torch.from_numpy(np.concatenate(mine) if mine else np.zeros(0, np.int64))

    @property
    def spare(self) -> Samples | None:
        """One row, for whoever has none in a step."""
        return None if self._all is None else self._all.slice(0, 1)
