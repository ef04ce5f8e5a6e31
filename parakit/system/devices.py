"""Devices: where a process computes, on cores or on one of the machine's GPUs.

Owns what differs between the two: which GPU is whose, the random numbers that a model draws there, and that a GPU's
work is only queued when a call returns. Refuses to know what is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from parakit.errors import InputError

__all__ = [
    "CPU",
    "DEVICES",
    "WHY_NO_GPU",
    "computing_on",
    "device_here",
    "finish",
    "generators_of",
    "give_back",
    "gpus_here",
    "own",
    "seed",
    "share_out",
    "use",
]

#: The device of whoever is told nothing else.
CPU = torch.device("cpu")

#: Where workers may compute.
DEVICES = ("cpu", "cuda")

#: Why a process may see no GPU, for errors.
WHY_NO_GPU = "torch's build for CPUs, no NVIDIA GPU in the machine, or CUDA_VISIBLE_DEVICES is empty"
_own_gpu = 0  # torch's number, in this process, of the GPU that it is to use


def gpus_here() -> tuple[str, ...]:
    """What identifies each GPU that this process can see, in torch's order."""
    if not torch.cuda.is_available():
        return ()
    return tuple(str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count()))


def share_out(seen: Mapping[str, Sequence[str]], taken: Mapping[str, str]) -> dict[str, str]:
    """Give each of some workers the GPU that the fewest have, of those that it sees; the first of equals.

    Parameters
    ----------
    seen : mapping of str to sequence of str
        By worker, the GPUs that it sees, at least one.
    taken : mapping of str to str
        By worker, what others have already.

    Returns
    -------
    dict
        The GPU of each worker in `seen`.
    """
    users = Counter(gpu for worker, gpu in taken.items() if worker not in seen)
    given = {}
    for worker, gpus in seen.items():
        given[worker] = min(gpus, key=lambda gpu: users[gpu])
        users[given[worker]] += 1
    return given


def own(gpu: str) -> None:
    """Let this process use a GPU from now on, of those that `gpus_here` names."""
    global _own_gpu
    _own_gpu = gpus_here().index(gpu)


def device_here(kind: str) -> torch.device:
    """The device of a kind that this process is to use.

    Raises
    ------
    InputError
        If it sees no GPU, and should use one.
    """
    if kind == "cpu":
        return CPU
    if not gpus_here():
        raise InputError(
            "This process sees no GPU.",
            cause=WHY_NO_GPU,
            remedy='compute on cores: device="cpu"; or install torch with CUDA where the GPU is',
        )
    return torch.device("cuda", _own_gpu)


def use(device: torch.device) -> None:
    """Let this thread put on a GPU of its own what names no number."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def computing_on(kind: str) -> Iterator[torch.device]:
    """The device of a kind that this process is to use, for a while; memory that was freed by then is given back."""
    device = device_here(kind)
    use(device)
    try:
        yield device
    finally:
        give_back(device)


def seed(device: torch.device, value: int) -> None:
    """Seed what a model draws at random on a device, and on the CPU."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)


def generators_of(device: torch.device) -> list[torch.device]:
    """Whose random state must be kept, beside the CPU's, while something draws on a device; for torch's `fork_rng`."""
    return [device] if device.type == "cuda" else []


def finish(device: torch.device) -> None:
    """Wait until what was queued on a GPU is done, so that a clock that is read then tells of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """Give freed memory of a GPU back to whoever else uses it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
