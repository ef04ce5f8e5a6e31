"""When a member keeps its state, and where."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from parakit.checkpoints.in_shared_memory import Room
from parakit.checkpoints.policy import SnapshotPolicy
from parakit.checkpoints.state import Snapshots, State


class Owner:
    """Has a state of a few numbers, and counts."""

    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole
        self.step = 0
        self.numbers = torch.zeros(4)
        self.kept: list[int] = []

    @property
    def room(self) -> Room:
        return Room.foreseen([self.numbers], [])

    def live_state(self) -> State:
        return {"step": self.step, "numbers": self.numbers}

    def commit_to(self, commits: Snapshots) -> None:
        self.commits = commits

    def commit(self) -> float:
        self.commits.keep(self.live_state())
        self.kept.append(self.step)
        return 1.0

    def go_on(self) -> None:
        pass


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def policy(owner: Owner) -> Iterator[SnapshotPolicy]:
    made = SnapshotPolicy(owner)
    yield made
    made.close()


def segments(policy: SnapshotPolicy, owner: Owner, count: int, *, covered: bool) -> None:
    for _ in range(count):
        policy.begin_segment(covered=covered)
        owner.step += 1
        policy.commit_if_alone()


def test_a_group_keeps_a_state_as_a_segment_begins(policy: SnapshotPolicy, owner: Owner) -> None:
    policy.begin_generation(shared=True, alone=False)
    assert policy.key is not None
    segments(policy, owner, 3, covered=True)  # it is the one that covers the others
    assert owner.kept == [0, 1, 2]


def test_alone_it_also_keeps_what_nobody_else_has(policy: SnapshotPolicy, owner: Owner) -> None:
    policy.begin_generation(shared=True, alone=True)
    segments(policy, owner, 2, covered=False)
    assert owner.kept == [0, 1, 1, 2]


def test_who_is_covered_keeps_nothing_until_a_state_outgrows_its_room(policy: SnapshotPolicy, owner: Owner) -> None:
    policy.begin_generation(shared=False, alone=False)
    assert policy.key is None
    segments(policy, owner, 2, covered=True)
    assert owner.kept == []
    owner.numbers = torch.zeros(4000)
    segments(policy, owner, 4, covered=True)
    assert owner.kept == [2, 3]
    segments(policy, owner, 1, covered=False)
    assert owner.kept == [2, 3, 6]


def test_a_part_of_a_state_is_not_shared_as_if_it_were_the_run_s() -> None:
    owner = Owner(whole=False)
    policy = SnapshotPolicy(owner)
    policy.begin_generation(shared=True, alone=False)
    assert policy.key is None
    segments(policy, owner, 2, covered=False)
    assert owner.kept == [0, 1]
