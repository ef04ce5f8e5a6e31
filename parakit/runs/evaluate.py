"""`evaluate`: a model on data, by the workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.engines.evaluation import Evaluation, Tally, tally
from parakit.engines.recipe import Parts, Traits
from parakit.losses.summed import SummedLoss
from parakit.preflight import Trial, check_model, frozen_parts, traits_for_evaluation
from parakit.runs.arguments import check_pool, default_loss, default_optimizer, samples_of, warn_of_hooks
from parakit.serialization import Frozen, dumps
from parakit.system.devices import computing_on
from parakit.system.process_settings import Settings
from parakit.validation import check_positive, plain
from parakit.workers.pool import Workers

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    on: Workers,
    loss: Callable[[Any, Any], Tensor] | None = None,
    limit_seconds: float = 300.0,
) -> Evaluation:
    """Loss and accuracy of a model on some data, computed by all workers of a pool.

    Parameters
    ----------
    model : nn.Module
    data : as for `train`
    on : Workers
    loss : callable, optional
        As for `train`.
    limit_seconds : float
        The longest to wait.

    Returns
    -------
    Evaluation
        Its accuracy is that of the classes that the loss compares with labels; None where it compares none.

    Raises
    ------
    DataError, ModelError, LossError
        If model, data and loss do not fit together.
    WorkerLost
        If the workers do not answer in time.
    """
    pool = check_pool(on)
    samples = samples_of(model, data)
    limit_seconds = plain(limit_seconds)
    check_positive("limit_seconds", limit_seconds)
    check_model(model, training=False)
    own_loss = default_loss(samples.targets) if loss is None else loss
    warn_of_hooks(3)
    trial = Trial(frozen_parts(Parts(model, own_loss, default_optimizer)), samples)
    traits = traits_for_evaluation(trial)
    frozen, settings = trial.frozen, Settings.here()
    assert frozen.memory is not None
    del trial
    blob, memory = dumps((frozen, traits, settings)), frozen.memory.key
    shares = torch.arange(len(samples)).tensor_split(min(pool.size, len(samples)))
    held = memory if memory and pool.maps_memory else frozen.memory.array()
    items = [(blob, held, samples.take(rows).pack(), pool.device) for rows in shares]
    tallies: list[Tally] = pool.map(_tally_packed, items, limit_seconds)
    return sum(tallies, Tally()).result()


def _tally_packed(item: tuple[bytes, Any, Samples, str]) -> Tally:
    blob, memory, samples, kind = item
    frozen, traits, settings = pickle.loads(blob)
    with computing_on(kind) as device, settings.in_force():
        return _tally_on(device, frozen.within(memory), traits, samples)


def _tally_on(device: torch.device, frozen: Frozen, traits: Traits, samples: Samples) -> Tally:
    parts: Parts = frozen.thaw()
    loss = SummedLoss(parts.loss, traits.form, traits.calls).on(device)
    return tally(
        parts.model.to(device), loss, samples.unpack().on(device),
        judging=traits.judged, needs_grad=traits.grad_in_evaluation, copies=traits.writes,
    )  # fmt: skip
