"""Groups over several hosts: here, loopback addresses of one machine, between which only connections are used."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Nanny, Scheduler
from distributed.deploy import SpecCluster
from torch import nn

import parakit as pk
from parakit.collectives import hierarchical as over_hosts
from parakit.collectives.base import GroupBroken
from parakit.collectives.hierarchical import HierarchicalGroup
from parakit.collectives.shared_memory import CannotShare
from parakit.collectives.topology import equal_counts, hierarchical
from parakit.errors import RunError
from parakit.events.records import Recovered, Resized
from tests.members import FolderStore, Member, ask
from tests.runs.test_exact import BATCH, CHUNKS, SAMPLES, SEED, assert_same, expected, problem, resized_along, trained
from tests.serial import batches, train_serially

LIMIT_SECONDS = 20.0
SOON_SECONDS = 3.0  # far below the limit, and enough for a busy machine
A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
EVEN = [(A, A, B, B), (A, B, A, B), (A, B, B, A)]
UNEVEN = [(A, A, B), (A, B, B), (A, B, C, A), (B, A, A, A)]
LENGTHS = (1, 64, 1000, 300_003)
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="other systems have one loopback address")
pytestmark = linux


@pytest.mark.parametrize(
    ("hosts", "both", "divides"),
    [
        ((), False, True), ((A,), False, True), ((A, A), False, True), ((A, B), False, True),
        ((A, B, A), True, False), ((A, B, B, A), True, True),
    ],
)  # fmt: skip
def test_what_a_layout_of_hosts_allows(hosts: tuple[str, ...], both: bool, divides: bool) -> None:
    assert hierarchical(hosts) == both
    assert equal_counts(hosts) == divides


# What members do. They keep their group.


def form(kept: dict[str, Any], rank: int, layout: tuple[str, ...], folder: str, limit: float = LIMIT_SECONDS) -> bool:
    kept["group"] = HierarchicalGroup(
        FolderStore(folder), rank, layout, limit_seconds=limit, capacity=8 * LENGTHS[-1], common=8 * LENGTHS[-1]
    )
    return bool(kept["group"].divides)


def leave(kept: dict[str, Any], rank: int) -> None:
    kept.pop("group").close()
    kept.clear()


def vector_of(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * 10.0 ** (rank % 3)).to(dtype)


def sum_of(size: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([vector_of(rank, numel, torch.float64) for rank in range(size)]).sum(0).to(dtype)


def close_to(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=0, atol=1e-12 if found.dtype == torch.float64 else 2e-4)


def add_all(kept: dict[str, Any], rank: int, dtype: torch.dtype) -> list[bytes]:
    """Add vectors from anywhere and from the group's memory; the sums."""
    group, found = kept["group"], []
    for numel in LENGTHS:
        vectors = [torch.empty(numel, dtype=dtype), torch.empty(numel, 2, dtype=dtype)[:, 0]]
        if dtype == torch.float64:
            if "buffer" not in kept:
                kept["buffer"] = group.buffer(LENGTHS[-1], dtype)
            vectors.append(kept["buffer"][:numel])
        for vector in vectors:
            vector.copy_(vector_of(rank, numel, dtype))
            group.all_reduce(vector)
            assert close_to(vector, sum_of(group.size, numel, dtype)), f"wrong on rank {rank}"
            found.append(vector.contiguous().numpy().tobytes()[:4096])
    return found


def average(kept: dict[str, Any], rank: int) -> list[float]:
    tensors = [torch.full((3,), float(rank)), torch.tensor(10.0 * rank)]
    kept["group"].average(tensors)
    return [*tensors[0].tolist(), float(tensors[1])]


@pytest.mark.parametrize("layout", EVEN + UNEVEN, ids=lambda hosts: "".join(h[-1] for h in hosts))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_over_hosts_are_the_same_to_the_bit_for_all(
    team: list[Member], boards: Callable[[], str], layout: tuple[str, ...], dtype: torch.dtype
) -> None:
    part = team[: len(layout)]
    divides = [answer.good for answer in ask(part, form, layout, boards())]
    assert divides == [layout in EVEN] * len(layout)
    sums = [answer.good for answer in ask(part, add_all, dtype)]
    assert all(found == sums[0] for found in sums)
    means = [answer.good for answer in ask(part, average)]
    mean = sum(range(len(layout))) / len(layout)
    assert means == [[mean, mean, mean, 10 * mean]] * len(layout)
    assert [answer.error for answer in ask(part, leave)] == [""] * len(layout)


