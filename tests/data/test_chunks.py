"""Chunks, shown symbolically: rows are sample ids, and sets of ids are what a step computes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parakit.data.chunks import EpochOrder, chunk_count, cut
from parakit.data.ownership import ChunkAssignment
from parakit.errors import DataError, WorkerCountError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=24)


@given(samples=st.integers(1, 500), chunks=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_cut_holds_every_row_exactly_once_in_even_pieces(samples: int, chunks: int, seed: int) -> None:
    chunks = min(chunks, samples)
    pieces = cut(samples, chunks, seed)
    assert sorted(np.concatenate(pieces)) == list(range(samples))
    sizes = [len(piece) for piece in pieces]
    assert len(sizes) == chunks
    assert max(sizes) - min(sizes) <= 1


def test_cut_shuffles_by_seed_alone() -> None:
    first, again, other = (np.concatenate(cut(100, 7, seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.arange(100))


def test_chunk_count_never_exceeds_samples_or_batch() -> None:
    assert chunk_count(1437, 256) == 64
    assert chunk_count(1437, 10) == 10
    assert chunk_count(5, 5) == 5
    assert chunk_count(1437, 256, wanted=8) == 8


def naive_order(sizes: list[int]) -> list[int]:
    """The chunk that each place of an epoch comes from, by sorting all rows by the moment they are due."""
    rows = [((2 * i + 1) / (2 * size), c) for c, size in enumerate(sizes) for i in range(size)]
    return [c for _, c in sorted(rows)]


@given(sizes=SIZES, batch=st.integers(1, 60))
def test_boundaries_equal_a_naive_sort(sizes: list[int], batch: int) -> None:
    order = EpochOrder(tuple(sizes), batch, 0)
    places = naive_order(sizes)
    for step in range(order.steps_per_epoch + 1):
        taken = Counter(places[: step * batch])
        assert [taken[c] for c in range(len(sizes))] == order.boundaries[step].tolist()


@given(sizes=SIZES, batch=st.integers(1, 60), seed=st.integers(0, 999))
def test_every_batch_takes_its_share_of_every_chunk(sizes: list[int], batch: int, seed: int) -> None:
    order = EpochOrder(tuple(sizes), batch, seed)
    due = np.minimum(np.arange(order.steps_per_epoch + 1) * batch, order.samples) / order.samples
    ahead = order.boundaries - due[:, None] * np.asarray(sizes)
    # Webster's apportionment stays near the exact share; within one row when chunks are of a size.
    assert np.abs(ahead).max() <= (1 if max(sizes) == min(sizes) else 1 + len(sizes) / 2)


@given(
    samples=st.integers(1, 300),
    chunks=st.integers(1, 20),
    batch=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
)
def test_each_sample_exactly_once_per_epoch_for_any_course_of_resizes(
    samples: int, chunks: int, batch: int, seed: int, sizes: list[int]
) -> None:
    chunks = min(chunks, samples)
    pieces = cut(samples, chunks, seed)
    order = EpochOrder(tuple(len(piece) for piece in pieces), batch, seed)
    owners = ChunkAssignment.share_out(order.sizes, ["w0"])
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for place in range(order.steps_per_epoch):
            step = epoch * order.steps_per_epoch + place
            workers = min(sizes[step % len(sizes)], chunks)
            owners = owners.reshard(f"w{(step + n) % 11}" for n in range(workers))
            shares = [
                frozenset(int(i) for c in mine for i in pieces[c][order.rows(step, c)])
                for mine in owners.chunks_of.values()
            ]
            batch_ids = frozenset().union(*shares)
            assert sum(map(len, shares)) == len(batch_ids) == order.batch_rows(step)  # nobody shares a sample
            one_worker = {int(i) for c in range(chunks) for i in pieces[c][order.rows(step, c)]}
            assert batch_ids == one_worker  # the batch does not depend on who holds what
            seen.update(batch_ids)
        assert seen == Counter(range(samples))


@given(sizes=SIZES, batch=st.integers(1, 60), seed=st.integers(0, 999), data=st.data())
def test_epoch_rows_lay_a_holders_rows_out_batch_by_batch(
    sizes: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    held = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    check_epoch_rows(EpochOrder(tuple(sizes), batch, seed), held)


@pytest.mark.parametrize("held", [[0, 1, 2, 3, 4], [1, 4], [3]])
@pytest.mark.parametrize("sizes", [(1500, 7, 40_000, 30_000, 900), (1000, 7, 1024, 1, 900)])
def test_large_chunks_are_laid_out_alike(sizes: tuple[int, ...], held: list[int]) -> None:
    check_epoch_rows(EpochOrder(sizes, 6000, 1), held)


def check_epoch_rows(order: EpochOrder, held: list[int]) -> None:
    bases = dict(zip(held, np.cumsum([0] + [order.sizes[c] for c in held]), strict=False))
    for epoch in (0, 3):
        rows, ends = order.epoch_rows(epoch, held)
        for place in range(order.steps_per_epoch):
            step = epoch * order.steps_per_epoch + place
            expected = [int(bases[c] + row) for c in held for row in order.rows(step, c)]
            assert rows[ends[place] : ends[place + 1]].tolist() == expected


@pytest.mark.parametrize("rows", [50, 5000])
def test_epochs_differ_and_repeat_by_seed(rows: int) -> None:
    order = EpochOrder((rows, rows), 10, 1)
    assert not np.array_equal(order.permutation(0, 0), order.permutation(1, 0))
    assert not np.array_equal(order.permutation(0, 0), order.permutation(0, 1))
    assert np.array_equal(order.permutation(2, 1), EpochOrder((rows, rows), 10, 1).permutation(2, 1))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    summary=st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=8),
)
def test_every_chunk_has_one_owner_and_every_worker_a_chunk(sizes: list[int], summary: list[set[int]]) -> None:
    owners = ChunkAssignment.share_out(sizes, ["w0"])
    for members in summary:
        names = [f"w{m}" for m in sorted(members)][: len(sizes)]
        before, owners = owners, owners.reshard(names)
        assert owners.workers == tuple(names)
        held = sorted(c for mine in owners.chunks_of.values() for c in mine)
        assert held == list(range(len(sizes)))
        assert all(owners.chunks_of.values())
        gains = before.gains(owners)
        for name, mine in owners.chunks_of.items():
            assert set(gains[name]) == set(mine) - set(before.chunks_of.get(name, ()))


@given(chunks=st.integers(1, 64), size=st.integers(1, 30), summary=st.lists(st.integers(1, 9), min_size=2, max_size=9))
def test_equal_chunks_stay_balanced_and_only_those_move_that_must(chunks: int, size: int, summary: list[int]) -> None:
    owners = ChunkAssignment.share_out([size] * chunks, ["w0"])
    for wanted in summary:
        names = [f"w{n}" for n in range(min(wanted, chunks))]
        before, owners = owners, owners.reshard(names)
        counts = sorted(len(mine) for mine in owners.chunks_of.values())
        assert counts[-1] - counts[0] <= 1
        fewest, extra = divmod(chunks, len(names))
        # Those who stay must give up what exceeds the larger share, and only `extra` of them may have that.
        held = sorted((len(before.chunks_of.get(name, ())) for name in names), reverse=True)
        keep = sum(min(have, fewest + (place < extra)) for place, have in enumerate(held))
        assert sum(map(len, before.gains(owners).values())) == chunks - keep


def test_a_resize_and_back_leaves_nothing_to_move_for_those_who_stay() -> None:
    two = ChunkAssignment.share_out([10] * 64, ["a", "b"])
    four = two.reshard(["a", "b", "c", "d"])
    assert not two.gains(four)["a"]
    assert not two.gains(four)["b"]
    assert sum(map(len, two.gains(four).values())) == 32
    assert two.reshard(["b", "a"]).gains(two) == {"a": (), "b": ()}


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a", "b", "c", "d"]])
def test_impossible_owners_are_refused(names: list[str]) -> None:
    with pytest.raises(WorkerCountError, match="cannot share 3 chunks"):
        ChunkAssignment.share_out([5, 5, 5], names)


def test_empty_chunks_and_batches_are_refused() -> None:
    with pytest.raises(DataError, match="at least one row"):
        EpochOrder((3, 0), 2, 0)
    with pytest.raises(DataError, match="batch size is 0"):
        EpochOrder((3,), 0, 0)
