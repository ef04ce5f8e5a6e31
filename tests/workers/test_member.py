"""What a worker does with orders: segments, one ordered while another goes on, and the way back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parakit as pk
from parakit.checkpoints.in_shared_memory import SnapshotsReader
from parakit.collectives.base import GroupBroken
from parakit.errors import ParakitError, StaleGeneration
from parakit.workers import remote as members_here
from parakit.workers.commands import Orders, Segment
from parakit.workers.member import Member
from tests.engines.test_replicated import OPTIMIZERS, SGD, chunk, flat, recipe
from tests.members import FolderStore

CHUNKS = (0, 1, 2, 3)


class Failing:
    """A strategy whose text fails at some step."""

    runs_on = "workers"

    def __init__(self, at: int = -1) -> None:
        self._at, self._usual = at, pk.strategies.AllReduce()

    def step(self, team: Any, step: int) -> None:
        if step == self._at:
            raise ValueError("as it should")
        self._usual.step(team, step)


def member(folder: Path, fails_at: int = -1, *, snapshots: bool = False) -> Member:
    made = Member("run", recipe(SGD, strategy=Failing(fails_at)), 1)
    form(made, 0, folder, {number: chunk(number) for number in CHUNKS}, snapshots=snapshots)
    return made


def form(made: Member, generation: int, folder: Path, chunks: Any, *, snapshots: bool = False) -> None:
    orders = Orders(generation, 0, ("127.0.0.1",), 5.0, CHUNKS, (), True, snapshots)
    made.follow(orders, chunks, {}, None, FolderStore(str(folder)))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Member]:
    made = member(tmp_path)
    yield made
    made.leave_group()
    made.snapshots.close()


def steps(segment: Segment) -> list[int]:
    return [record.step for record in segment.records]


def test_a_segment_follows_on_the_one_before_it(worker: Member) -> None:
    assert steps(worker.segment(1, 0, 3, 0, ahead=False)) == [0, 1, 2]
    assert steps(worker.segment(2, 3, 2, 0, ahead=True)) == [3, 4]
    assert steps(worker.segment(3, 5, 1, 0, ahead=False)) == [5]


def test_one_that_was_ordered_ahead_is_left_out_if_a_vote_ended_the_one_before(worker: Member) -> None:
    worker.halt(7)
    assert steps(worker.segment(1, 0, 5, 6, ahead=False)) == [0]
    assert steps(worker.segment(2, 5, 3, 6, ahead=True)) == []
    assert worker.engine.step == 1
    assert steps(worker.segment(3, 1, 2, 7, ahead=False)) == [1, 2]


def test_a_vote_that_comes_at_the_end_ends_the_next_one_after_a_step(worker: Member) -> None:
    worker.segment(1, 0, 2, 6, ahead=False)
    worker.halt(7)
    assert steps(worker.segment(2, 2, 5, 6, ahead=True)) == [2]


def test_an_order_out_of_its_turn_is_refused(worker: Member) -> None:
    worker.segment(1, 0, 1, 0, ahead=False)
    with pytest.raises(GroupBroken, match="Order 3 came where order 2 was due"):
        worker.segment(3, 1, 1, 0, ahead=True)


def test_an_order_of_another_step_is_refused_unless_it_was_ahead(worker: Member) -> None:
    with pytest.raises(ParakitError, match="at step 0, but step 4 was ordered"):
        worker.segment(1, 4, 1, 0, ahead=False)


def test_after_a_failure_nothing_that_was_ordered_ahead_is_done(tmp_path: Path) -> None:
    worker = member(tmp_path, fails_at=3)
    worker.segment(1, 0, 2, 0, ahead=False)
    with pytest.raises(ValueError, match="as it should"):
        worker.segment(2, 2, 2, 0, ahead=True)
    # It has come to step 3, and so the next one seems to fit; but partners may be elsewhere.
    assert worker.engine.step == 3
    assert steps(worker.segment(3, 3, 1, 0, ahead=True)) == []
    assert worker.group is None  # the partners need not wait
    assert worker.engine.fall_back(2)
    assert worker.engine.step == 2


def test_it_can_go_back_to_where_either_of_two_segments_began(worker: Member) -> None:
    states = {0: flat(worker.engine.live_state())}
    for number, first in enumerate((0, 3, 5)):
        worker.segment(number + 1, first, 3 if first == 0 else 2, 0, ahead=first > 0)
        states[worker.engine.step] = flat(worker.engine.live_state())
    # The driver has the report of the second segment at most, so it is at step 3 or 5.
    assert not worker.fall_back(1, 0).intact
    assert worker.engine.step == 7
    assert worker.fall_back(2, 5).intact
    assert flat(worker.engine.live_state()) == states[5]
    assert worker.fall_back(3, 3).intact
    assert flat(worker.engine.live_state()) == states[3]
    assert worker.fall_back(4, 3).intact
    assert not worker.fall_back(5, 5).intact  # that was undone: whoever goes on from step 3 may come elsewhere
    with pytest.raises(StaleGeneration):
        worker.fall_back(5, 3)


def test_a_new_generation_counts_its_orders_anew(worker: Member, tmp_path: Path) -> None:
    worker.segment(1, 0, 2, 0, ahead=False)
    worker.fall_back(1, 2)
    form(worker, 2, tmp_path, {})
    assert steps(worker.segment(1, 2, 1, 0, ahead=False)) == [2]


def test_alone_with_a_snapshots_it_leaves_the_state_of_wherever_the_driver_may_be(tmp_path: Path) -> None:
    worker = member(tmp_path, snapshots=True)
    try:
        first = worker.segment(1, 0, 3, 0, ahead=False)
        assert first.snapshots is not None
        seen = SnapshotsReader(first.snapshots)
        assert [int(seen.newest(step)["step"]) for step in (3, 9)] == [3, 3]  # type: ignore[index]
        worker.segment(2, 3, 2, 0, ahead=True)
        assert [int(seen.newest(step)["step"]) for step in (3, 4, 5)] == [3, 3, 5]  # type: ignore[index]
        worker.segment(3, 5, 2, 0, ahead=True)
        assert [int(seen.newest(step)["step"]) for step in (3, 5, 7)] == [3, 5, 7]  # type: ignore[index]
        worker.segment(4, 7, 2, 0, ahead=True)
        assert seen.newest(4) is None
        assert [int(seen.newest(step)["step"]) for step in (5, 7, 9)] == [5, 7, 9]  # type: ignore[index]
    finally:
        worker.leave_group()
        worker.snapshots.close()


def test_a_worker_alone_leaves_gradients_where_torch_makes_them(worker: Member) -> None:
    worker.segment(1, 0, 1, 0, ahead=False)
    vector = worker.engine.buffer.sum._vector
    inside = range(vector.data_ptr(), vector.data_ptr() + vector.nbytes)
    grads = [p.grad for p in worker.engine.buffer.parameters if p.grad is not None]
    assert grads
    assert all(grad.data_ptr() not in inside for grad in grads)


def test_where_rank_0_keeps_states_for_all_others_keep_none(worker: Member) -> None:
    # The fixture's worker has no snapshots, as one that is not of rank 0.
    for number in range(1, 4):  # a momentum comes with the first step, and there is room for it
        worker.segment(number, number - 1, 1, 0, ahead=False, covered=True)
        assert worker.engine._commits.of_step(number - 1) is None
    worker.segment(4, 3, 1, 0, ahead=False, covered=False)  # the driver has lost hold of the snapshots
    assert worker.engine._commits.of_step(3) is not None
    assert worker.fall_back(1, 3).intact


def test_others_keep_states_as_long_as_the_snapshots_of_rank_0_may_be_moving(tmp_path: Path) -> None:
    # What this optimizer keeps grows from step to step, beyond what there is room for from the beginning.
    made = Member("run", recipe(OPTIMIZERS["lbfgs"], strategy=Failing()), 1)
    form(made, 0, tmp_path, {number: chunk(number) for number in CHUNKS})
    kept = []
    for number in range(1, 60):
        made.segment(number, number - 1, 1, 0, ahead=False, covered=True)
        kept.append(made.engine._commits.of_step(number - 1) is not None)
    made.leave_group()
    assert not kept[0]
    assert any(kept)
    first = kept.index(True)
    assert kept[first : first + 2] == [True, True]
    assert not kept[-1]  # its history has come to its full length


def test_what_rank_0_keeps_it_keeps_also_for_others(tmp_path: Path) -> None:
    worker = member(tmp_path, snapshots=True)
    try:
        for number in range(1, 6):
            segment = worker.segment(number, number - 1, 1, 0, ahead=False, covered=True)
        assert segment.snapshots is not None
        state = SnapshotsReader(segment.snapshots).newest(5)
        assert state is not None
        assert state["step"] == 5
    finally:
        worker.leave_group()
        worker.snapshots.close()


def who_divides() -> list[bool]:
    return [member.engine.sharded for member in members_here._members.values()]


@pytest.mark.dask
@pytest.mark.parametrize("loss", [None, lambda o, t: nn.functional.cross_entropy(o, t)], ids=["known", "a function"])
@pytest.mark.parametrize("divided", [True, False])
def test_workers_of_one_host_divide_the_update_of_a_plain_model(pool: pk.Workers, divided: bool, loss: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    run = pk.train(
        model, pk.datasets.digits().train, on=pool, workers=2, loss=loss, steps=10**6,
        strategy=pk.strategies.AllReduce(shard=divided), optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while run.step < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    found = [each for worker in pool.client.run(who_divides).values() for each in worker]  # type: ignore[attr-defined]
    run.stop()
    run.wait(30, progress=False)
    assert found == [divided, divided]