def add_slices(kept: dict[str, Any], rank: int, numel: int, tail: int) -> tuple[int, int, int, bytes]:
    """Sum slices, of which one appears in the memory of the host; the slice, if all is right."""
    group = kept["group"]
    vector, common = group.buffer(numel, torch.float32), group.common(numel - tail, torch.float32)
    wanted = sum_of(group.size, numel, torch.float32)
    for _ in range(3):
        vector.copy_(vector_of(rank, numel, torch.float32))
        summed = group.reduce_scatter(vector, tail=tail)
        assert summed.where == group.slices(numel - tail)[group.place]
        assert close_to(torch.cat(summed.pieces), wanted[summed.where])
        assert close_to(summed.tail, wanted[numel - tail :])
        common[summed.where] = torch.cat(summed.pieces)
        group.barrier()
        assert close_to(common, wanted[: numel - tail])
        norm = (common[summed.where].double() ** 2).sum().reshape(1)
        group.add_in_common(norm)
        assert torch.allclose(norm, (common.double() ** 2).sum().reshape(1))
        group.barrier()
    return group.place, summed.where.start, summed.where.stop, common.numpy().tobytes()


@pytest.mark.parametrize("layout", EVEN, ids=lambda hosts: "".join(h[-1] for h in hosts))
@pytest.mark.parametrize(("numel", "tail"), [(70, 3), (300_001, 5)])
def test_slices_cover_the_vector_on_every_host(
    team: list[Member], boards: Callable[[], str], layout: tuple[str, ...], numel: int, tail: int
) -> None:
    assert all(answer.good for answer in ask(team, form, layout, boards()))
    slices = [answer.good for answer in ask(team, add_slices, numel, tail)]
    for host in (A, B):
        here = sorted(found[:3] for found, place in zip(slices, layout, strict=True) if place == host)
        assert [first for _, first, _ in here] == [0, here[0][2]]
        assert here[-1][2] == numel - tail
    assert len({found[3] for found in slices}) == 1  # to the bit, on all hosts
    assert [answer.error for answer in ask(team, leave)] == [""] * 4


# Members that die, hosts that cannot share.


def add_forever(kept: dict[str, Any], rank: int, by_slices: bool) -> float:
    """Add until that fails; the time of the failure."""
    group = kept["group"]
    vector = group.buffer(1000, torch.float32)
    try:
        while True:
            if by_slices:
                group.reduce_scatter(vector)
                group.barrier()
            else:
                group.all_reduce(vector)
    except GroupBroken:
        return time.monotonic()


@pytest.mark.parametrize("by_slices", [False, True], ids=["whole", "by slices"])
@pytest.mark.parametrize("dead", [0, 3])
def test_when_a_member_dies_those_of_all_hosts_know_soon(
    team: list[Member], boards: Callable[[], str], dead: int, by_slices: bool
) -> None:
    assert all(answer.good for answer in ask(team, form, (A, A, B, B), boards()))
    for rank, member in enumerate(team):
        member.tell(add_forever, rank, by_slices)
    time.sleep(0.3)
    killed = time.monotonic()
    os.kill(team[dead].pid, signal.SIGKILL)
    told = [member.answer(LIMIT_SECONDS).good for rank, member in enumerate(team) if rank != dead]
    assert all(0 < at - killed < SOON_SECONDS for at in told)
    team[dead].close()
    team[dead] = Member()  # the others are as good as before
    assert [answer.error for answer in ask([m for rank, m in enumerate(team) if rank != dead], leave)] == [""] * 3


def form_without_sharing(kept: dict[str, Any], rank: int, layout: tuple[str, ...], folder: str, where: str) -> str:
    usual = over_hosts.SharedMemoryGroup

    def fails(*args: Any, **options: Any) -> Any:
        raise CannotShare("no room")

    try:
        if layout[rank] == where:
            over_hosts.SharedMemoryGroup = fails  # type: ignore[misc,assignment]
        form(kept, rank, layout, folder)
    except CannotShare as error:
        return str(error)
    finally:
        over_hosts.SharedMemoryGroup = usual  # type: ignore[misc]
    return ""


