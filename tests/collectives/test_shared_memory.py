"""Groups in shared memory: their sums, to the bit; and that no death or silence of a member holds up the others."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parakit.collectives.base import GroupBroken
from parakit.collectives.gloo import GlooGroup
from parakit.collectives.shared_memory import CannotShare, SharedMemoryGroup
from parakit.collectives.shared_memory.barrier import Barrier, barrier_nbytes
from parakit.errors import InputError
from parakit.system.shared_memory import SharedMemory
from tests.conftest import left_in_shared_memory, shared_memory
from tests.members import FolderStore, Member, ask

LIMIT_SECONDS = 20.0
SOON_SECONDS = 2.0  # far below the limit, and enough for a busy machine
PIECE_BYTES = 1 << 14
LENGTHS = (0, 1, 7, 64, 65, 1000, 4096, 30_003)  # the last takes several pieces
MANNERS = ("copied", "in place", "part", "strided", "mixed")
CAPACITY = 300_000
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


# What members do. They keep their group, and themselves what belongs to it.


def form(kept: dict[str, Any], rank: int, size: int, folder: str, options: dict[str, Any]) -> None:
    store = FolderStore(folder)
    usual = {"limit_seconds": LIMIT_SECONDS, "capacity": CAPACITY, "piece_bytes": PIECE_BYTES}
    kept["group"] = SharedMemoryGroup(store, rank, size, **{**usual, **options})
    kept["store"] = store


def leave(kept: dict[str, Any], rank: int) -> None:
    kept.pop("group").close()
    kept.clear()


def vector_of(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    values = torch.randn(numel, generator=generator, dtype=torch.float64) * 10.0 ** (rank % 3)
    return values.to(dtype)


def in_order(size: int, numel: int, dtype: torch.dtype) -> Tensor:
    """The sum as a plain loop over the ranks gives it."""
    if dtype.is_floating_point and dtype.itemsize >= 4:
        total = vector_of(0, numel, dtype).numpy()
        for rank in range(1, size):
            total = total + vector_of(rank, numel, dtype).numpy()
        return torch.from_numpy(total)
    summed = vector_of(0, numel, dtype)
    for rank in range(1, size):
        summed = summed + vector_of(rank, numel, dtype)
    return summed


def add(kept: dict[str, Any], rank: int, numel: int, dtype: torch.dtype, manner: str) -> str:
    """Add vectors; a digest of the sum, or in which way it is wrong."""
    group: SharedMemoryGroup = kept["group"]
    if manner == "mixed":
        manner = MANNERS[rank % 2]
    if manner in ("in place", "part"):
        whole = kept.get("buffer")
        if whole is None:
            whole = kept["buffer"] = group.buffer(CAPACITY // 8, torch.float64)
        offset = 5 * rank if manner == "part" else 0
        vector = whole.view(dtype)[offset : offset + numel]
    elif manner == "strided":
        vector = torch.empty(numel, 3, dtype=dtype)[:, 1]
    else:
        vector = torch.empty(numel, dtype=dtype)
    vector.copy_(vector_of(rank, numel, dtype))
    group.all_reduce(vector)
    if not torch.equal(vector, in_order(group.size, numel, dtype)):
        return f"wrong on rank {rank}"
    return hashlib.sha256(torch.cat([vector, vector]).view(torch.uint8).numpy().tobytes()).hexdigest()


def add_all(kept: dict[str, Any], rank: int, dtype: torch.dtype) -> list[str]:
    return [f"{n} {m} {add(kept, rank, n, dtype, m)}" for n in LENGTHS for m in MANNERS]


def same(answers: list[Any]) -> Any:
    """What all members answer alike."""
    values = [answer.good for answer in answers]
    assert all(value == values[0] for value in values), values
    return values[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_are_those_of_a_loop_over_the_ranks_to_the_bit(
    team: list[Member], boards: Callable[[], str], size: int, dtype: torch.dtype
) -> None:
    part = team[:size]
    same(ask(part, form, size, boards(), {}))
    said = same(ask(part, add_all, dtype))
    same(ask(part, leave))
    assert len(said) == len(LENGTHS) * len(MANNERS)
    assert not [line for line in said if "wrong" in line]


@pytest.mark.parametrize(
    "options", [{"futex": False}, {"named": True}, {"spin_seconds": 0.0}, {"spin_seconds": 0.002}], ids=str
)
def test_other_systems_ways_of_waiting_and_of_sharing_sum_alike(
    team: list[Member], boards: Callable[[], str], tmp_path: Path, options: dict[str, Any]
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    same(ask(team, form, 4, boards(), {**options, "folder": files}))
    assert not list(files.iterdir())  # no name is left from the moment when all have come
    said = same(ask(team, add_all, torch.float32))
    same(ask(team, leave))
    assert not [line for line in said if "wrong" in line]


def add_both_ways(kept: dict[str, Any], rank: int, numel: int) -> float:
    gloo = GlooGroup(kept["store"], rank, 3, "127.0.0.1", LIMIT_SECONDS)
    ours, theirs = (vector_of(rank, numel, torch.float32) for _ in range(2))
    kept["group"].all_reduce(ours)
    gloo.all_reduce(theirs)
    gloo.close()
    size = sum(vector_of(r, numel, torch.float32).abs() for r in range(3))
    return float(((ours - theirs).abs() / size).max())


def test_sums_are_those_of_gloo_within_rounding(team: list[Member], boards: Callable[[], str]) -> None:
    part = team[:3]
    same(ask(part, form, 3, boards(), {"piece_bytes": 1 << 21}))
    errors = [answer.good for answer in ask(part, add_both_ways, 1_300_003)]
    same(ask(part, leave))
    assert max(errors) <= 2 * torch.finfo(torch.float32).eps


def average(kept: dict[str, Any], rank: int) -> list[list[float]]:
    tensors = [torch.full((2, 2), float(rank)), torch.tensor([1.0 + rank], dtype=torch.float64), torch.zeros(0)]
    kept["group"].average(tensors)
    kept["group"].average([])
    return [tensor.reshape(-1).tolist() for tensor in tensors]


def test_means_over_the_members(team: list[Member], boards: Callable[[], str]) -> None:
    same(ask(team, form, 4, boards(), {}))
    assert same(ask(team, average)) == [[1.5] * 4, [2.5], []]
    same(ask(team, leave))


def add_slices(kept: dict[str, Any], rank: int, numel: int, tail: int) -> tuple[int, int]:
    """Sum slices, of which one appears in everybody's memory; the slice, if all is right."""
    group: SharedMemoryGroup = kept["group"]
    vector, common = group.buffer(numel, torch.float32), group.common(numel - tail, torch.float32)
    expected = in_order(group.size, numel, torch.float32)
    for _ in range(3):
        vector.copy_(vector_of(rank, numel, torch.float32))
        summed = group.reduce_scatter(vector, tail=tail)
        assert summed.where == group.slices(numel - tail)[rank]
        assert torch.equal(torch.cat(summed.pieces), expected[summed.where])
        assert torch.equal(vector[summed.where], expected[summed.where])
        assert torch.equal(summed.tail, expected[numel - tail :])
        common[summed.where] = torch.cat(summed.pieces)
        group.barrier()
        assert torch.equal(common, expected[: numel - tail])
        common_again = common.clone()
        group.barrier()
        if rank == 0:
            common.zero_()
        group.barrier()
        assert not common.any()
        assert numel == tail or common_again.any()
    return summed.where.start, summed.where.stop


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("numel", "tail"), [(5, 5), (70, 3), (400_001, 5)])
def test_slices_cover_the_vector_and_reach_everybody_through_common_memory(
    team: list[Member], boards: Callable[[], str], size: int, numel: int, tail: int
) -> None:
    part = team[:size]
    same(ask(part, form, size, boards(), {"capacity": 4 * numel, "common": 4 * numel}))
    slices = [answer.good for answer in ask(part, add_slices, numel, tail)]
    same(ask(part, leave))
    assert [first for first, _ in slices] == [0, *(last for _, last in slices[:-1])]
    assert slices[-1][1] == numel - tail


