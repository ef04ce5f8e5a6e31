"""A codec is one small class: gradients in half as many bytes, with nothing else told of it than the strategy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parakit as pk
from parakit.collectives.base import ExchangeMethod, ProcessGroup
from parakit.collectives.compressed import Codec, CompressedGroup
from parakit.collectives.form import form_group
from parakit.costs.model import CostModel
from parakit.events.records import Resized
from tests.members import FolderStore, Member, ask
from tests.runs.test_exact import assert_same, expected, problem, trained

NUMEL, TAIL, SIZE, LIMIT_SECONDS = 10_000, 3, 2, 20.0  # two numbers have one sum, whoever begins
ROUNDING = 2**-8  # of a number in bfloat16, relative


class Brief:
    """Numbers with 8 digits, binary ones, in place of 24."""

    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16)

    def decode(self, encoded: Tensor, values: Tensor) -> None:
        values.copy_(encoded)

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        return numel * min(2, dtype.itemsize)


class AsTheyAre:
    """Numbers as they are."""

    def encode(self, values: Tensor) -> Tensor:
        return values.clone()

    def decode(self, encoded: Tensor, values: Tensor) -> None:
        values.copy_(encoded)

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        return numel * dtype.itemsize


class Through:
    """All-reduce through a codec."""

    runs_on = "workers"

    def __init__(self, codec: Codec, exchange: str = "auto") -> None:
        self.codec, self.exchange, self.shard = codec, exchange, True

    def __repr__(self) -> str:
        return f"Through({type(self.codec).__name__}, {self.exchange!r})"

    def step(self, team: Any, step: int) -> None:
        team.update(lambda: team.sum_for_update(team.gradient(step)))


class Scales(ProcessGroup):
    """A group that notes how many bytes it was given to add."""

    def __init__(self, group: ProcessGroup) -> None:
        self.size, self.method, self.nbytes = group.size, group.method, 0
        self._group = group

    def all_reduce(self, vector: Tensor) -> None:
        self.nbytes += vector.nbytes
        self._group.all_reduce(vector)

    def close(self) -> None:
        self._group.close()


def gradient_of(rank: int) -> Tensor:
    """A gradient, and behind it numbers that no short float can hold."""
    generator = torch.Generator().manual_seed(rank)
    return torch.cat([torch.randn(NUMEL, generator=generator), torch.tensor([1001.0 + rank, 0.1, 1.0])])


def add(kept: dict[str, Any], rank: int, folder: str, exchange: Any, codec: Codec | None) -> tuple[list[float], int]:
    """Add gradients, and what must stay as it is; the sum, and the bytes that travelled for it."""
    group, _ = form_group(
        FolderStore(folder), rank, ("127.0.0.1",) * SIZE, LIMIT_SECONDS, exchange=exchange, numel=NUMEL + TAIL,
        dtype=torch.float32, common=0,
    )  # fmt: skip
    scales = Scales(group)
    compressed = scales if codec is None else CompressedGroup(scales, codec)
    vector, buffers = gradient_of(rank), [torch.full((5,), 1.0 + rank / 3)]
    compressed.all_reduce_gradient(vector, TAIL)
    sent = scales.nbytes
    compressed.average(buffers)
    assert torch.allclose(buffers[0], torch.full((5,), 1.0 + (SIZE - 1) / 6), rtol=1e-6)
    compressed.close()
    return vector.tolist(), sent


@pytest.mark.processes
@pytest.mark.parametrize("exchange", ["shared memory", "gloo"])
def test_half_the_bytes_give_the_sum_to_their_rounding(
    team: list[Member], boards: Callable[[], str], exchange: str
) -> None:
    plain, brief, same = (
        [answer.good for answer in ask(team[:SIZE], add, boards(), exchange, codec)]
        for codec in (None, Brief(), AsTheyAre())
    )
    behind = 4 * TAIL
    assert plain[0][1] == 4 * NUMEL + behind
    assert brief[0][1] == Brief().nbytes(NUMEL, torch.float32) + behind == 2 * NUMEL + behind
    assert [found for found, _ in same] == [found for found, _ in plain]
    assert all(found == brief[0][0] for found, _ in brief)
    wanted, found = torch.tensor(plain[0][0]), torch.tensor(brief[0][0])
    sizes = torch.stack([gradient_of(rank) for rank in range(SIZE)]).abs().sum(0)
    assert torch.all((found - wanted).abs() <= SIZE * ROUNDING * sizes)
    assert not torch.equal(found[:NUMEL], wanted[:NUMEL])
    assert torch.equal(found[NUMEL:], wanted[NUMEL:])


@pytest.mark.dask
@pytest.mark.parametrize("exchange", ["auto", "gloo"])
def test_workers_train_through_a_codec_that_their_strategy_has(pool: pk.Workers, exchange: str) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    losses, final = expected(model, inputs, targets, **how)
    same, brief = (
        trained(model, (inputs, targets), pool, workers=3, strategy=Through(codec, exchange), **how)
        for codec in (AsTheyAre(), Brief())
    )
    assert_same(same, losses, final)
    assert_same(brief, losses, final, tolerance=0.02)
    for ours, theirs in zip(brief.model.parameters(), final.parameters(), strict=True):
        assert not torch.equal(ours, theirs)  # they did travel in another form
    formed = brief.history.latest(Resized)
    assert formed is not None
    way = "shared memory" if exchange == "auto" else "gloo"
    assert ExchangeMethod(formed.exchange, formed.divided_update) == ExchangeMethod(way, divided=False)


def test_a_simulation_prices_the_bytes_that_travel() -> None:
    costs = CostModel(sample_seconds=1e-3, batch_size=24, nbytes=4e6, network="1GbE")
    model, inputs, targets = problem()
    run = trained(
        model, (inputs, targets), pk.simulated(4, like=costs, arithmetic=False), strategy=Through(Brief())
    )  # fmt: skip
    taken = [part.exchange_seconds for step in run.history.steps for part in step.workers]
    assert taken == pytest.approx([costs.exchange_seconds(4, 2e6)] * len(taken))
