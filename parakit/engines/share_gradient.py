"""The gradient of a share: forward and backward of one worker's rows of a step, and all that belongs to them.

The order of a step, on every worker: the rows of its share; random numbers from (seed, step, rank); forward, in which
workers may speak to each other; backward, into the buffer that is added up; and what forward did to buffers and
parameters, brought together. A worker that has no rows of a step goes through its motions with a row that counts for
nothing, where others wait for it or where calls are counted.

What depends on the batch as one process sees it (dropout masks, the statistics of batch normalisation that is not
synchronised) depends on the worker count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.engines.recipe import Recipe
from parakit.events.records import PHASES
from parakit.exactness.check import Check
from parakit.exactness.outputs import replaced, rows_checked, tensors_in
from parakit.exactness.separation import Separation, outputs_alone
from parakit.gradients.forward import call_model
from parakit.gradients.gradient_buffer import GradientBuffer
from parakit.losses.summed import ShareLoss, SummedLoss, mean_of
from parakit.model_state.attributes import Attributes
from parakit.model_state.buffers import Buffers
from parakit.model_state.late_attributes import Late
from parakit.model_state.peers import ALONE, Peers, rows_of_all, speaking_to
from parakit.model_state.rewrites import Rewrites
from parakit.model_state.structure import Structure
from parakit.model_state.sync_batch_norm import synchronise
from parakit.model_state.undisturbed import Still, quiet_layers
from parakit.system.devices import finish
from parakit.system.process_settings import seed_all

__all__ = ["ShareGradient"]

DATA, FORWARD, BACKWARD = (PHASES.index(p) for p in PHASES[:3])


class ShareGradient:
    """Computes the gradients of shares with one worker's model.

    Parameters
    ----------
    recipe : Recipe
    model : nn.Module
        This worker's own.
    loss : SummedLoss
    buffer : GradientBuffer
        Of the model's trainable parameters.
    device : torch.device
    hooks : sequence of callable
        That were taken off the model's parameters.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        loss: SummedLoss,
        buffer: GradientBuffer,
        device: torch.device,
        hooks: Sequence[Any] = (),
    ) -> None:
        self._recipe, self._traits = recipe, recipe.traits
        self._model, self._loss = model, loss
        self._buffer = buffer
        self._device = device
        self.peers: Peers = ALONE
        #: Of the rows of the present share in its batch; wanted where a loss gets the whole of that.
        self.places = torch.zeros(0, dtype=torch.int64)
        traits = self._traits
        if traits.synchronised:
            synchronise(model)
        self.buffers = Buffers(model, loss.function, traits.rules)
        self.attributes = Attributes(model, loss.function, hooks, ignored=traits.passing)
        self.structure = Structure(model, loss.function)
        self._rewrites = Rewrites(model, traits.rewrites)
        self._look = True
        self._check = self._made_check() if recipe.check > 0 else None

    def _made_check(self) -> Check:
        traits = self._traits
        still = Still(
            self._model, self._loss.function, buffers=traits.rules, parameters=traits.rewrites,
            attributes=traits.counted, noisy=traits.noisy, others=traits.draws.others,
        )  # fmt: skip
        # With the outputs of the whole batch, a loss may compare them; a model may not.
        loss = SummedLoss(outputs_alone, "sum") if traits.gather else self._loss
        separation = Separation(self._model, loss, still, needs_grad=traits.grad_in_evaluation)
        changing = traits.counted or traits.rules or traits.rewrites
        drawing = traits.draws.torch or traits.draws.others
        return Check(
            separation, self._model, loss, Late(self.attributes), self._recipe.check, gathers=traits.gather,
            calm=not (changing or drawing or quiet_layers(self._model)), needs_grad=traits.grad_in_evaluation,
        )  # fmt: skip

    def look_closely(self) -> None:
        """Let the next step notice whether forward changes parameters that it should not."""
        self._look = True

    def compute(self, step: int, share: Samples | None, spare: Samples | None, seed: int, spent: list[float]) -> None:
        """Make the gradient of a share the buffer's sum.

        Parameters
        ----------
        step : int
        share : Samples or None
            This worker's rows of the step.
        spare : Samples or None
            A row of this worker's, for when it has none in the step.
        seed : int
            Of what is drawn at random.
        spent : list of float
            By phase; the seconds that this takes are added.
        """
        buffer, traits = self._buffer, self._traits
        began = perf_counter()
        # The same for all workers, so that the sum over the batch is a mean, if the loss is one of its rows.
        unit = float(self._recipe.order.batch_rows(step)) if self._loss.divides else 1.0
        if share is None:
            buffer.clear(unit)
            if spare is None or not traits.stands_in:
                return
        buffer.begin()
        if share is not None and self._check is not None:
            self._check.before(step, share)
        seed_all(self._device, seed, others=traits.draws.others)
        rows = share if share is not None else spare
        assert rows is not None
        self._rewrites.begin(look=self._look)
        self.buffers.begin(standing_in=share is None)
        with speaking_to(self.peers, standing_in=share is None):
            passes = self._gathered if traits.gather else self._alone
            forwarded = passes(step, rows, unit, standing_in=share is None)
        if share is None:
            self.buffers.stood_in()
            buffer.clear(unit)
        self._rewrites.settle(self.peers)
        self.buffers.settle(self.peers)
        spent[FORWARD] += forwarded - began
        spent[BACKWARD] += perf_counter() - forwarded

    def _alone(self, step: int, rows: Samples, unit: float, *, standing_in: bool) -> float:
        """Forward and backward, each worker by itself but for sums that they meet for; says when forward was done."""
        outputs: list[Any] = []

        def model() -> Any:
            outputs.append(call_model(self._model, rows.inputs))
            return outputs[-1]

        with _running_statistics_for(self._model, len(rows)):
            share = self._loss.of_share(model, rows.targets, self._divide(step, len(rows), standing_in))
        forwarded = self._forwarded()
        if not standing_in:
            self._buffer.backward(share, unit)
            if self._check is not None:
                self._check.after(step, rows, outputs[-1], share)
        elif self._traits.synchronised:  # others wait for the sums that gradients go through
            share.value.backward(torch.zeros_like(share.value))
        finish(self._device)
        return forwarded

    def _forwarded(self) -> float:
        finish(self._device)
        self.structure.check_flags()
        if self._look:
            self._rewrites.check()
            self._look = False
        return perf_counter()

    def _divide(self, step: int, rows: int, standing_in: bool) -> Callable[[int, Any], Any] | None:
        """Divides a mean over classes by the weights that the whole batch has in it."""
        if not self._loss.meets:
            return None
        part = rows / self._recipe.order.batch_rows(step)

        def divide(_: int, weights: Any) -> Any:
            total = torch.tensor([0.0 if standing_in else float(weights)], dtype=torch.float64)
            if self.peers.size > 1:
                self.peers.sum(total)
            return float(total) * part

        return divide

    # --- the whole batch

    def _gathered(self, step: int, rows: Samples, unit: float, *, standing_in: bool) -> float:
        """Forward, and the loss over the outputs of all workers; says when forward was done.

        Every worker has the whole batch's outputs, and goes back from the loss to its own. What of the loss does not go
        through outputs, as a penalty over parameters does, would be counted by each: the worker of rank 0 alone does.
        """
        count = self._recipe.order.batch_rows(step)
        places = self.places[:0] if standing_in else self.places
        with _running_statistics_for(self._model, len(rows)):
            output = call_model(self._model, rows.inputs)
        kept = [rows_checked(leaf, len(rows)) for leaf in tensors_in(output)]
        own = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in kept]
        whole = [self._rows(leaf, places, count) for leaf in own]
        targets = rows.map(lambda leaf: self._rows(leaf, places, count)).targets
        value = mean_of(self._loss.function(replaced(output, iter(whole)), targets))
        share = ShareLoss(value, float(len(places)), float(len(places)))
        forwarded = self._forwarded()
        if not standing_in:
            self._buffer.sum.unit = unit
            self._buffer.sum.note(share)
            self._back(value, kept, own)
            self._buffer.arrived()
            if self._check is not None:
                self._check.after(step, rows, output, share)
        finish(self._device)
        return forwarded

    def _rows(self, mine: Tensor, places: Tensor, count: int) -> Tensor:
        every = rows_of_all(self.peers, mine[: len(places)], places, count)
        return every.index_put((places,), mine[: len(places)]) if mine.requires_grad else every

    def _back(self, value: Tensor, kept: list[Tensor], own: list[Tensor]) -> None:
        leaves = [(leaf, mine) for leaf, mine in zip(kept, own, strict=True) if mine.requires_grad]
        if self.peers.rank == 0:
            value.backward()
            grads = [mine.grad for _, mine in leaves]
        else:
            grads = list(torch.autograd.grad(value, [mine for _, mine in leaves], allow_unused=True))
        pairs = [(leaf, grad) for (leaf, _), grad in zip(leaves, grads, strict=True) if grad is not None]
        if pairs:
            torch.autograd.backward([leaf for leaf, _ in pairs], [grad for _, grad in pairs])


@contextmanager
def _running_statistics_for(model: nn.Module, rows: int) -> Iterator[None]:
    """A single row has no statistics of its own: batch normalisation then uses the running ones."""
    norms = [m for m in model.modules() if _is_local_norm(m)] if rows == 1 else []
    training = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True
            if norm.num_batches_tracked is not None:  # it counts batches, whatever they tell
                norm.num_batches_tracked.add_(1)  # type: ignore[operator]


def _is_local_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
