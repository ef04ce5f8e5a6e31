"""Who can listen in: nobody beyond loopback on a local pool, and nobody without the keys on a cluster with TLS."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster
from distributed.security import Security

import parakit as pk
from parakit.errors import ConnectError
from tests.runs.test_exact import wait_for
from tests.runs.test_run import endless, small_net

pytestmark = pytest.mark.dask
KEYS = Path(__file__).parents[2] / "data" / "tls"  # made for these tests; they protect nothing else


def family() -> set[int]:
    return {process.pid for process in (psutil.Process(), *psutil.Process().children(recursive=True))}


def listening() -> set[tuple[str, int]]:
    """Addresses at which this process and its descendants listen, and their ports: by `ss`, where there is one."""
    if shutil.which("ss"):
        told = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        ours = [line.split()[3] for line in told.splitlines()
                if family() & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}]  # fmt: skip
        return {(place.rsplit(":", 1)[0].strip("[]"), int(place.rsplit(":", 1)[1])) for place in ours}
    return {
        (c.laddr.ip, c.laddr.port) for pid in family() for c in psutil.Process(pid).net_connections()
        if c.status == psutil.CONN_LISTEN
    }  # fmt: skip


@pytest.mark.parametrize("strategy", [pk.strategies.AllReduce(), pk.strategies.MapReduce()], ids=repr)
def test_during_a_local_run_everything_listens_on_loopback_only(
    pool: pk.Workers, strategy: pk.strategies.AllReduce
) -> None:
    run = endless(pool, workers=3, strategy=strategy)
    wait_for(run, lambda: run.step > 3)
    run.resize(2)
    wait_for(run, lambda: run.world_size == 2)
    found = listening()
    run.stop()
    run.wait(30, progress=False)
    assert len(found) >= 5  # the scheduler, and each of four workers
    assert {address for address, _ in found} == {"127.0.0.1"}


@pytest.fixture
def guarded() -> Iterator[tuple[LocalCluster, Security]]:
    """A cluster whose parties show each other their keys."""
    certificate, key = str(KEYS / "cert.pem"), str(KEYS / "key.pem")
    security = Security(
        require_encryption=True, tls_ca_file=certificate, tls_client_cert=certificate, tls_client_key=key,
        tls_worker_cert=certificate, tls_worker_key=key, tls_scheduler_cert=certificate, tls_scheduler_key=key,
    )  # fmt: skip
    with LocalCluster(
        n_workers=2, threads_per_worker=1, protocol="tls://", host="127.0.0.1", security=security,
        dashboard_address=None, silence_logs=50,
    ) as cluster:  # fmt: skip
        yield cluster, security


def test_a_cluster_with_tls_trains_whoever_has_the_keys(guarded: tuple[LocalCluster, Security]) -> None:
    cluster, security = guarded
    assert cluster.scheduler_address.startswith("tls://")
    with pytest.raises(ConnectError, match="No Dask scheduler answers"):
        pk.connect(cluster.scheduler_address, timeout=3)
    with pk.connect(cluster.scheduler_address, security=security) as workers:
        digits = pk.datasets.digits()
        run = pk.train(small_net(), digits.train, on=workers, workers=2, steps=12)
        assert run.wait(30, progress=False).status == "finished"
        assert pk.evaluate(run.model, digits.test, on=workers).samples == 360