def add_slices_beside(kept: dict[str, Any], rank: int, numel: int, tail: int) -> bool:
    """Sum a slice of which this member's own part lies elsewhere, in pieces; one of them in the vector after all."""
    group: SharedMemoryGroup = kept["group"]
    vector = group.buffer(numel, torch.float32)
    mine = vector_of(rank, numel, torch.float32)
    where = group.slices(numel - tail)[rank]
    vector.copy_(mine)
    middle = vector[where].tensor_split(3)[1].clone()
    vector[where] = float("nan")
    first, _, last = (piece.clone() for piece in mine[where].tensor_split(3))
    inside = vector[where].tensor_split(3)[1]
    inside.copy_(middle)
    expected = in_order(group.size, numel, torch.float32)
    summed = group.reduce_scatter(vector, tail=tail, own=[first, inside, last])
    return torch.equal(torch.cat([first, inside, last]), expected[where]) and torch.equal(
        summed.tail, expected[numel - tail :]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("numel", "tail"), [(70, 3), (400_001, 5)])
def test_a_members_own_part_may_lie_elsewhere(
    team: list[Member], boards: Callable[[], str], size: int, numel: int, tail: int
) -> None:
    part = team[:size]
    same(ask(part, form, size, boards(), {"capacity": 4 * numel}))
    assert same(ask(part, add_slices_beside, numel, tail))
    same(ask(part, leave))


