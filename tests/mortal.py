"""Code of a user's that kills, stops or slows the process it runs in, once, at a chosen place; for tests of losses.

A place is armed by a file: whoever comes by and removes it is the one. Models, optimizers and strategies here do
nothing else out of the ordinary, so what they compute is comparable with an undisturbed run.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from parakit.strategies import AllReduce


def strike(folder: str, place: str) -> None:
    """Suffer what was armed for a place, if anything."""
    for kind in ("kill", "stop", "sleep"):
        try:
            Path(folder, f"{kind}-{place}").unlink()
        except FileNotFoundError:
            continue
        if kind == "sleep":
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


def arm(folder: Path, place: str, kind: str = "kill") -> Path:
    """Let the next one that comes by a place be struck."""
    armed = folder / f"{kind}-{place}"
    armed.touch()
    return armed


_hooked: set[str] = set()
# Its rank is that of this process in the present step, as far as `RankedAllReduce` tells: no part of a model's state.
_process = SimpleNamespace(rank=-1)


def strike_after_updates(folder: str) -> None:
    """Let this process pass two places whenever one of torch's optimizers has updated what it updates here.

    They are "slice" and, say, "slice of rank 0".
    """

    def pass_by(*_: Any) -> None:
        strike(folder, "slice")
        strike(folder, f"slice of rank {_process.rank}")

    if folder not in _hooked:
        _hooked.add(folder)
        register_optimizer_step_post_hook(pass_by)


class MortalNet(nn.Module):
    """A small classifier of digits; each forward pass takes some milliseconds."""

    def __init__(self, folder: Path, pause_seconds: float = 0.004) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.folder = str(folder)
        self.pause_seconds = pause_seconds
        self.maker = os.getpid()

    def forward(self, inputs: Tensor) -> Tensor:
        if os.getpid() != self.maker:  # where models are only tried out
            strike(self.folder, "forward" if self.training else "evaluate")
            strike_after_updates(self.folder)
        time.sleep(self.pause_seconds)
        out = self.inner(inputs)
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    def _backward(self, _: Tensor) -> None:
        strike(self.folder, "backward")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Torch's own, with momentum: workers of one host divide its update among them."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class MortalSGD(torch.optim.SGD):
    """The same optimizer as a class of one's own, whose update is never divided."""

    def __init__(self, parameters: Any, folder: str) -> None:
        super().__init__(parameters, lr=0.05, momentum=0.9)
        self.folder = folder

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        strike(self.folder, "update")
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        strike(self.folder, "commit")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        strike(self.folder, "load")
        super().load_state_dict(state_dict)


class RankedAllReduce(AllReduce):
    """All-reduce that lets places know the rank of their process."""

    def step(self, team: Any, step: int) -> None:
        _process.rank = team.rank
        super().step(team, step)


class MortalAllReduce(AllReduce):
    """All-reduce, with a place between a worker's own gradient and the sum, where all others wait for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def step(self, team: Any, step: int) -> None:
        def summed() -> Any:
            mine = team.gradient(step)
            strike(self.folder, "exchange")
            return team.sum_for_update(mine)

        team.update(summed)
