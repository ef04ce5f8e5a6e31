"""The reaper of a local pool: a small process that outlives the notebook's, and clears up what it leaves.

Dask's workers end by themselves when their owner dies, unless they are stopped or sit in code that holds the
interpreter's lock; and nobody removes their folders, or the semaphores of a process group that was killed as a whole,
as Jupyter kills a kernel. The reaper is outside that group. It owns the pool's scratch folder, and knows the pool's
processes as the owner tells of them through a pipe. When the pipe ends, or the owner does, it waits a moment, kills
those that are left, removes what is left of the folder, and ends.

The owner imports this module; the reaper's process runs the same file as a script, which therefore imports nothing
but the standard library. It refuses to touch a process that was not the owner's child, or one's that forks for the
owner, or is not the one it was told of; and semaphores that the owner had before the pool. Where there is no /proc,
`ps` tells of processes, and semaphores are nowhere to be found. See signal(7) and multiprocessing's resource tracker,
whose work this completes.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

__all__ = ["Reaper"]

_GRACE_SECONDS = 1.0  # for processes that end by themselves, as Dask's do
_KILL_SECONDS = 3.0
_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.05
_CLOSE_SECONDS = _GRACE_SECONDS + _KILL_SECONDS + 1.0
_DONE = "done"
_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")


class Reaper:
    """The owner's hold on its reaper.

    Parameters
    ----------
    place : str, optional
        Where its folder is to be; where temporary files are, if it is not given.

    Attributes
    ----------
    folder : Path
        Private to the pool, and removed in the end.
    """

    def __init__(self, place: str | None = None) -> None:
        self.folder = Path(place or tempfile.gettempdir(), f"parakit-{os.urandom(8).hex()}")
        self._semaphores = _mapped_semaphores()
        # A session of its own keeps a terminal's and a kernel's signals away. Were the output not cut off, whoever
        # reads the owner's would wait for the reaper's end too. Python hands the pipe to no process that it starts.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd="/", start_new_session=True,
        )  # fmt: skip
        try:
            self.folder.mkdir(mode=0o700)  # only now, so that there is no moment at which nobody would remove it
        except BaseException:
            self.close()
            raise

    def watch(self, pid: int, *, forked_by: int | None = None) -> None:
        """Tell of a process of the pool, just started: a child of this one, or of a child of its that forks for it."""
        semaphores = _mapped_semaphores()
        fresh = semaphores - self._semaphores
        self._semaphores = semaphores
        self._tell(f"{pid} {forked_by or 0} {' '.join(map(str, fresh))}")

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        """Let the reaper do its work, and wait for its end."""
        self._tell(_DONE)  # the pipe need not end: whoever forked from the owner holds it too
        with contextlib.suppress(OSError):
            self._pipe.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)  # had somebody killed the reaper

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _tell(self, line: str) -> None:
        # The reaper may have been killed, or closed already: the pool works without it.
        with contextlib.suppress(OSError, ValueError):
            self._pipe.write(f"{line}\n".encode())
            self._pipe.flush()


def _mapped_semaphores() -> set[int]:
    """Inodes of the named semaphores that this process has open; it made them under other names."""
    try:
        lines = (_PROC / "self" / "maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split()[4]) for line in lines if f"{_SHARED_MEMORY}/sem." in line}


def _serve(owner: int, folder: Path) -> None:
    """What the reaper's process does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends soon after its owner, and not before
    births: dict[int, str] = {}
    semaphores: set[int] = set()
    done = False
    for line in _told(owner):
        if line == _DONE:
            done = True
            break
        pid, forker, *fresh = map(int, line.split())
        semaphores.update(fresh)
        life = _life(pid)
        elders = {owner, os.getppid()}  # who adopts the owner's orphans adopts the reaper
        if forker and (forkers := _life(forker)) is not None and forkers[0] in elders:
            elders.add(forker)
        if life is not None and life[0] in elders:
            births[pid] = life[1]
    _end(births)
    _within(_GRACE_SECONDS, lambda: _removed(folder))
    if not done:  # whoever dies closes the pipe a moment before it is gone
        _within(_GRACE_SECONDS, lambda: os.getppid() != owner)
    if os.getppid() != owner:
        # Their tracker removes them if it lives: it has been waiting for the last of these processes.
        _within(_GRACE_SECONDS, lambda: not _named(semaphores))
        for path in _named(semaphores):
            path.unlink(missing_ok=True)


def _told(owner: int) -> Iterator[str]:
    """Lines of the owner, until it closes the pipe, or dies."""
    text = ""
    while True:
        if select.select([0], [], [], _LOOK_SECONDS)[0]:
            more = os.read(0, 4096).decode()
            *lines, text = (text + more).split("\n")
            yield from lines
            if not more:
                return
        elif os.getppid() != owner:
            return


def _end(births: dict[int, str]) -> None:
    """Wait for processes to end, and kill those that do not."""

    def living() -> list[int]:
        # A number may have been given to another process since.
        return [pid for pid, birth in births.items() if (life := _life(pid)) is not None and life[1] == birth]

    _within(_GRACE_SECONDS, lambda: not living())
    for pid in living():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _within(_KILL_SECONDS, lambda: not living())


def _life(pid: int) -> tuple[int, str] | None:
    """Parent and time of birth of a process; None if it has ended."""
    if (_PROC / "self" / "stat").exists():
        try:
            told = (_PROC / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        # proc_pid_stat(5): the name, in parentheses, may contain anything; the time of birth is field 22.
        state, parent, *rest = told.rpartition(")")[2].split()
        rest = rest[17:18]
    else:
        command = ["ps", "-o", "state=,ppid=,lstart=", "-p", str(pid)]
        words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        if not words:
            return None
        state, parent, *rest = words
    return None if state[0] in "ZX" else (int(parent), " ".join(rest))


def _removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _named(inodes: set[int]) -> list[Path]:
    """Semaphores of multiprocessing that still have a name."""
    found = []
    for path in _SHARED_MEMORY.glob("sem.mp-*") if inodes else ():
        with contextlib.suppress(OSError):
            if path.stat().st_ino in inodes:
                found.append(path)
    return found


def _within(seconds: float, done: Callable[[], bool]) -> None:
    """Wait until something is so, but not for long."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))
