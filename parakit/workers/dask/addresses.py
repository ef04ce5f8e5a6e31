"""Addresses of Dask workers, and what they say of the host."""

from __future__ import annotations

__all__ = ["host_of", "is_here"]

_HERE = ("127.0.0.1", "::1", "localhost")


def host_of(address: str) -> str:
    """The host part of a worker's address, such as 10.0.0.7 of tcp://10.0.0.7:40001."""
    return address.split("://")[-1].rsplit(":", 1)[0].strip("[]")


def is_here(host: str) -> bool:
    """Whether that is this machine, for whoever asks."""
    return host in _HERE
