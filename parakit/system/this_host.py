"""What the host of a process is, in words: asked of workers, whose machine may be another one than the notebook's."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from parakit.system.cores import usable_cores

__all__ = ["cores_here", "host_here", "name_here"]


def cores_here(_: None = None) -> int:
    """Cores that this process may use."""
    return usable_cores()


def host_here(_: None = None) -> str:
    """What this host calls itself."""
    return platform.node()


def name_here(_: None = None) -> str:
    """The processor of this host, and how many of its cores this process may use."""
    return f"{_processor()}, {usable_cores()} core{'' if usable_cores() == 1 else 's'}"


def _processor() -> str:
    for line in _lines_of(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[-1].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _lines_of(path: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
