"""The numbers that a training step costs, and what they can be; refuses to know where they came from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from parakit.costs.collectives import find_algorithm
from parakit.costs.networks import NETWORKS, Network, find_machine, find_network
from parakit.costs.order_statistics import check_probability
from parakit.errors import InputError

__all__ = ["CostNumbers"]

_SHARED = "shared memory"
_ON_ONE_HOST = (_SHARED, "loopback")  # networks
_STRATEGIES = ("all-reduce", "parameter server", "local SGD")


@dataclass(frozen=True, kw_only=True)
class CostNumbers:
    """The parameters of a `parakit.costs.model.CostModel`, which says what each is."""

    sample_seconds: float
    batch_size: int
    nbytes: float
    fixed_seconds: float = 0.0
    contention: float = 0.0
    update_seconds: float = 0.0
    divided_update: bool = False
    control_seconds: float = 0.0
    spread: float = 0.0
    stragglers: float = 0.0
    straggler_times: float = 3.0
    phases: tuple[float, float, float] = (0.0, 1 / 3, 2 / 3)
    network: Network = NETWORKS["loopback"]
    algorithm: str = "ring"
    workers_per_node: int | None = None
    within: Network | None = None
    ports: int | None = None
    cores: int | None = None
    threads: int = 1
    relative_speed: float = 1.0
    buckets: int = 1
    weak: bool = False
    strategy: str = "all-reduce"
    servers: int = 1
    local_steps: int = 1
    task_seconds: float = 1e-3
    simulated: bool = False
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", find_network(self.network))
        object.__setattr__(self, "algorithm", find_algorithm(self.algorithm))
        if self.within is not None:
            object.__setattr__(self, "within", find_network(self.within))
        _check_numbers(self)

    def with_(self, **changes: Any) -> Self:
        """What if: the same model, but for some changes.

        Parameters
        ----------
        **changes
            Any of the parameters, such as network="10GbE", batch_size=1024, stragglers=0.0; and machine="server, 16
            cores", which sets the workers of a node, its cores, ports, speed and networks. Workers that shared memory
            use a ring on a network that is named, and each updates everything, unless an algorithm or nodes are given.

        Raises
        ------
        InputError
            If there is no such parameter, or a value cannot be.
        """
        machine = changes.pop("machine", None)
        if machine is not None:
            changes = _of_machine(machine) | changes
        known = [part.name for part in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise InputError(
                f"A cost model has no {', '.join(unknown)}.", remedy=f"change any of {', '.join([*known, 'machine'])}"
            )
        changed = dataclasses.replace(self, **changes)
        apart = isinstance(changes.get("network"), str) and changed.network.name not in _ON_ONE_HOST
        if apart and changed.algorithm == _SHARED and "algorithm" not in changes and changed.workers_per_node is None:
            return dataclasses.replace(changed, algorithm="ring", divided_update=False)
        return changed


def _of_machine(machine: Any) -> dict[str, Any]:
    """What a machine means for the numbers of a cost model."""
    node = find_machine(machine)
    return {
        "workers_per_node": node.cores, "cores": node.cores, "ports": node.ports, "threads": 1,
        "relative_speed": node.relative_speed, "within": node.within, "network": node.between,
    }  # fmt: skip


_AT_LEAST_0 = (
    "sample_seconds", "fixed_seconds", "contention", "update_seconds", "control_seconds", "spread", "nbytes",
    "task_seconds",
)  # fmt: skip
_ABOVE_0 = ("relative_speed",)
_WHOLE = ("batch_size", "buckets", "servers", "local_steps", "threads")
_WHOLE_OR_NONE = ("workers_per_node", "cores", "ports")


def _check_numbers(numbers: CostNumbers) -> None:
    for name in (*_AT_LEAST_0, *_ABOVE_0):
        value = getattr(numbers, name)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 <= value < float("inf") or (name in _ABOVE_0 and value == 0):
            least = "above 0" if name in _ABOVE_0 else "of at least 0"
            raise InputError(f"{name} of a cost model is {value!r}; it must be a finite number {least}.")
    for name in (*_WHOLE, *_WHOLE_OR_NONE):
        value = getattr(numbers, name)
        if value is None and name in _WHOLE_OR_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} of a cost model is {value!r}; it must be a whole number of at least 1.")
    if numbers.sample_seconds + numbers.fixed_seconds == 0:
        raise InputError("A cost model computes in no time: sample_seconds and fixed_seconds are both 0.")
    check_probability("stragglers", numbers.stragglers)
    if not numbers.straggler_times >= 1:
        raise InputError(f"straggler_times is {numbers.straggler_times!r}; stragglers take at least 1 time as long.")
    if numbers.strategy not in _STRATEGIES:
        raise InputError(
            f"There is no strategy {numbers.strategy!r} to price.", remedy=f"one of {', '.join(_STRATEGIES)}"
        )
    if len(numbers.phases) != 3 or min(numbers.phases) < 0 or abs(sum(numbers.phases) - 1) > 1e-6:
        raise InputError(f"phases is {numbers.phases!r}; the shares of data, forward and backward must add up to 1.")
