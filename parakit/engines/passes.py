"""Forward and backward of one worker's rows of a step, and all that belongs to them.

Forward, in which workers may speak to each other; backward, into the buffer that is added up; and what forward did to
buffers and parameters, brought together. A worker that has no rows of a step goes through its motions with a row that
counts for nothing, where others wait for it or where calls are counted.

What depends on the batch as one process sees it (dropout masks, the statistics of batch normalisation that is not
synchronised) depends on the worker count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parakit.data.local_chunks import LocalChunks
from parakit.data.samples import Samples
from parakit.engines.recipe import Recipe
from parakit.exactness.check import Check
from parakit.exactness.outputs import check_rows, replace_tensors, tensors_in
from parakit.exactness.separation import Separation, outputs_alone
from parakit.gradients.forward import call_model
from parakit.gradients.gradient_buffer import GradientBuffer
from parakit.losses.summed import ShareLoss, SummedLoss, mean_of
from parakit.model_state.attributes import Attributes
from parakit.model_state.buffers import Buffers
from parakit.model_state.late_attributes import Late
from parakit.model_state.peers import ALONE, Peers, rows_of_all
from parakit.model_state.rewrites import Rewrites
from parakit.model_state.structure import Structure
from parakit.model_state.sync_batch_norm import synchronise
from parakit.model_state.undisturbed import Still, quiet_layers

__all__ = ["OwnRows", "Passes", "Rows", "WholeBatch", "passes_for"]


class Rows(NamedTuple):
    """One worker's rows of a step.

    Attributes
    ----------
    step : int
    samples : Samples or None
        The rows, or the one to stand in with; None where nothing is to be done.
    stand_in : bool
        Whether the worker has no rows of the step.
    places : tensor or None
        Of the rows in the batch, where a loss gets the whole of that.
    unit : float
        What the gradient is divided by on its way. The same for all workers: so that the sum over the batch is a mean,
        if the loss is one of its rows.
    """

    step: int
    samples: Samples | None
    stand_in: bool
    places: Tensor | None
    unit: float

    @property
    def counted(self) -> int:
        """How many rows count."""
        return 0 if self.stand_in or self.samples is None else len(self.samples)


class Passes(ABC):
    """Forward and backward of shares, with one worker's model.

    Parameters
    ----------
    recipe : Recipe
    model : nn.Module
        This worker's own.
    loss : SummedLoss
    buffer : GradientBuffer
        Of the model's trainable parameters.
    hooks : sequence of callable
        That were taken off the model's parameters.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, loss: SummedLoss, buffer: GradientBuffer, hooks: Sequence[Any] = ()
    ) -> None:
        self._recipe, self._traits = recipe, recipe.traits
        self._model, self._loss = model, loss
        self.buffer = buffer
        self.peers: Peers = ALONE
        traits = self._traits
        if traits.synchronised:
            synchronise(model)
        self.buffers = Buffers(model, loss.function, traits.rules)
        self.attributes = Attributes(model, loss.function, hooks, ignored=traits.passing)
        self.structure = Structure(model, loss.function)
        self._rewrites = Rewrites(model, traits.rewrites)
        self._look = True
        self._output: Any = None
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

    def rows_of(self, step: int, chunks: LocalChunks) -> Rows:
        """The rows of a step that a worker with some chunks has."""
        share = chunks.share(step)
        unit = float(self._recipe.order.batch_rows(step)) if self._loss.divides else 1.0
        if share is None:
            return Rows(step, chunks.spare if self._traits.stands_in else None, True, None, unit)
        return Rows(step, share, False, chunks.places(step) if self._traits.gather else None, unit)

    def begin(self, rows: Rows) -> None:
        """Make ready for a share: no gradient is there yet."""
        if rows.stand_in:
            self.buffer.clear(rows.unit)
        if rows.samples is None:
            return
        self.buffer.begin()
        if self._check is not None and not rows.stand_in:
            self._check.before(rows.step, rows.samples)

    def note_state(self, rows: Rows) -> None:
        """Note how parameters and buffers are before forward."""
        self._rewrites.begin(look=self._look)
        self.buffers.begin(standing_in=rows.stand_in)

    def forward(self, rows: Rows) -> ShareLoss:
        """The loss of a share; in it, workers may speak to each other."""
        assert rows.samples is not None
        with _running_statistics_for(self._model, len(rows.samples)):
            share = self._forward(rows, rows.samples)
        self.structure.check_flags()
        if self._look:
            self._rewrites.check()
            self._look = False
        return share

    def backward(self, rows: Rows, loss: ShareLoss) -> None:
        """Make the gradient of that loss the buffer's sum; nothing of it counts where the worker stands in."""
        if not rows.stand_in:
            self._backward(rows, loss)
            if self._check is not None and rows.samples is not None:
                self._check.after(rows.step, rows.samples, self._output, loss)
        elif self._traits.synchronised and not self._traits.gather:  # others wait for sums that gradients go through
            loss.value.backward(torch.zeros_like(loss.value))
        self._output = None

    @abstractmethod
    def _forward(self, rows: Rows, samples: Samples) -> ShareLoss:
        """The loss; and the model's own output as `_output`."""

    @abstractmethod
    def _backward(self, rows: Rows, loss: ShareLoss) -> None: ...

    def settle_state(self, rows: Rows) -> None:
        """Bring together what forward did to buffers and parameters; all workers do that at once."""
        if rows.stand_in:
            self.buffers.stood_in()
            self.buffer.clear(rows.unit)
        self._rewrites.settle(self.peers)
        self.buffers.settle(self.peers)


