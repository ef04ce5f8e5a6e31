"""A whole step, from the rows to the record: the page that every step of every worker goes through.

Between its two functions stands what a strategy's text says, as that of all-reduce does, and it calls both::

    team.update(lambda: team.sum_for_update(team.gradient(step)))

`gradient` is the first one. `sum_for_update` is the exchange, by `parakit.collectives`. `update` is the second one; it
calls for the gradient at the place where a loop by hand would have forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from parakit.data.local_chunks import LocalChunks
from parakit.engines.account import BACKWARD, DATA, FORWARD, StepAccount
from parakit.engines.optimizers import learning_rate
from parakit.engines.passes import Passes
from parakit.engines.recipe import Recipe
from parakit.errors import Diverged
from parakit.gradients.gradient_sum import GradientSum
from parakit.losses.summed import SummedLoss
from parakit.model_state.peers import speaking_to
from parakit.system.process_settings import seed_all

__all__ = ["Updater", "Worker", "gradient", "update"]


class Updater(Protocol):
    """How the sum of a batch becomes a step of the optimizer: of the whole model, or of this worker's part of it."""

    def load(self, total: Any) -> None:
        """Make the mean over the batch the gradient."""

    def squared_norm(self) -> float:
        """Of that mean, over the whole model."""

    def call_hooks(self) -> None:
        """Let the user's hooks on parameters have it."""

    def clip(self, most: float) -> None:
        """Scale it down to a 2-norm, over the whole model."""

    def step(self, evaluate: Callable[[], float]) -> None:
        """One step of the optimizer, which evaluates the gradient, and so the loss, as often as it needs."""


class Worker(Protocol):
    """What a step needs of whoever does it."""

    recipe: Recipe
    device: torch.device
    loss: SummedLoss
    passes: Passes
    optimizer: torch.optim.Optimizer
    updater: Updater
    scheduler: LRScheduler | None
    account: StepAccount
    step: int

    def begin_update(self) -> None:
        """From now on, the state is of no step."""

    def end_update(self) -> None:
        """Now it is of the next one."""


def gradient(worker: Worker, step: int, chunks: LocalChunks, rank: int) -> GradientSum:
    """The sum over this worker's rows of a step of the gradients of their losses."""
    recipe, account, passes = worker.recipe, worker.account, worker.passes
    account.begin()
    rows = passes.rows_of(step, chunks)  # of the batch, those that are held here
    account.lap(DATA)
    passes.begin(rows)
    if rows.samples is not None:
        seed_all(worker.device, mix_seed(recipe.seed, step, rank), others=recipe.traits.draws.others)
        passes.note_state(rows)
        with speaking_to(passes.peers, standing_in=rows.stand_in):
            loss = passes.forward(rows)  # the model, then the loss
            account.lap(FORWARD)
            passes.backward(rows, loss)  # into the buffer that is added up
        passes.settle_state(rows)  # what forward did to buffers and parameters, brought together
        account.lap(BACKWARD)
    account.rows = rows.counted
    total = passes.buffer.sum
    if account.measuring:
        account.share_norm = total.mean_squared_norm
    return total


def update(worker: Worker, summed: Callable[[], Any]) -> None:
    """One step of the optimizer, by the gradient over the whole batch."""
    recipe, account, updater = worker.recipe, worker.account, worker.updater
    losses: list[float] = []
    norms: list[tuple[float, float]] = []
    rate = learning_rate(worker.optimizer)
    account.begin_update()
    worker.begin_update()

    def evaluate() -> float:
        with torch.enable_grad():
            total = summed()  # `gradient` above, then the exchange
        # Not a number if it is a mean over nothing, as where every label is ignored.
        losses.append(math.nan if worker.loss.divides and total.count == 0 else total.mean_loss)
        first = len(losses) == 1
        if first and recipe.stop_on_nonfinite:  # a line search may well try what is not finite, later
            check_finite(losses[0], worker.step, rate)
        updater.load(total)  # the sum becomes the mean: divided once, by the count of all samples
        if first and account.measuring:
            norms.append((account.share_norm, updater.squared_norm()))
        updater.call_hooks()
        if recipe.clip_norm is not None:
            updater.clip(recipe.clip_norm)
        return losses[-1]

    updater.step(evaluate)
    at_epoch_end = (worker.step + 1) % recipe.order.steps_per_epoch == 0
    if worker.scheduler is not None and (recipe.scheduler_every == "step" or at_epoch_end):
        worker.scheduler.step()
    account.close(worker.step, losses[0], rate, norms[0] if norms else None)
    worker.end_update()


def check_finite(loss: float, step: int, rate: float) -> None:
    """Refuse a loss that no step can go on from."""
    if not math.isfinite(loss):
        raise Diverged(f"The loss of step {step} is {loss}, at learning rate {rate:g}.", step=step)


def mix_seed(seed: int, step: int, rank: int) -> int:
    """One seed from three numbers; neighbours land far apart."""
    mix = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    return (mix ^ (mix >> 31)) % 2**63