def slice_then_add(kept: dict[str, Any], rank: int) -> list[float]:
    group: SharedMemoryGroup = kept["group"]
    vector = group.buffer(200, torch.float32).fill_(1.0 + rank)
    group.reduce_scatter(vector)
    other = torch.tensor([1.0])
    group.all_reduce(other)  # without the barrier that should come first
    vector.fill_(1.0)
    group.all_reduce(vector)
    return [float(other), float(vector.min()), float(vector.max())]


def test_a_forgotten_barrier_is_made_up_for(team: list[Member], boards: Callable[[], str]) -> None:
    same(ask(team, form, 4, boards(), {}))
    assert same(ask(team, slice_then_add)) == [4.0, 4.0, 4.0]
    same(ask(team, leave))


def add_what_differs(kept: dict[str, Any], rank: int) -> None:
    kept["group"].all_reduce(torch.zeros(10 + rank // 2))


def add_in_ways_that_differ(kept: dict[str, Any], rank: int) -> None:
    group: SharedMemoryGroup = kept["group"]
    if rank:
        group.all_reduce(torch.zeros(10))
    else:
        group.reduce_scatter(group.buffer(10, torch.float32))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (add_what_differs, "10 of torch.float32, 10 of torch.float32, 11 of torch.float32, 11"),
        (add_in_ways_that_differ, "10 of torch.float32 in slices, 10 of torch.float32, 10 of"),
    ],
)
def test_what_does_not_fit_together_is_refused_everywhere(
    team: list[Member], boards: Callable[[], str], function: Callable[..., None], message: str
) -> None:
    same(ask(team, form, 4, boards(), {}))
    for answer in ask(team, function):
        assert answer.error.startswith("GroupBroken: The members add vectors that differ")
        assert message in answer.error
    same(ask(team, leave))


def alone(tmp_path: Path, **options: Any) -> SharedMemoryGroup:
    return SharedMemoryGroup(FolderStore(str(tmp_path)), 0, 1, limit_seconds=1, **options)


