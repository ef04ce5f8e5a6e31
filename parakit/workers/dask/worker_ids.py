"""Addresses of Dask workers, what they say of the host, and names of the processes that had one after the other.

A cluster whose workers listen on fixed ports starts the next process where the last one died, and where ports are free
to choose, one comes round again now and then. What is known of the dead one is not true of it: it holds no chunks, has
not been looked at, and is in no group. So the second process at an address has another name than the first.
"""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Incarnations", "address_of", "host_of", "is_here"]

_HERE = ("127.0.0.1", "::1", "localhost")
_LIFE = "#"


class Incarnations:
    """The processes that were seen at each address, told apart by the folders that Dask makes for them."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[Any, int]] = {}  # by address, the numbers of the processes there by their folders
        self._lock = threading.Lock()

    def name(self, address: str, folder: Any) -> str:
        """The name of a process seen at an address: the address itself for the first one there."""
        with self._lock:  # threads may look at once, and what one saw may be older than what another did
            numbers = self._seen.setdefault(address, {})
            number = numbers.setdefault(folder, len(numbers) + 1)
        return address if number == 1 else f"{address}{_LIFE}{number}"


def address_of(name: str) -> str:
    """The address at which the process of a name was seen."""
    return name.split(_LIFE)[0]


def host_of(name: str) -> str:
    """The host part of a worker's address, such as 10.0.0.7 of tcp://10.0.0.7:40001."""
    return address_of(name).split("://")[-1].rsplit(":", 1)[0].strip("[]")


def is_here(host: str) -> bool:
    """Whether that is this machine, for whoever asks."""
    return host in _HERE
