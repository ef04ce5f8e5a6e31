"""Networks and machines by name: what a what-if is priced with when nothing was measured.

Line rates are those of the standards and data sheets named; latencies are of a message between two processes. They are
round figures to think with, and each says where it comes from. What was measured on one's own machines is better:
`CostModel.from_history`.

References
----------
NCCL, src/graph/tuning.cc, table hwLat: microseconds of a step of a ring: 1.9 over NVLink and 4.0 over a network with
the protocol LL128, 5.7 over PCI with the protocol Simple (LL128 is for NVLink alone). Linux, commit f946e45f59ef:
lanes of NDR signal at 100 Gbit/s; Open MPI, pull request 4946: lanes of HDR at 50 Gbit/s. Gigabit and 10-gigabit
Ethernet through the kernel: 40 to 300 µs (Aspen Systems, glossary, "Low latency"); the lower end, as nothing else is
on the wire here. McCann: "Understanding Wi-Fi speed and how 6 GHz compares" (2021): 1,200 Mbit/s for two streams on
80 MHz.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from parakit.costs.collectives import Link
from parakit.errors import InputError

__all__ = ["MACHINES", "NETWORKS", "Machine", "Network", "find_machine", "find_network"]


@dataclass(frozen=True)
class Network:
    """What connects workers.

    Parameters
    ----------
    name : str
    latency_seconds : float
        Of a message, whatever its length.
    bytes_per_second : float
        In one direction, between two workers.
    source : str
        Where the figures come from.
    shared_bytes_per_second : float, optional
        What all workers together can pass through it, where that is limited; such as the memory of a host.
    """

    name: str
    latency_seconds: float
    bytes_per_second: float
    source: str
    shared_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.latency_seconds < float("inf") or not self.bytes_per_second > 0:
            raise InputError(
                f"Network {self.name!r} has a latency of {self.latency_seconds!r} s and a bandwidth of "
                f"{self.bytes_per_second!r} bytes a second; the one must be at least 0, the other above 0."
            )

    @property
    def link(self) -> Link:
        """The network as the formulas of an exchange take it."""
        shared = 0.0 if self.shared_bytes_per_second is None else 1 / self.shared_bytes_per_second
        return Link(self.latency_seconds, 1 / self.bytes_per_second, 0.0, shared)

    def sped_up(self, times: float) -> Network:
        """A network that is so many times as fast, in latency and bandwidth."""
        shared = self.shared_bytes_per_second
        return Network(
            f"{self.name}, {times:g} times as fast", self.latency_seconds / times, self.bytes_per_second * times,
            self.source, None if shared is None else shared * times,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.name} ({_short_seconds(self.latency_seconds)}, {_short_rate(self.bytes_per_second)})"


@dataclass(frozen=True)
class Machine:
    """A node of a cluster.

    Parameters
    ----------
    name : str
    cores : int
        Workers that it can keep busy, one thread or one GPU each.
    within : str
        Name of the network between the workers of a node.
    between : str
        Name of the network between nodes.
    ports : int
        Network ports of a node, which its workers share.
    source : str
    relative_speed : float
        Of one of its cores, as a multiple of the one that was calibrated; 1 where nobody measured it.
    """

    name: str
    cores: int
    within: str
    between: str
    ports: int
    source: str
    relative_speed: float = 1.0


_TCP = "; latency assumed: TCP within a quiet rack, through the kernel, at the lower end of what is published"
_RATE = 1448 / 1538  # of a line rate that TCP gets: a frame of 1,500 bytes holds 1,448, and takes 1,538 on the wire
_RING = "; latency: a step of NCCL's ring, by its own model (LL128)"

#: Networks by name.
NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        network.name: network
        for network in (
            Network("loopback", 460e-6, 1.06e9,
                    "measured here: gloo, two processes of one host with two cores, 2.8 ms for 2 MB, 16 ms for 16 MB"),
            Network("shared memory", 20e-6, 2.7e9,
                    "measured here: two processes of one host with two cores, 6.0 ms for 16 MB; barrier assumed"),
            Network("Wi-Fi 6", 3e-3, 75e6, "assumed: half of the 1,200 Mbit/s of a link of two streams on 80 MHz, "
                    "and 3 ms, near the access point"),
            Network("1GbE", 50e-6, _RATE * 0.125e9, "line rate: IEEE 802.3ab" + _TCP),
            Network("10GbE", 30e-6, _RATE * 1.25e9, "line rate: IEEE 802.3ae" + _TCP),
            Network("25GbE", 25e-6, _RATE * 3.125e9, "line rate: IEEE 802.3by" + _TCP),
            Network("100GbE", 20e-6, _RATE * 12.5e9, "line rate: IEEE 802.3ba" + _TCP),
            Network("InfiniBand HDR", 4e-6, 25e9,
                    "line rate: 200 Gbit/s, four lanes of 50 Gbit/s" + _RING),
            Network("InfiniBand NDR", 4e-6, 50e9,
                    "line rate: 400 Gbit/s, four lanes of 100 Gbit/s" + _RING),
            Network("PCIe 4", 5.7e-6, 24e9, "line rate: PCI Express 4.0, 16 lanes of 16 GT/s, 31.5 GB/s, of which "
                    "three quarters; latency: a step of NCCL's ring, by its own model (Simple)"),
            Network("NVLink 3", 1.9e-6, 300e9,
                    "NVIDIA A100 data sheet: 600 GB/s, both directions: 12 links of 25 GB/s in each" + _RING),
            Network("NVLink 4", 1.9e-6, 450e9,
                    "NVIDIA H100 data sheet: 900 GB/s, both directions: 18 links of 25 GB/s in each" + _RING),
        )
    }
)  # fmt: skip

_SAME = "an ordinary size; cores as fast as the calibrated one"
_GPUS = "; calibrate on one of its GPUs, no speed is assumed"
#: Machines by name.
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            Machine("laptop, 4 cores", 4, "shared memory", "Wi-Fi 6", 1, _SAME),
            Machine("server, 16 cores", 16, "shared memory", "10GbE", 1, _SAME),
            Machine("server, 64 cores", 64, "shared memory", "25GbE", 1, _SAME),
            Machine("DGX A100", 8, "NVLink 3", "InfiniBand HDR", 8, "NVIDIA DGX A100 data sheet" + _GPUS),
            Machine("DGX H100", 8, "NVLink 4", "InfiniBand NDR", 8, "NVIDIA DGX H100 data sheet" + _GPUS),
        )
    }
)

#: Shorter names for some.
_ALSO = {"nvlink": "NVLink 4", "infiniband": "InfiniBand HDR", "wifi": "Wi-Fi 6", "gloo": "loopback"}
_T = TypeVar("_T")


def find_network(network: Any) -> Network:
    """The network of a name, whatever its case; a `Network` is returned as it is.

    Raises
    ------
    InputError
        If there is none of this name; the message lists them.
    """
    return network if isinstance(network, Network) else _find("network", NETWORKS, network)


def find_machine(machine: Any) -> Machine:
    """The machine of a name, whatever its case; a `Machine` is returned as it is.

    Raises
    ------
    InputError
        If there is none of this name; the message lists them.
    """
    return machine if isinstance(machine, Machine) else _find("machine", MACHINES, machine)


def _find(what: str, known: Mapping[str, _T], name: Any) -> _T:
    wanted = _plain(name) if isinstance(name, str) else ""
    wanted = _plain(_ALSO.get(wanted, wanted))
    for candidate, found in known.items():
        if _plain(candidate) == wanted:
            return found
    raise InputError(
        f"There is no {what} {name!r}.",
        remedy=f"choose one of {', '.join(map(repr, known))}; or make one: {what.capitalize()}(...)",
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _short_seconds(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def _short_rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.3g} MB/s"
