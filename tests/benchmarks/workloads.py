"""The workloads that speed is measured on: small and large networks, small and large batches, random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Workload:
    """A model, its data and its batch."""

    name: str
    make_model: Callable[[], nn.Module]
    batch_size: int
    images: bool = False
    samples: int = 4096

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make_model()

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.samples, 3, 32, 32) if self.images else (self.samples, 3072)
        inputs = torch.randn(shape, generator=generator)
        return inputs, torch.randint(10, (self.samples,), generator=generator)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))


def large_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


WORKLOADS = (
    Workload("MLP 0.2 M, batch 512", small_mlp, 512),
    Workload("MLP 4.2 M, batch 256", large_mlp, 256),
    Workload("CNN 0.55 M, batch 64", cnn, 64, images=True),
    Workload("CNN 0.55 M, batch 256", cnn, 256, images=True),
)
