"""Segments: memory that several processes of one host map, and that nobody has to clean up.

On Linux a segment has no name. It is a file that nothing but open descriptors and mappings keeps (memfd_create(2)),
which the others open through /proc/<pid>/fd. So nothing of it can stay when the last process that maps it has gone,
however that ended, and the size of /dev/shm, which containers keep small, does not matter. Elsewhere it is a file in a
folder for temporary ones, whose name lives from `create` until `hide`; whoever owns the folder removes it if all die
in between.

Python's multiprocessing.shared_memory is left alone: its tracker is one more process, and it removes what others use.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parakit.errors import RunError

__all__ = ["LINE", "CannotShare", "SharedMemory", "SharedMemoryKey"]

#: Bytes. Two cache lines, because processors fetch them in pairs: what two members write is at least so far apart.
LINE = 128
_NAME_BYTES = 16
_PAGE = 4096
_LARGE_BYTES = 1 << 22  # bytes from which large pages are asked for; they are of 2 MiB each
_FILL_BYTES = 1 << 20
_PROC = "/proc/"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class CannotShare(RunError):
    """The members have no memory in common: other hosts, users or containers, or too little of it."""


class SharedMemoryKey(NamedTuple):
    """By what another process of the same machine and user maps a segment.

    The name is random and stands in the segment too: the numbers of a process and of a descriptor may mean another
    file in another container, or by now.
    """

    machine: str
    path: str
    name: str
    nbytes: int

    def note(self) -> bytes:
        """As bytes."""
        return json.dumps(self).encode()

    @classmethod
    def of_note(cls, note: bytes) -> SharedMemoryKey:
        """What `note` made bytes of."""
        machine, path, name, nbytes = json.loads(note)
        return cls(str(machine), str(path), str(name), int(nbytes))

    def remove(self) -> None:
        """Remove the file's name, if it has one on this machine; what is mapped stays."""
        if self.machine == _machine() and not self.path.startswith(_PROC):
            Path(self.path).unlink(missing_ok=True)


class SharedMemory:
    """A mapping of shared memory, whose first `LINE` bytes are its title.

    It is unmapped when the last tensor and the last view of it have gone: never under somebody's feet.

    Parameters
    ----------
    descriptor : int
        Of a file of the key's length; not closed here.
    key : SharedMemoryKey
    private : bool
        See `attach`.
    """

    def __init__(self, descriptor: int, key: SharedMemoryKey, *, private: bool = False) -> None:
        # A private mapping shows what is there, and keeps what is written to it for this process: page by page.
        self._memory = mmap.mmap(descriptor, key.nbytes, access=mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE)
        self.key = key
        self._descriptor = -1
        if not private and key.nbytes >= _LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._typed: dict[torch.dtype, Tensor] = {}

    @classmethod
    def create(cls, nbytes: int, folder: Path | None = None, *, named: bool | None = None) -> SharedMemory:
        """New memory, all zero, which others can attach until `hide` is called.

        Parameters
        ----------
        nbytes : int
            Rounded up to pages.
        folder : Path, optional
            For its file, where it needs a name; the folder of temporary files if not given.
        named : bool, optional
            Whether it gets a name. It does only where the system cannot do without, unless this is given.

        Raises
        ------
        CannotShare
            If the system refuses it.
        """
        nbytes = -(-nbytes // _PAGE) * _PAGE
        named = named if named is not None else not hasattr(os, "memfd_create")
        try:
            segment = _named(nbytes, folder) if named else _nameless(nbytes)
        except OSError as error:
            raise CannotShare(f"The system refused {nbytes / 1e6:.1f} MB of shared memory: {error}") from error
        segment._memory[:_NAME_BYTES] = bytes.fromhex(segment.key.name)
        return segment

    @classmethod
    def attach(cls, key: SharedMemoryKey, *, private: bool = False) -> SharedMemory:
        """Another process's segment, or one of this process once more.

        Parameters
        ----------
        key : SharedMemoryKey
        private : bool
            Whether what is written to it is to be seen by nobody else. Pages that are only read take no more memory.

        Raises
        ------
        CannotShare
            If it is out of reach.
        """
        if key.machine != _machine():
            raise CannotShare("The workers are on different machines.")
        try:
            descriptor = os.open(key.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                right = os.fstat(descriptor).st_size == key.nbytes
                segment = cls(descriptor, key, private=private) if right else None
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CannotShare(
                f"The segment cannot be opened: {error}",
                cause="the workers run in different containers, or as different users",
            ) from error
        if segment is None or segment._memory[:_NAME_BYTES] != bytes.fromhex(key.name):
            raise CannotShare(
                f"{key.path} is not the segment that was announced.",
                cause="the workers run in different containers, or the one that made it has died",
            )
        return segment

    def hide(self) -> None:
        """Let nobody attach any more: what is attached stays, and nothing is left to be cleaned up."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
            self.key.remove()

    def leave_open(self) -> int:
        """The descriptor by which others attach, to be closed by whoever asked: `hide` does nothing any more."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    @property
    def address(self) -> int:
        """Where it begins in this process."""
        return self._bytes.data_ptr()

    def words(self) -> memoryview:
        """All of it as unsigned numbers of 8 bytes; storing one is one move of the processor."""
        return memoryview(self._memory).cast("Q")

    def storage(self, first: int, nbytes: int) -> Tensor:
        """A part of it as bytes, in a storage of their own: what copies or saves that takes nothing else along."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=first, count=nbytes)

    def tensor(self, first: int, numel: int, dtype: torch.dtype) -> Tensor:
        """A part of it as a vector.

        Parameters
        ----------
        first : int
            Offset in bytes, a multiple of the size of an element.
        numel : int
        dtype : torch.dtype
        """
        whole = self._typed.get(dtype)
        if whole is None:
            whole = self._typed[dtype] = self._bytes.view(dtype)
        start = first // dtype.itemsize
        return whole[start : start + numel]


def _nameless(nbytes: int) -> SharedMemory:
    descriptor = os.memfd_create("parakit-shared", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, nbytes)
        return _announced(descriptor, f"{_PROC}{os.getpid()}/fd/{descriptor}", nbytes)
    except OSError:
        os.close(descriptor)
        raise


def _named(nbytes: int, folder: Path | None) -> SharedMemory:
    descriptor, path = tempfile.mkstemp(prefix="parakit-shared-", dir=folder)
    try:
        _fill(descriptor, nbytes)
        return _announced(descriptor, path, nbytes)
    except OSError:
        os.close(descriptor)
        Path(path).unlink(missing_ok=True)
        raise


def _announced(descriptor: int, path: str, nbytes: int) -> SharedMemory:
    segment = SharedMemory(descriptor, SharedMemoryKey(_machine(), path, os.urandom(_NAME_BYTES).hex(), nbytes))
    segment._descriptor = descriptor
    return segment


def _fill(descriptor: int, nbytes: int) -> None:
    """Take the room now: a disk that is full later would end the process that writes to the mapping."""
    zeros = memoryview(bytes(_FILL_BYTES))
    left = nbytes
    while left:
        left -= os.write(descriptor, zeros[:left])


def _machine() -> str:
    """The same for processes that may have memory in common."""
    return _BOOT.read_text().strip() if _BOOT.exists() else platform.node()