class OwnRows(Passes):
    """Each worker by itself, but for sums that they meet for."""

    def _forward(self, rows: Rows, samples: Samples) -> ShareLoss:
        def model() -> Any:
            self._output = call_model(self._model, samples.inputs)
            return self._output

        return self._loss.of_share(model, samples.targets, self._divide(rows, len(samples)))

    def _backward(self, rows: Rows, loss: ShareLoss) -> None:
        self.buffer.backward(loss, rows.unit)

    def _divide(self, rows: Rows, count: int) -> Callable[[int, Any], Any] | None:
        """Divides a mean over classes by the weights that the whole batch has in it."""
        if not self._loss.meets:
            return None
        part = count / self._recipe.order.batch_rows(rows.step)

        def divide(_: int, weights: Any) -> Any:
            total = torch.tensor([0.0 if rows.stand_in else float(weights)], dtype=torch.float64)
            if self.peers.size > 1:
                self.peers.sum(total)
            return float(total) * part

        return divide


class WholeBatch(Passes):
    """The loss over the outputs of all workers.

    Every worker has the whole batch's outputs, and goes back from the loss to its own. What of the loss does not go
    through outputs, as a penalty over parameters does, would be counted by each: the worker of rank 0 alone does.
    """

    def _forward(self, rows: Rows, samples: Samples) -> ShareLoss:
        count = self._recipe.order.batch_rows(rows.step)
        places = torch.zeros(0, dtype=torch.int64) if rows.places is None else rows.places
        output = self._output = call_model(self._model, samples.inputs)
        self._kept = [check_rows(leaf, len(samples)) for leaf in tensors_in(output)]
        self._own = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in self._kept]
        whole = [self._rows(leaf, places, count) for leaf in self._own]
        targets = samples.map(lambda leaf: self._rows(leaf, places, count)).targets
        value = mean_of(self._loss.function(replace_tensors(output, iter(whole)), targets))
        return ShareLoss(value, float(len(places)), float(len(places)))

    def _rows(self, mine: Tensor, places: Tensor, count: int) -> Tensor:
        every = rows_of_all(self.peers, mine[: len(places)], places, count)
        return every.index_put((places,), mine[: len(places)]) if mine.requires_grad else every

    def _backward(self, rows: Rows, loss: ShareLoss) -> None:
        leaves = [(leaf, mine) for leaf, mine in zip(self._kept, self._own, strict=True) if mine.requires_grad]
        if self.peers.rank == 0:
            loss.value.backward()
            grads = [mine.grad for _, mine in leaves]
        else:
            grads = list(torch.autograd.grad(loss.value, [mine for _, mine in leaves], allow_unused=True))
        pairs = [(leaf, grad) for (leaf, _), grad in zip(leaves, grads, strict=True) if grad is not None]
        if pairs:
            torch.autograd.backward([leaf for leaf, _ in pairs], [grad for _, grad in pairs])
        self._kept, self._own = [], []
        self.buffer.take_arrivals(loss, rows.unit)


def passes_for(recipe: Recipe, *args: Any, **kwargs: Any) -> Passes:
    """Those that a recipe needs."""
    return (WholeBatch if recipe.traits.gather else OwnRows)(recipe, *args, **kwargs)


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
