"""The reaper: whatever ends the owner of a local pool, and whenever, nothing of the pool stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import parakit as pk
from parakit.workers.dask import reaper
from parakit.workers.dask.reaper import Reaper

pytestmark = pytest.mark.dask
GONE_SECONDS = 8.0
START_SECONDS = 100.0

OWNER = """
import json, os, re, signal, sys, threading, time
import psutil
import parakit as pk

def tell(**facts):
    print(json.dumps(facts), flush=True)

def family():
    return [child.pid for child in psutil.Process().children(recursive=True)
            if "resource_tracker" not in " ".join(child.cmdline())]

def stick(seconds):
    # Holds the interpreter's lock, so that not even another thread can end the process.
    re.match("(a+)+$", "a" * 60 + "b")

if __name__ == "__main__":
    manner = sys.argv[1]
    tell(pid=os.getpid())
    try:
        workers = pk.connect(2)
    except KeyboardInterrupt:
        tell(left=family(), threads=[thread.name for thread in threading.enumerate()])
        time.sleep(600)
    client = workers.client
    tell(workers=list(client.run(os.getpid).values()))
    if manner == "stuck":
        stuck = client.submit(stick, 600, pure=False)
        while not any(client.processing().values()):
            time.sleep(0.1)
        time.sleep(1)
        tell(stuck=True)
    if manner == "close":
        sys.stdin.readline()
        workers.close()
        tell(left=family())
    time.sleep(600)
