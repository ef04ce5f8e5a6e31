"""What this machine lets a process use: cores, memory that was freed, and the one interpreter lock of its threads."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
from dask.system import cpu_count

__all__ = ["free_memory", "usable_cores"]

# Of control groups, version 2 and 1: what they may use, and use.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def usable_cores() -> int:
    """Cores that this process may use: the machine's, less what affinity and control groups withhold."""
    return int(cpu_count())


def free_memory() -> int:
    """Bytes that this machine, or the control group of this process, has left."""
    left = int(psutil.virtual_memory().available)
    for limit, used in _GROUPS:
        with suppress(OSError, ValueError):
            left = min(left, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, left)
