"""What every test relies on: nothing may be left behind, and a pool that tests share."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

import parakit as pk
from parakit.system.devices import DEVICES
from tests.members import Member, members

_SETTLE_SECONDS = 15.0
_SHARED_MEMORY = "shared-memory segments"
# One of a process, kept by the libraries themselves for as long as it lives.
_STANDING_THREADS = ("Dask-Callback-Thread", "Dask-Offload", "Profile", "TCP-Executor", "asyncio_", "pydevd")

# How fast a machine is, is no property of the code: every test has a time limit of its own.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
torch.set_num_threads(1)
pk.datasets.digits()  # scikit-learn's helpers make a few semaphores when they are first imported, and keep them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=DEVICES, default="cpu",
        help="where workers compute that tests share; cuda is for test_exact.py and test_gpu.py",
    )  # fmt: skip


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where workers that tests share compute."""
    return str(request.config.getoption("--device"))


def pytest_configure() -> None:
    # A job that a shell runs in the background ignores SIGINT, and so would all it starts; tests interrupt servers.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Members of a group are processes, whichever test asks them for something."""
    for item in items:
        if "team" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.processes)


def _threads() -> set[str]:
    return {
        f"{thread.name}#{thread.ident}"
        for thread in threading.enumerate()
        if not thread.name.startswith(_STANDING_THREADS)
    }


def _children() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            # The resource tracker belongs to multiprocessing and lives as long as this process.
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                found.add(child.pid)
        except psutil.Error:
            continue
    return found


def _listening() -> set[str]:
    return {
        f"{c.laddr.ip}:{c.laddr.port}" for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN
    }


def shared_memory() -> set[str]:
    """Names in shared memory, without those that only other people's processes use."""
    folder = Path("/dev/shm")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if not names:
        return set()
    users: dict[str, set[int]] = {name: set() for name in names}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name = line.partition("/dev/shm/")[2].removesuffix(" (deleted)")
            if name in users:
                users[name].add(int(maps.parent.name))
    own = {os.getpid(), *_children()}
    return {name for name, pids in users.items() if not pids or pids & own}


_KINDS: dict[str, Callable[[], set]] = {
    "threads": _threads,
    "processes": _children,
    "listening sockets": _listening,
    _SHARED_MEMORY: shared_memory,
}


def leftovers(before: dict[str, set], settle_seconds: float = _SETTLE_SECONDS) -> dict[str, set]:
    """What there is now, of the kinds given, that was not there before, once it has had time to go."""
    deadline = time.monotonic() + settle_seconds
    while True:
        gc.collect()
        left = {kind: _KINDS[kind]() - there for kind, there in before.items()}
        if not any(left.values()) or time.monotonic() > deadline:
            return {kind: things for kind, things in left.items() if things}
        time.sleep(0.1)


def left_in_shared_memory(before: set[str]) -> dict[str, set]:
    """The same, of names in shared memory alone."""
    return leftovers({_SHARED_MEMORY: before})


def standing() -> dict[str, set]:
    """What there is now."""
    return {kind: look() for kind, look in _KINDS.items()}


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test if it leaves a thread, process, socket or shared-memory segment behind."""
    before = standing()
    yield
    left = leftovers(before)
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def pool(device: str) -> Iterator[pk.Workers]:
    """Four warm local processes, shared by the tests that do not harm them."""
    before = standing()
    with pk.connect(4, device=device) as workers:
        yield workers
    left = leftovers(before)
    assert not left, f"the pool left behind: {left}"


@pytest.fixture
def inline(device: str) -> Iterator[pk.Workers]:
    """Virtual workers in this process."""
    with pk.connect("inline", device=device) as workers:
        yield workers


@pytest.fixture(autouse=True)
def small_chunk_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebook code under test runs in its small mode."""
    monkeypatch.setitem(os.environ, "PARAKIT_SMALL", "1")


@pytest.fixture(scope="module")
def team() -> Iterator[list[Member]]:
    with members(4) as four:
        yield four


@pytest.fixture
def boards(tmp_path: Path) -> Callable[[], str]:
    """Makes folders for boards."""
    numbers = itertools.count()

    def make() -> str:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return str(folder)

    return make
