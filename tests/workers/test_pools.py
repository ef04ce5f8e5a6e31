"""Pools: local processes, and clusters that are somebody else's."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn

import parakit as pk
from parakit.errors import ConnectError, PoolError, WorkerCountError, WorkerLost
from parakit.workers import remote
from parakit.workers.assignment import GroupAssignment
from parakit.workers.commands import Orders
from parakit.workers.dask.staging import Staging
from parakit.workers.dask.worker_ids import address_of
from tests.conftest import leftovers, standing
from tests.runs.test_exact import wait_for
from tests.runs.test_run import endless, small_net

pytestmark = pytest.mark.dask
LIMIT = 60


def brief(on: pk.Workers, **how: Any) -> pk.Run:
    how = {"steps": 4} | how
    return pk.train(small_net(), pk.datasets.digits().train, on=on, **how).wait(LIMIT, progress=False)


@pytest.fixture
def foreign() -> Iterator[LocalCluster]:
    """A cluster that parakit did not start, with two workers."""
    with LocalCluster(
        n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


def test_a_local_pool_listens_on_loopback_only_and_leaves_nothing(nothing_left: None) -> None:
    with pk.connect(2) as workers:
        run = endless(workers, workers=2)
        wait_for(run, lambda: run.step > 0)
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {
            c.laddr.ip for process in family for c in process.net_connections() if c.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        assert "2 workers of 1 thread each" in repr(workers)
    assert run.status == "finished"  # closing the pool stopped it
    assert run.stopped_early
    assert run.model_step == run.step
    assert "closed" in repr(workers)
    workers.close()  # twice does nothing
    with pytest.raises(PoolError, match="closed"):
        brief(workers)


def test_a_pool_grows_when_a_run_is_resized_beyond_it(nothing_left: None) -> None:
    with pk.connect(1, most=2) as workers:
        with pytest.raises(WorkerCountError, match="2 workers were asked for"):
            brief(workers, workers=2)
        run = endless(workers, workers=1)
        wait_for(run, lambda: run.step > 0)
        with pytest.raises(WorkerCountError, match="can grow to 2"):
            run.resize(3)
        before = run.step
        run.resize(2)
        wait_for(run, lambda: any(step.world_size == 2 for step in run.history.steps), seconds=60)
        first = next(step.step for step in run.history.steps if step.world_size == 2)
        assert first > before + 5  # the run went on while the process started
        assert workers.size == 2


def test_foreign_clusters_serve_and_are_left_as_they_were(foreign: LocalCluster) -> None:
    with Client(foreign, set_as_default=False) as client:
        for target in (foreign, foreign.scheduler_address, client):
            before = standing()
            with pk.connect(target) as workers:
                assert workers.size == 2
                assert brief(workers, strategy=pk.strategies.AllReduce()).status == "finished"
                assert brief(workers, strategy=pk.strategies.MapReduce()).status == "finished"
                assert pk.evaluate(small_net(), pk.datasets.digits().test, on=workers).samples == 360
            assert not leftovers(before)
            assert client.submit(sum, [1, 2], pure=False).result(timeout=20) == 3
            runs = client.run(remote.survey).values()
            assert all(found["runs"] == () for found in runs)


def test_an_address_cannot_grow(foreign: LocalCluster) -> None:
    with pk.connect(foreign.scheduler_address) as workers:
        run = endless(workers, workers=1)
        with pytest.raises(WorkerCountError, match=r"3 workers were asked for, but this pool .* has 2"):
            run.resize(3)


def test_a_run_that_is_stopped_before_its_chunks_arrived_leaves_no_thread(
    foreign: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, bring = threading.Event(), Staging.bring_chunks

    def slowly(staging: Staging, assignment: GroupAssignment) -> Any:
        loading.set()
        time.sleep(0.5)
        return bring(staging, assignment)

    monkeypatch.setattr(Staging, "bring_chunks", slowly)
    with pk.connect(foreign.scheduler_address) as workers:
        run = endless(workers, workers=2)
        assert loading.wait(LIMIT)
    assert run.stopped_early
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("parakit-")]
    with Client(foreign, set_as_default=False) as client:
        assert [found["runs"] for found in client.run(remote.survey).values()] == [(), ()]


def test_a_worker_without_parakit_is_named_with_the_remedy(tmp_path: Path, nothing_left: None) -> None:
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "parakit" not in entry.name.lower() and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    bare = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None) as cluster,
        subprocess.Popen(
            [sys.executable, "-S", "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--no-nanny",
             "--no-dashboard", "--host", "127.0.0.1", "--local-directory", str(tmp_path / "scratch")],
            env=bare, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process,
    ):  # fmt: skip
        try:
            with pytest.raises(ConnectError, match="has no parakit") as caught:
                pk.connect(cluster.scheduler_address, timeout=30)
            assert "pip install parakit==" in str(caught.value)
        finally:
            process.terminate()
            process.wait(20)


def test_the_workers_are_seen_although_the_client_refreshes_its_own_view(pool: pk.Workers) -> None:
    client, ended = pool.client, threading.Event()  # type: ignore[attr-defined]

    def refresh() -> None:
        while not ended.is_set():  # what a client does every two seconds, and without asking for the workers
            client.sync(client._update_scheduler_info)

    thread = threading.Thread(target=refresh)
    thread.start()
    try:
        assert {len(pool.names) for _ in range(300)} == {4}
    finally:
        ended.set()
        thread.join(20)


def test_an_interrupt_meant_for_a_cell_does_not_reach_the_workers(pool: pk.Workers) -> None:
    run = endless(pool, workers=4)
    wait_for(run, lambda: run.step > 0)
    # A kernel's interrupt goes to its whole process group.
    for pid in pool.client.run(os.getpid).values():
        os.kill(pid, signal.SIGINT)
    seen = run.step
    wait_for(run, lambda: run.step > seen + 20)
    assert run.status == "running"
    run.stop()
    run.wait(LIMIT, progress=False)


def test_a_closed_client_is_refused(foreign: LocalCluster) -> None:
    client = Client(foreign, set_as_default=False)
    client.close()
    with pytest.raises(ConnectError, match="closed"):
        pk.connect(client)


def test_orders_of_an_older_generation_are_refused(pool: pk.Workers) -> None:
    run = endless(pool, workers=2)
    wait_for(run, lambda: run.step > 0)
    run.resize(1)
    wait_for(run, lambda: run.world_size == 1)
    run.resize(2)
    wait_for(run, lambda: run.world_size == 2)
    client, worker = pool.client, address_of(pool.names[1])  # type: ignore[attr-defined]
    (run_id,) = client.run(remote.survey, workers=[worker])[worker]["runs"]
    for generation in (0, 1):
        order = client.submit(
            remote.advance, run_id, generation, 1, 0, 1, 0, False, False, workers=[worker], pure=False
        )
        late = order.result(timeout=30)
        assert late.failure.kind == "stale"
        assert "generation" in late.failure.text
        orders = Orders(generation, 1, ("127.0.0.1",) * 2, 5.0, (), (), True, False)
        joining = client.submit(remote.form, run_id, orders, {}, {}, None, None, workers=[worker], pure=False)
        assert joining.result(timeout=30).failure.kind == "stale"
    held = run.step
    wait_for(run, lambda: run.step > held)  # and the run does not care
    run.stop()
    run.wait(LIMIT, progress=False)
    gone = client.submit(remote.advance, run_id, 2, 1, 0, 1, 0, False, False, workers=[worker], pure=False).result(
        timeout=30
    )
    assert "released" in gone.failure.text


def test_threads_are_the_same_for_every_worker_and_recorded(nothing_left: None) -> None:
    with pk.connect(1, threads=2) as workers:
        run = endless(workers)
        wait_for(run, lambda: run.step > 0)
        assert run.history.to_dicts()[0]["threads_per_worker"] == 2
        threads = [f["threads"] for f in workers.client.run(remote.survey).values()]  # type: ignore[attr-defined]
        assert "1 worker of 2 threads" in repr(workers)
        assert threads
    assert ThreadCount().count(workers=1, threads=2) == 2


class ThreadCount(nn.Module):
    """A model whose output says how many threads torch uses where it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) * 0 + torch.get_num_threads()

    def count(self, *, workers: int, threads: int) -> int:
        """Threads in a worker of a pool made for it: the mean of an output that is nothing else."""
        with pk.connect(workers, threads=threads) as pool:
            run = pk.train(
                self, (torch.ones(4, 1), torch.zeros(4, 1)), on=pool, loss=lambda o, t: (o - t).mean(), steps=1
            )
            return round(run.wait(LIMIT, progress=False).history.losses[0])


SCRIPT_WITHOUT_GUARD = """
import parakit as pk
pk.connect(1, timeout=20)
"""


def test_a_script_without_a_guard_is_told_about_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT_WITHOUT_GUARD)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert 'if __name__ == "__main__":' in done.stderr


def test_a_worker_that_dies_while_it_is_asked_is_lost_and_no_error_of_a_users_code(nothing_left: None) -> None:
    with pk.connect(1) as pool, pytest.raises(WorkerLost, match="died before it answered"):
        pool.cluster.run(die, pool.names)  # type: ignore[attr-defined]


def die() -> None:
    os._exit(1)


def test_workers_keep_the_memory_that_they_free(pool: pk.Workers) -> None:
    (faults,) = pool.map(page_faults_of_ten, [0], 30.0)
    assert faults < 1000  # ten times 3 MB are 7,320 pages


def page_faults_of_ten(_: int) -> int:
    """Faults of allocating, writing to and freeing 3 MB, ten times after the first."""
    for turn in range(11):
        if turn == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytes([1]) * 3_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