@pytest.mark.parametrize("where", [A, B])
def test_where_one_host_cannot_share_none_does(team: list[Member], boards: Callable[[], str], where: str) -> None:
    said = [answer.good for answer in ask(team, form_without_sharing, (A, B, B, A), boards(), where)]
    assert said == ["no room"] * 4


def test_others_that_do_not_come_are_named_within_the_limit(team: list[Member], boards: Callable[[], str]) -> None:
    began = time.monotonic()
    for answer in ask(team[:2], form, (A, A, B), boards(), 0.5):  # the third never comes
        assert answer.error.startswith("GroupBroken")
        assert "not formed within 0.5 s" in answer.error
    assert time.monotonic() - began < 2 * SOON_SECONDS


# On a cluster.


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[pk.Workers]:
    """Workers that listen on two addresses, two on each."""
    options = {"nthreads": 1, "dashboard": False, "dashboard_address": None, "silence_logs": 50}
    spec = {n: {"cls": Nanny, "options": {**options, "host": (A, B)[n // 2]}} for n in range(4)}
    scheduler = {"cls": Scheduler, "options": {"host": A, "port": 0, "dashboard": False}}
    with SpecCluster(workers=spec, scheduler=scheduler, silence_logs=50) as cluster, pk.connect(cluster) as workers:
        assert sorted(workers.hosts) == [A, A, B, B]
        yield workers


@pytest.mark.dask
@pytest.mark.parametrize(("workers", "clip_norm"), [(1, None), (3, None), (3, 0.05), (4, None), (4, 0.05)])
def test_a_cluster_of_two_hosts_equals_the_serial_loop(
    two_hosts: pk.Workers, workers: int, clip_norm: float | None
) -> None:
    model, inputs, targets = problem()
    how = {
        "loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "clip_norm": clip_norm,
    }  # fmt: skip
    run = trained(model, (inputs, targets), two_hosts, workers=workers, **how)
    assert_same(run, *expected(model, inputs, targets, **how))
    formed = run.history.latest(Resized)
    assert formed is not None
    # A worker alone has all memory in common with itself; three on two hosts are not as many on each.
    known = {1: ("shared memory", True), 3: ("hierarchical", False), 4: ("hierarchical", True)}
    assert (formed.exchange, formed.divided_update) == known[workers]


@pytest.mark.dask
def test_it_does_for_an_update_that_cannot_be_divided(two_hosts: pk.Workers) -> None:
    model, inputs, targets = problem()
    optimizer = partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": optimizer}
    run = trained(model, (inputs, targets), two_hosts, workers=4, steps=6, **how)
    losses, final = train_serially(model, inputs, targets, batches(SAMPLES, CHUNKS, BATCH, SEED, 6), **how)
    assert_same(run, losses, final, tolerance=1e-7)  # line searches amplify rounding


@pytest.mark.dask
def test_resizes_over_hosts_change_nothing(two_hosts: pk.Workers) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    run = resized_along(
        model, (inputs, targets), two_hosts, [4, 3, 2, 4, 1], batch_size=BATCH, chunks=CHUNKS, seed=SEED, **how
    )
    alone = trained(model, (inputs, targets), pk.connect("inline"), workers=1, steps=run.step, **how)
    assert_same(run, alone.history.losses.tolist(), alone.model)


@pytest.mark.dask
def test_a_lost_worker_of_one_host_is_made_up_for(two_hosts: pk.Workers) -> None:
    model, inputs, targets = problem()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    run = pk.train(
        model, (inputs, targets), on=two_hosts, workers=4, batch_size=BATCH, chunks=CHUNKS, seed=SEED, steps=1000, **how
    )
    while run.step < 50:
        assert run.status == "running"
        time.sleep(0.01)
    os.kill(next(reversed(two_hosts.pids.values())), signal.SIGKILL)  # type: ignore[attr-defined]
    try:
        run.wait(60, progress=False)
    except RunError as error:
        pytest.fail(str(error))
    assert run.history.of(Recovered)
    alone = trained(model, (inputs, targets), pk.connect("inline"), workers=1, steps=1000, **how)
    assert_same(run, alone.history.losses.tolist(), alone.model, tolerance=1e-7)
