"""What a worker is asked before it may train: whether it has torch and parakit, and in which versions."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["surveyor", "what_is_lacking"]


def surveyor() -> Callable[[], dict[str, Any]]:
    """A function that runs also where parakit is missing: being local, it travels by value."""

    def survey() -> dict[str, Any]:
        import os
        import platform

        from dask.system import cpu_count

        facts: dict[str, Any] = {"host": platform.node(), "cores": cpu_count(), "pid": os.getpid()}
        facts["python"] = ".".join(platform.python_version_tuple()[:2])
        for package in ("torch", "parakit"):
            try:
                facts[package] = version(package).split("+")[0]
            except PackageNotFoundError:
                facts[package] = None
        return facts

    return survey


def what_is_lacking(facts: dict[str, Any], ours: dict[str, Any]) -> str:
    """What a worker lacks, in words; nothing if it can train."""
    for package in ("torch", "parakit"):
        if facts[package] is None:
            return f"has no {package}"
    if facts["python"] != ours["python"]:
        return f"runs Python {facts['python']}, this notebook runs {ours['python']}"
    for package in ("torch", "parakit"):
        if facts[package].split(".")[:2] != ours[package].split(".")[:2]:
            return f"has {package} {facts[package]}, this notebook has {ours[package]}"
    return ""
