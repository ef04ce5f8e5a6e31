"""A whole step, from the rows to the record: the page that every step of every worker goes through.

Between its two functions stands what a strategy's text says, as that of all-reduce does, and it calls both::

    team.update(lambda: team.sum_for_update(team.gradient(step)))

`gradient` is the first one. `sum_for_update` is the exchange, by `parakit.collectives`. `update` is the second one; it
calls for the gradient at the place where a loop by hand would have forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from parakit.data.local_chunks import LocalChunks
from parakit.engines.account import BACKWARD, DATA, FORWARD, StepAccount
from parakit.engines.passes import Passes
from parakit.engines.recipe import Recipe
from parakit.gradients.gradient_sum import GradientSum
from parakit.model_state.peers import speaking_to
from parakit.system.process_settings import seed_all

__all__ = ["Update", "Worker", "gradient", "update"]


class Update(Protocol):
    """How the sum of a batch becomes a step of the optimizer: of the whole model, or of this worker's part of it."""

    def load(self, total: Any) -> None:
        """Make the mean over the batch the gradient; the sum is divided once, by the count of all samples."""

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
    account: StepAccount
    passes: Passes
    placed: Update
    step: int

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group."""

    def loss_of(self, total: Any) -> float:
        """The loss of a batch."""

    def check_loss(self, loss: float, rate: float) -> None:
        """Refuse one that is not finite."""

    def advance_schedule(self) -> None:
        """Let the learning rate go on along its schedule."""

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
        seed_all(worker.device, mixed(recipe.seed, step, rank), others=recipe.traits.draws.others)
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
    recipe, account, placed = worker.recipe, worker.account, worker.placed
    losses: list[float] = []
    norms: list[tuple[float, float]] = []
    rate = worker.learning_rate
    account.begin_update()
    worker.begin_update()

    def evaluate() -> float:
        with torch.enable_grad():
            total = summed()  # `gradient` above, then the exchange
        losses.append(worker.loss_of(total))
        first = len(losses) == 1  # a line search may well try what is not finite
        if first:
            worker.check_loss(losses[0], rate)
        placed.load(total)
        if first and account.measuring:
            norms.append((account.share_norm, placed.squared_norm()))
        placed.call_hooks()
        if recipe.clip_norm is not None:
            placed.clip(recipe.clip_norm)
        return losses[-1]

    placed.step(evaluate)
    worker.advance_schedule()
    account.close(worker.step, losses[0], rate, norms[0] if norms else None)
    worker.end_update()


def mixed(seed: int, step: int, rank: int) -> int:
    """One seed from three numbers; neighbours land far apart."""
    mix = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    return (mix ^ (mix >> 31)) % 2**63
