"""What this machine lets a process use."""

from __future__ import annotations

from dask.system import cpu_count

__all__ = ["usable_cores"]


def usable_cores() -> int:
    """Cores that this process may use: the machine's, less what affinity and control groups withhold."""
    return int(cpu_count())
