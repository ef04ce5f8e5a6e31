"""Synchronised batch normalisation: statistics of the whole batch, on any number of workers and on CPUs too.

Torch's own `SyncBatchNorm` synchronises on GPUs within torch.distributed's global group alone, and is plain batch
normalisation everywhere else. Here a worker's model has the layer with the same name, parameters and statistics, whose
sums go over the workers of a run.

The mean and the sum of squared deviations from it are summed one after the other, so that nothing is lost to
cancellation; gradients go through both sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parakit.model_state.peers import present, sum_of_all

__all__ = ["has_synchronised", "synchronise"]


def has_synchronised(model: nn.Module) -> bool:
    """Whether a model has layers that are to be synchronised."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def synchronise(model: nn.Module) -> None:
    """Let a model's synchronised layers speak to the workers of a run; the model is this worker's own."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = _Synchronised


class _Synchronised(nn.SyncBatchNorm):
    """Batch normalisation whose statistics are those of the rows of all workers."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as torch calls it
        tracks = self.running_mean is not None and self.running_var is not None
        if not self.training and tracks:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        peers, standing_in = present()
        values = input[:0] if standing_in else input
        kept = [d for d in range(input.dim()) if d != 1]
        ones = input.new_full((1,), float(values.numel() // max(1, input.shape[1])), dtype=torch.float64)
        if peers.size > 1:
            peers.sum(ones)
        count = max(float(ones), 1.0)
        mean = sum_of_all(peers, values.sum(kept)) / count
        shape = [1, -1] + [1] * (input.dim() - 2)
        squares = sum_of_all(peers, (values - mean.view(shape)).square().sum(kept))
        variance = squares / count
        if self.training and tracks:
            self._track(mean.detach(), squares.detach() / max(count - 1.0, 1.0))
        normed = (input - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        return normed if self.weight is None else normed * self.weight.view(shape) + self.bias.view(shape)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.mul_(1 - share).add_(value, alpha=share)
