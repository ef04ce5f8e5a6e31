"""Imported by a local worker as it starts: what the first run would otherwise wait for.

The first optimizer of a process makes torch import its compiler, which takes seconds; a resize to a fresh worker
would pay for it.
"""

import torch

import parakit.workers.resident  # noqa: F401  # what orders call

torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