def test_what_cannot_be_summed_is_refused(tmp_path: Path) -> None:
    group = alone(tmp_path, capacity=100)
    group.buffer(20, torch.float32)
    with pytest.raises(InputError, match="48 bytes of shared memory were asked for, and -28 are left"):
        group.buffer(12, torch.float32)
    with pytest.raises(InputError, match="complex64"):
        group.all_reduce(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(InputError, match="buffer"):
        group.reduce_scatter(torch.zeros(2))
    group.close()
    group.close()
    for call in (group.barrier, lambda: group.all_reduce(torch.zeros(1)), lambda: group.buffer(1, torch.float32)):
        with pytest.raises(GroupBroken, match="closed"):
            call()


class Forger(FolderStore):
    """A store on which the segment seems to be elsewhere."""

    def get(self, key: str, limit_seconds: float) -> bytes:
        note = super().get(key, limit_seconds)
        return note.replace(b"/proc/", b"/nowhere/") if key == "shared-segment" else note


def form_or_fall_back(kept: dict[str, Any], rank: int, folder: str, forged: int) -> str:
    store = (Forger if rank == forged else FolderStore)(folder)
    try:
        SharedMemoryGroup(store, rank, 3, limit_seconds=LIMIT_SECONDS, named=False)
    except CannotShare as error:
        gloo = GlooGroup(store, rank, 3, "127.0.0.1", LIMIT_SECONDS)
        vector = torch.ones(3)
        gloo.all_reduce(vector)
        gloo.close()
        return f"{vector.tolist()} {str(error).splitlines()[0]}"
    return "shared"


@linux
@pytest.mark.parametrize("forged", [1, 2])
def test_a_member_out_of_reach_is_known_to_all_who_then_form_another_group(
    team: list[Member], boards: Callable[[], str], forged: int
) -> None:
    said = same(ask(team[:3], form_or_fall_back, boards(), forged))
    assert said.startswith("[3.0, 3.0, 3.0] The segment cannot be opened")


def form_too_much(kept: dict[str, Any], rank: int, folder: str) -> None:
    SharedMemoryGroup(FolderStore(folder), rank, 2, limit_seconds=LIMIT_SECONDS, capacity=2**60)


def test_too_little_memory_is_known_to_all(team: list[Member], boards: Callable[[], str]) -> None:
    for answer in ask(team[:2], form_too_much, boards()):
        assert answer.error.startswith("CannotShare: The system refused")


def test_a_member_that_does_not_come_is_not_waited_for_beyond_the_limit(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(GroupBroken, match=r"not formed within 0\.2 s"):
        SharedMemoryGroup(FolderStore(str(tmp_path)), 0, 2, limit_seconds=0.2)
    assert time.monotonic() - began < SOON_SECONDS


# Members that leave, stop, hang or die.


def add_forever(kept: dict[str, Any], rank: int, numel: int) -> float:
    """Add until that fails; the time of the failure."""
    group: SharedMemoryGroup = kept["group"]
    vector = torch.zeros(numel)
    try:
        while True:
            group.all_reduce(vector)
    except GroupBroken:
        return time.monotonic()


def close_after(kept: dict[str, Any], rank: int, wait_seconds: float) -> float:
    time.sleep(wait_seconds)
    kept["group"].close()
    return time.monotonic()


@pytest.mark.parametrize("futex", [True, False])
@linux
def test_one_who_leaves_ends_the_waits_of_all(team: list[Member], boards: Callable[[], str], futex: bool) -> None:
    same(ask(team, form, 4, boards(), {"futex": futex}))
    for rank in range(3):
        team[rank].tell(add_forever, rank, 10)
    team[3].tell(close_after, 3, 0.2)
    ended = [member.answer().good for member in team]
    assert max(ended[:3]) - ended[3] < 0.2
    assert min(ended[:3]) > ended[3] - 0.1
    same(ask(team, leave))


def close_in_another_thread(kept: dict[str, Any], rank: int) -> float:
    timer = threading.Timer(0.1, kept["group"].close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(GroupBroken, match="closed"):
        kept["group"].barrier()
    timer.join()
    return time.monotonic() - began


def test_a_wait_ends_when_another_thread_closes_the_group(team: list[Member], boards: Callable[[], str]) -> None:
    part = team[:2]
    same(ask(part, form, 2, boards(), {}))
    team[0].tell(close_in_another_thread, 0)
    assert 0.05 < team[0].answer().good < SOON_SECONDS
    part[1].tell(leave, 1)
    assert part[1].answer().error == ""


def wait_at_barrier(kept: dict[str, Any], rank: int) -> dict[str, float]:
    """What a wait costs this process, and how often another thread of it could run."""
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    began, used = time.monotonic(), time.thread_time()
    kept["group"].barrier()
    used = time.thread_time() - used
    done.set()
    thread.join()
    return {"seconds": time.monotonic() - began, "used": used, "ticks": ticks[0]}


def late_barrier(kept: dict[str, Any], rank: int) -> None:
    time.sleep(0.5)
    kept["group"].barrier()


@pytest.mark.parametrize("futex", [True, False])
@linux
def test_waiting_burns_no_core_and_holds_no_lock(team: list[Member], boards: Callable[[], str], futex: bool) -> None:
    part = team[:2]
    same(ask(part, form, 2, boards(), {"futex": futex}))
    part[0].tell(wait_at_barrier, 0)
    part[1].tell(late_barrier, 1)
    found = part[0].answer().good
    part[1].answer()
    same(ask(part, leave))
    assert found["seconds"] > 0.4
    assert found["used"] < 0.1 * found["seconds"]
    assert found["ticks"] > 50


def test_a_silent_member_is_given_up_at_the_limit(team: list[Member], boards: Callable[[], str]) -> None:
    part = team[:2]
    same(ask(part, form, 2, boards(), {"limit_seconds": 0.3}))
    began = time.monotonic()
    part[0].tell(add_forever, 0, 10)
    waited = part[0].answer().good - began
    part[1].tell(add_forever, 1, 10)
    part[1].answer()
    same(ask(part, leave))
    assert 0.29 < waited < SOON_SECONDS


def test_a_stopped_member_that_wakes_disturbs_nobody(team: list[Member], boards: Callable[[], str]) -> None:
    part = team[:3]
    same(ask(part, form, 3, boards(), {"limit_seconds": 0.3}))
    for rank, member in enumerate(part):
        member.tell(add_forever, rank, 300_000)
    time.sleep(0.1)
    os.kill(part[2].pid, signal.SIGSTOP)
    try:
        for member in part[:2]:
            member.answer()
        same(ask(part[:2], leave))
        same(ask(part[:2], form, 2, boards(), {}))
        for rank in range(2):
            part[rank].tell(add_all, rank, torch.float32)
    finally:
        os.kill(part[2].pid, signal.SIGCONT)
    said = same([member.answer() for member in part[:2]])
    assert not [line for line in said if "wrong" in line]
    part[2].answer()  # it noticed by itself that the others have left
    same(ask(part[:2], leave))
    part[2].tell(leave, 2)
    part[2].answer()


def look_around(kept: dict[str, Any], rank: int) -> tuple[int, int, int]:
    """Open files, threads and mapped segments of this process."""
    maps = Path("/proc/self/maps").read_text()
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), maps.count("parakit-shared")


@linux
@pytest.mark.parametrize("named", [False, True])
def test_a_closed_group_leaves_nothing(
    team: list[Member], boards: Callable[[], str], tmp_path: Path, named: bool
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    shared = shared_memory()
    before = [answer.good for answer in ask(team, look_around)]
    for _ in range(5):
        same(ask(team, form, 4, boards(), {"named": named, "folder": files}))
        assert all(answer.good[2] > 0 for answer in ask(team, look_around))
        ask(team, add, 1000, torch.float32, "mixed")
        same(ask(team, leave))
    assert [answer.good for answer in ask(team, look_around)] == before
    assert not list(files.iterdir())
    assert not left_in_shared_memory(shared)


# Deaths. The members are forks of one process: that costs milliseconds, where a new one costs seconds.


def fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int, limit_seconds: float) -> int:
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 98


def survive(rank: int, size: int, folder: str, numel: int, options: dict[str, Any]) -> int:
    """Be a member until the group breaks; 0 if nothing of it is left here then."""
    kept: dict[str, Any] = {}
    before = look_around(kept, rank)
    try:
        form(kept, rank, size, folder, options)
    except GroupBroken:
        return 0 if look_around(kept, rank) == before else 2
    Path(folder, f"formed-{rank}").touch()
    ended = add_forever(kept, rank, numel)
    Path(folder, f"ended-{rank}").write_text(str(ended))
    leave(kept, rank)
    return 0 if look_around(kept, rank) == before else 1


def lose_one(kept: dict[str, Any], rank: int, folder: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Kill one of three members at some moment; how the others fared, and how soon."""
    chance = random.Random(seed)
    numel = chance.choice((10, 1000, 200_000))
    pids = [fork(lambda rank=rank: survive(rank, 3, folder, numel, options)) for rank in range(3)]
    victim = chance.randrange(3)
    while not all(Path(folder, f"formed-{rank}").exists() for rank in range(3)):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(pids[victim], signal.SIGKILL)  # nobody collects it yet: it must not be taken for alive
    killed = time.monotonic()
    codes = {rank: exit_code(pid, 10) for rank, pid in enumerate(pids) if rank != victim}
    os.waitpid(pids[victim], 0)
    ended = [float(Path(folder, f"ended-{rank}").read_text()) for rank, code in codes.items() if code == 0]
    return {"codes": sorted(codes.values()), "seconds": max(ended, default=99.0) - killed}


@linux
@pytest.mark.parametrize("named", [False, True])
def test_whenever_a_member_is_killed_the_others_know_soon_and_nothing_is_left(
    team: list[Member], boards: Callable[[], str], tmp_path: Path, named: bool
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    shared = shared_memory()
    seconds = []
    for seed in range(12):
        team[0].tell(lose_one, 0, boards(), seed, {"named": named, "folder": files, "capacity": 0})
        found = team[0].answer().good
        assert found["codes"] == [0, 0], f"seed {seed}"
        seconds.append(found["seconds"])
    assert max(seconds) < SOON_SECONDS
    assert sorted(seconds)[len(seconds) // 2] < 0.3
    assert not list(files.iterdir())
    assert not left_in_shared_memory(shared)


class Trap(FolderStore):
    """A store on which the one who leaves a certain note dies of it."""

    def __init__(self, folder: str, key: str) -> None:
        super().__init__(folder)
        self.key = key

    def set(self, key: str, value: bytes) -> None:
        super().set(key, value)
        if key == self.key:
            os.kill(os.getpid(), signal.SIGKILL)


def join_in_vain(rank: int, folder: str, deadly: str, options: dict[str, Any]) -> int:
    before = look_around({}, rank)
    try:
        SharedMemoryGroup(Trap(folder, deadly), rank, 3, limit_seconds=0.5, **options)
    except GroupBroken:
        pass
    else:
        return 1
    return 0 if look_around({}, rank) == before else 2


def lose_one_early(kept: dict[str, Any], rank: int, folder: str, deadly: str, options: dict[str, Any]) -> list[int]:
    pids = [fork(lambda rank=rank: join_in_vain(rank, folder, deadly, options)) for rank in range(3)]
    return sorted(exit_code(pid, 10) for pid in pids)


@linux
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("deadly", ["shared-segment", "shared-1"])
def test_a_death_while_joining_leaves_no_file(
    team: list[Member], boards: Callable[[], str], tmp_path: Path, deadly: str, named: bool
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    team[0].tell(lose_one_early, 0, boards(), deadly, {"named": named, "folder": files})
    codes = team[0].answer().good
    # The one who died as its note was read may count as come; then the others formed a group of which one is dead.
    assert codes in ([-signal.SIGKILL, 0, 0], [-signal.SIGKILL, 1, 1])
    assert not list(files.iterdir())


def barrier_with(pid: int, birth: int | None) -> Barrier:
    """The barrier of rank 0, whose partner wrote that it is such a process."""
    segment = SharedMemory.create(barrier_nbytes(2))
    partner = Barrier(segment, 1, 2, 0.5)
    ours = Barrier(segment, 0, 2, 0.5)
    partner._pid[1] = pid
    if birth is not None:
        partner._birth[1] = birth
    segment.hide()
    return ours


@pytest.mark.parametrize(
    ("birth", "message"), [(None, "silent for 0.5 s"), (12345, "it died")], ids=["itself", "another of its number"]
)
def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(birth: int | None, message: str) -> None:
    with pytest.raises(GroupBroken, match=message):
        barrier_with(os.getpid(), birth).wait()


def test_a_member_that_came_and_then_left_has_come() -> None:
    segment = SharedMemory.create(barrier_nbytes(2))
    ours, partner = Barrier(segment, 0, 2, 5.0), Barrier(segment, 1, 2, 5.0)
    coming = threading.Thread(target=partner.wait)
    coming.start()
    while not partner._arrived[1]:
        time.sleep(0.001)
    ours.wait()
    coming.join()
    partner.leave()
    ours._generation -= 1  # the same barrier again
    ours.wait()
    with pytest.raises(GroupBroken, match="it left the group"):
        ours.wait()
    segment.hide()
