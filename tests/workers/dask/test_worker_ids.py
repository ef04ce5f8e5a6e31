"""Workers that come back where they died: on fixed ports each time, and by chance where ports are free to choose."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Nanny, Scheduler, SpecCluster

import parakit as pk
from parakit.collectives.base import GroupBroken
from parakit.errors import WorkerLost
from parakit.events.records import Recovered, WorkersLost
from parakit.workers import remote
from parakit.workers.dask.local_cluster import WatchedCluster
from parakit.workers.dask.store import WorkerStore
from parakit.workers.dask.worker_ids import Incarnations, address_of, host_of
from tests.mortal import arm
from tests.runs.test_exact import wait_for
from tests.runs.test_recovery import LIMIT, assert_as_if_nothing_had_happened, train, undisturbed  # noqa: F401  # a fixture
from tests.waiting import until

HOST = "127.0.0.1"


def test_each_process_at_an_address_has_a_name_of_its_own() -> None:
    lives = Incarnations()
    here, there = f"tcp://{HOST}:4001", f"tcp://{HOST}:4002"
    assert lives.name(here, "worker-a") == lives.name(here, "worker-a") == here
    assert lives.name(there, "worker-b") == there
    second = lives.name(here, "worker-c")
    third = lives.name(here, "worker-d")
    assert len({here, second, third}) == 3
    assert lives.name(here, "worker-d") == third
    assert lives.name(here, "worker-c") == second  # as a thread may say that looked earlier, and comes later
    assert lives.name(here, "worker-a") == here
    assert lives.name(there, "worker-b") == there
    assert address_of(here) == address_of(second) == address_of(third) == here
    assert host_of(third) == host_of(here) == HOST
    assert host_of("tls://[::1]:4001") == "::1"


def is_free(port: int) -> bool:
    """Whether nobody listens there; no port of these is given to those who ask for any."""
    with socket.socket() as trial:
        return trial.connect_ex((HOST, port)) != 0


class _Patient(SpecCluster):
    """Dask's cluster, but one that lets every worker come back, however often and soon it dies again."""

    _update_worker_status = WatchedCluster._update_worker_status


@pytest.fixture(scope="module")
def cluster() -> Iterator[SpecCluster]:
    """Three workers, each on a port of its own for good."""
    ports = [port for port in random.sample(range(20_000, 32_000), 100) if is_free(port)][:3]
    options = {"host": HOST, "nthreads": 1, "dashboard": False, "dashboard_address": None, "silence_logs": 50}
    options["preload"] = ["parakit.workers.dask.preload"]
    spec = {n: {"cls": Nanny, "options": {**options, "worker_port": port}} for n, port in enumerate(ports)}
    scheduler = {"cls": Scheduler, "options": {"host": HOST, "port": 0, "dashboard": False}}
    with _Patient(workers=spec, scheduler=scheduler, silence_logs=50) as made:
        yield made


@pytest.fixture
def pool(cluster: SpecCluster) -> Iterator[pk.Workers]:
    with pk.connect(cluster) as workers:
        until(lambda: workers.size == 3, 60)
        yield workers


def pids(pool: Any) -> dict[str, int]:
    """By address, as the workers themselves say."""
    found: dict[str, Any] = pool.client.run(remote.survey)
    return {address: told["pid"] for address, told in found.items()}


def restart(pool: Any, name: str) -> None:
    """Kill a worker, and wait for the one that comes at its address."""
    address, before = address_of(name), pids(pool)
    os.kill(before[address], signal.SIGKILL)
    until(lambda: name not in pool.names, 30)
    until(lambda: pool.size == 3, 60)
    after = pids(pool)
    assert set(after) == set(before)
    assert after[address] != before[address]


@pytest.mark.dask
@pytest.mark.timeout(180)
class TestOnFixedPorts:
    def test_a_worker_that_died_idle_trains_in_its_second_life(
        self,
        pool: Any,
        tmp_path: Path,
        undisturbed: pk.Run,  # noqa: F811
    ) -> None:
        known = pool.pids
        restart(pool, pool.names[0])
        assert {address_of(name) for name in pool.names} == set(pids(pool))
        run = train(pool, tmp_path).wait(LIMIT, progress=False)
        assert not run.history.of(WorkersLost)
        assert_as_if_nothing_had_happened(run, undisturbed)
        assert set(pool.pids) == set(known) == {"worker 0", "worker 1", "worker 2"}
        assert sorted(pool.pids.values()) == sorted(pids(pool).values())
        assert pool.map(abs, [-1, -2, -3], 30) == [1, 2, 3]

    def test_a_member_that_died_is_lost_even_if_its_address_is_back(
        self,
        pool: Any,
        tmp_path: Path,
        undisturbed: pk.Run,  # noqa: F811
    ) -> None:
        run = train(pool, tmp_path, workers=3, pause_seconds=0.03)
        wait_for(run, lambda: run.step > 20)
        armed = arm(tmp_path, "exchange")
        run.wait(LIMIT, progress=False)
        assert not armed.exists()
        (lost,) = run.history.of(WorkersLost)
        (recovered,) = run.history.of(Recovered)
        assert len(lost.workers) == 1
        assert len(recovered.workers) == 2
        assert recovered.steps_again == 0
        assert_as_if_nothing_had_happened(run, undisturbed)
        until(lambda: pool.size == 3, 60)
        assert {told["runs"] for told in pool.client.run(remote.survey).values()} == {()}

    def test_whoever_comes_at_the_address_of_the_lost_is_taken_in(self, pool: Any, tmp_path: Path) -> None:
        run = train(pool, tmp_path, workers=3, steps=100_000)
        wait_for(run, lambda: run.step > 20)
        arm(tmp_path, "backward")
        wait_for(run, lambda: run.history.of(Recovered), 30)
        wait_for(run, lambda: run.world_size == 3, 60)
        seen = run.step
        wait_for(run, lambda: run.step > seen + 5)
        assert len(run.history.of(WorkersLost)) == 1
        run.stop()
        run.wait(LIMIT, progress=False)

    def test_who_asks_for_a_store_where_its_keeper_was_is_told(self, cluster: SpecCluster, pool: Any) -> None:
        keeper, other = pool.names[:2]
        restart(pool, keeper)  # and nobody has taught the second one to keep stores
        store = WorkerStore(address_of(keeper), "a run", 1)
        with Client(cluster) as client:
            asked = client.submit(store.set, "key", b"value", workers=[address_of(other)])
            with pytest.raises(GroupBroken, match="another process is at its address"):
                asked.result(30)

    def test_an_order_for_the_first_life_is_none_for_the_second(self, pool: Any) -> None:
        name = pool.names[0]
        pool.cluster.make_ready([name])
        restart(pool, name)
        with pytest.raises(WorkerLost, match="died"):
            pool.cluster.run(remote.survey, [name])