"""


@dataclass
class Owner:
    """A process that has a pool, and what that pool consists of."""

    process: subprocess.Popen[str]
    folder: Path
    seen: list[psutil.Process] = field(default_factory=list)

    def told(self, fact: str) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the owner ended"
        return json.loads(line)[fact]

    def family(self) -> list[psutil.Process]:
        """All processes that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self, other_than: Sequence[int] = ()) -> psutil.Process:
        """A process of the pool, as soon as there is one."""

        def newest() -> psutil.Process | None:
            return next((p for p in self.family() if self._is_worker(p) and p.pid not in other_than), None)

        return self.wait_for(newest)

    def _is_worker(self, process: psutil.Process) -> bool:
        if _runs(process, "spawn_main"):
            return True
        with contextlib.suppress(psutil.Error):  # one that is forked bears its parent's name
            return _runs(process, "forkserver") and process.ppid() != self.process.pid
        return False

    def reaper(self) -> psutil.Process:
        """Its reaper, as soon as there is one."""
        return self.wait_for(lambda: next((p for p in self.family() if _runs(p, "reaper.py")), None))

    def wait_for(self, found: Callable[[], Any], seconds: float = START_SECONDS) -> Any:
        """What is found, once it is."""
        deadline = time.monotonic() + seconds
        while not (thing := found()):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.01)
        return thing

    def traces(self) -> Callable[[], dict[str, list[Any]]]:
        """A function that says what is left, later, of all that there is now."""
        family = self.seen = self.family()
        everybody = [psutil.Process(self.process.pid), *family]
        ports = {c.laddr.port for p in everybody for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        shared = set().union(*(_shared(p.pid) for p in everybody))
        folders = {Path(p.cmdline()[-1]) for p in family if _runs(p, "reaper.py")}

        def left() -> dict[str, list[Any]]:
            found = {
                "processes": [p.pid for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE],
                "folders": [path for name in ("parakit", "dask", "pymp") for path in self.folder.glob(f"{name}*")]
                + [path for path in folders if path.exists()],
                "ports": [
                    c.laddr.port
                    for c in psutil.net_connections("tcp")
                    if c.status == psutil.CONN_LISTEN and c.laddr.port in ports
                ],
                "shared memory": [name for name, inode in _names() if inode in shared],
            }
            return {kind: things for kind, things in found.items() if things}

        return left


def _runs(process: psutil.Process, what: str) -> bool:
    try:
        return what in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _shared(pid: int) -> set[int]:
    maps = Path(f"/proc/{pid}/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {int(line.split()[4]) for line in lines if "/dev/shm/" in line}


def _names() -> Iterator[tuple[str, int]]:
    folder = Path("/dev/shm")
    for entry in os.scandir(folder) if folder.is_dir() else ():
        try:
            yield entry.name, entry.stat().st_ino
        except OSError:
            continue


def gone(left: Callable[[], dict[str, list[Any]]], seconds: float = GONE_SECONDS) -> None:
    """Wait until nothing is left; fails if that takes too long."""
    deadline = time.monotonic() + seconds
    while found := left():
        assert time.monotonic() < deadline, f"left behind: {found}"
        time.sleep(0.05)


@pytest.fixture
def owner(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Owner]:
    """A process that starts a pool of two."""
    (tmp_path / "temp").mkdir()
    (tmp_path / "owner.py").write_text(OWNER)
    with subprocess.Popen(
        [sys.executable, tmp_path / "owner.py", getattr(request, "param", "")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temp")}, start_new_session=True,
    ) as process:  # fmt: skip
        started = Owner(process, tmp_path / "temp")
        try:
            assert started.told("pid") == process.pid
            yield started
        finally:
            if process.poll() is None:
                started.traces()
                process.kill()
                process.wait(10)
            _, survivors = psutil.wait_procs(started.seen, timeout=GONE_SECONDS)
            for survivor in survivors:
                if _runs(survivor, "spawn_main") or _runs(survivor, "forkserver"):
                    survivor.kill()


ENDS: dict[str, Callable[[int], None]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "its group interrupted": lambda pid: os.killpg(pid, signal.SIGINT),
    # How Jupyter restarts a kernel that does not answer: multiprocessing's own tracker dies with it.
    "its group killed": lambda pid: os.killpg(pid, signal.SIGKILL),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_nothing_stays_when_the_owner_is(end: str, owner: Owner) -> None:
    owner.told("workers")
    left = owner.traces()
    assert set(left()) >= {"processes", "folders", "ports"}
    ENDS[end](owner.process.pid)
    owner.process.wait(GONE_SECONDS)
    gone(left)


@pytest.mark.slow
def test_nothing_stays_of_a_stopped_worker(owner: Owner) -> None:
    os.kill(owner.told("workers")[0], signal.SIGSTOP)
    left = owner.traces()
    owner.process.kill()
    gone(left)


@pytest.mark.slow
def test_nothing_stays_of_a_worker_that_replaced_another(owner: Owner) -> None:
    workers = owner.told("workers")
    os.kill(workers[0], signal.SIGKILL)
    owner.worker(other_than=workers).suspend()
    time.sleep(0.5)
    left = owner.traces()
    owner.process.kill()
    gone(left)


@pytest.mark.slow
@pytest.mark.parametrize("owner", ["stuck"], indirect=True)
def test_nothing_stays_of_a_worker_stuck_in_code(owner: Owner) -> None:
    owner.told("workers")
    owner.told("stuck")
    left = owner.traces()
    owner.process.kill()
    gone(left)


@pytest.mark.slow
def test_nothing_stays_of_a_pool_that_starts(owner: Owner) -> None:
    owner.worker()
    time.sleep(0.5)
    left = owner.traces()
    owner.process.kill()
    gone(left)


def test_nothing_stays_of_a_pool_without_a_worker_yet(owner: Owner) -> None:
    owner.reaper()
    left = owner.traces()
    owner.process.kill()
    gone(left)


@pytest.mark.slow
def test_nothing_stays_of_a_worker_that_is_stopped_as_it_starts(owner: Owner) -> None:
    worker = owner.worker()
    worker.suspend()
    time.sleep(0.5)
    left = owner.traces()
    owner.process.kill()
    gone(left)


@pytest.mark.slow
@pytest.mark.parametrize("until", ["early", "imports", "worker"])
def test_an_interrupt_while_the_pool_starts_leaves_an_owner_without_one(until: str, owner: Owner) -> None:
    owner.reaper()
    if until == "imports":
        time.sleep(1.0)
    started = owner.worker() if until == "worker" else None
    if started is not None:  # or the pool might be there before all its traces are found
        started.suspend()
    left = owner.traces()
    if started is not None:
        started.resume()
    os.kill(owner.process.pid, signal.SIGINT)
    assert owner.told("left") == []  # not even a zombie
    # The tracker belongs to multiprocessing and lives as long as the owner.
    family = {p.pid for p in owner.family()}
    assert not {kind: set(things) - family for kind, things in left().items() if set(things) - family}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["", "stopped"])
@pytest.mark.parametrize("owner", ["close"], indirect=True)
def test_a_pool_that_is_closed_takes_its_reaper_along(owner: Owner, stopped: bool) -> None:
    workers = owner.told("workers")
    left = owner.traces()
    if stopped:
        os.kill(workers[0], signal.SIGSTOP)
    assert owner.process.stdin is not None
    owner.process.stdin.write("\n")
    owner.process.stdin.flush()
    assert owner.told("left") == []  # not even a zombie
    family = {p.pid for p in owner.family()}
    assert not {kind: set(things) - family for kind, things in left().items() if set(things) - family}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only /proc shows what a process has open")
def test_the_workers_do_not_hold_the_pipe(pool: pk.Workers) -> None:
    reapers = [child for child in psutil.Process().children() if _runs(child, "reaper.py")]
    pipes = {Path(f"/proc/{child.pid}/fd/0").readlink() for child in reapers}
    assert pipes & _open(os.getpid())
    for pid in pool.client.run(os.getpid).values():  # type: ignore[attr-defined]
        assert not pipes & _open(pid)


def _open(pid: int) -> set[Path]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(path.readlink())
    return found


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that does nothing, and a child of it; the number of the latter can be read."""
    command = "sleep 60 & echo $!; wait"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_reaper_ends_only_what_it_was_told_of_and_what_was_its_owners(
    nothing_left: None, child: subprocess.Popen[str]
) -> None:
    assert child.stdout is not None
    grandchild = psutil.Process(int(child.stdout.readline()))
    with subprocess.Popen(["sleep", "60"]) as stopped:
        hold = Reaper()
        os.kill(stopped.pid, signal.SIGSTOP)
        hold.watch(stopped.pid)
        hold.watch(grandchild.pid)
        began = time.monotonic()
        hold.close()
        assert time.monotonic() - began < 4
        assert stopped.wait(5) == -signal.SIGKILL
    assert child.poll() is None
    assert grandchild.is_running()
    assert not hold.folder.exists()
    hold.close()  # twice does nothing


def test_the_folder_goes_although_somebody_killed_the_reaper(nothing_left: None) -> None:
    hold = Reaper()
    assert hold.folder.stat().st_mode & 0o777 == 0o700
    (hold.folder / "file").touch()
    hold._process.kill()
    hold._process.wait(5)
    hold.watch(os.getpid())
    hold.close()
    assert not hold.folder.exists()


def test_a_process_that_forked_from_the_owner_does_not_keep_the_reaper(nothing_left: None) -> None:
    hold = Reaper()
    pipe = hold._pipe.fileno()
    with subprocess.Popen(["sleep", "60"], pass_fds=[pipe]) as holder:
        began = time.monotonic()
        hold.close()
        assert time.monotonic() - began < 3
        assert holder.poll() is None
        holder.kill()


FORKS = """
import os, time
from parakit.workers.dask.reaper import Reaper

hold = Reaper()
if os.fork():
    print(hold.folder, flush=True)
time.sleep(60)
"""


def test_the_owner_is_missed_although_a_process_that_forked_from_it_lives() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            folder = Path(process.stdout.readline().strip())
            children = psutil.Process(process.pid).children()
            hold, forked = sorted(children, key=lambda child: not _runs(child, "reaper.py"))
            assert folder.is_dir()
            process.kill()
            psutil.wait_procs([hold], timeout=GONE_SECONDS)
            assert not hold.is_running()
            assert forked.is_running()
            assert not folder.exists()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_ps_serves_where_there_is_no_proc(child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "_PROC", Path("/nowhere"))
    life = reaper._life(child.pid)
    assert life is not None
    assert life[0] == os.getpid()
    assert reaper._life(child.pid) == life
    assert len(life[1].split()) == 5  # a date
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(5)
    assert reaper._life(child.pid) is None
    assert reaper._mapped_semaphores() == set()
