"""A replica: one worker's copy of what is trained, with the chunks it holds.

Owns the model, the optimizer, the schedule and the committed state of one process; refuses to know how gradients
travel. A step is a function of (seed, step, share): random numbers that a model draws (dropout masks) come from a
generator seeded by (seed, step, rank), so a step that is done again draws the same ones. What depends on the batch as
one process sees it (dropout masks, the statistics of batch normalisation) depends on the worker count.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from parakit.chunks import EpochOrder
from parakit.commits import Commits, PrivateCommits, State, copy_state
from parakit.data import Samples
from parakit.devices import CPU, finish, seed
from parakit.errors import Diverged
from parakit.events import PHASES
from parakit.fusing import prefer_fused
from parakit.gradients import GradientBuffer, GradientSum
from parakit.losses import SummedLoss
from parakit.rates import learning_rate, set_learning_rate
from parakit.shards import Common, Shard, can_shard, common_nbytes

__all__ = [
    "Holding",
    "Recipe",
    "Replica",
    "StepRecord",
    "average_buffers",
    "load_model_state",
    "needs_closure",
]

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

_LARGE_SLICE = 1 << 18  # bytes of a gradient; to copy a smaller one takes less time than to leave it in its pieces
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_

DATA, FORWARD, BACKWARD, EXCHANGE, UPDATE = (PHASES.index(p) for p in PHASES[:5])


@dataclass(frozen=True)
class Recipe:
    """What to train and how: the same on every worker, and never changed in a run.

    Parameters
    ----------
    model : nn.Module
        With its initial parameters.
    loss : SummedLoss
    optimizer : callable
        Makes the optimizer from the list of parameters.
    scheduler : callable, optional
        Makes a learning-rate scheduler from the optimizer.
    scheduler_every : {"epoch", "step"}
        When the scheduler steps.
    clip_norm : float, optional
        The largest 2-norm of the global gradient; larger ones are scaled down to it.
    seed : int
    order : EpochOrder
    stop_on_nonfinite : bool
        Whether a loss or a parameter that is NaN or infinite ends the run.
    """

    model: nn.Module
    loss: SummedLoss
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    scheduler_every: str
    clip_norm: float | None
    seed: int
    order: EpochOrder
    stop_on_nonfinite: bool = True


@dataclass(slots=True)
class StepRecord:
    """One worker's account of one step; `seconds` has a place for each of `PHASES` but the last.

    ``norms`` are the squared 2-norms of the mean gradient over this worker's samples, and of that over all of them, in
    a step that measured them.
    """

    step: int
    loss: float
    learning_rate: float
    seconds: list[float]
    wall_seconds: float
    samples: int
    norms: tuple[float, float] | None = None


class Holding:
    """The chunks that one worker holds, laid end to end in one piece of memory.

    Parameters
    ----------
    order : EpochOrder, optional
        Needed to ask for the share of a step.
    device : torch.device
        In whose memory they are.
    """

    def __init__(self, order: EpochOrder | None = None, device: torch.device = CPU) -> None:
        self._order = order
        self._device = device
        self._chunks: dict[int, Samples] = {}
        self._all: Samples | None = None
        self._epoch = -1
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._ends: list[int] = []

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of the chunks held, ascending."""
        return tuple(self._chunks)

    @property
    def samples(self) -> Samples | None:
        """All rows held, or None."""
        return self._all

    def change(self, keep: Iterable[int], adopt: Mapping[int, Samples]) -> None:
        """Let go of all chunks but some, and take in others."""
        chosen = {n: self._chunks[n] for n in keep} | {n: samples.on(self._device) for n, samples in adopt.items()}
        numbers = sorted(chosen)
        if tuple(numbers) == self.chunks and not adopt:
            return
        self._all = Samples.join([chosen[n] for n in numbers]) if numbers else None
        ends = np.cumsum([0] + [len(chosen[n]) for n in numbers])
        # The pieces are views from here on, so a chunk is held once.
        self._chunks = {
            n: self._all.slice(int(first), int(end))
            for n, first, end in zip(numbers, ends[:-1], ends[1:], strict=True)
            if self._all is not None
        }
        self._epoch = -1

    def share(self, step: int) -> Samples | None:
        """The rows of a step's global batch that are held here, or None if there are none."""
        assert self._order is not None
        epoch, batch = divmod(step, self._order.steps_per_epoch)
        if epoch != self._epoch:
            rows, ends = self._order.epoch_rows(epoch, self.chunks)
            self._epoch, self._rows, self._ends = epoch, torch.from_numpy(rows).to(self._device), ends.tolist()
        first, end = self._ends[batch : batch + 2]
        return self._all.take(self._rows[first:end]) if self._all is not None and end > first else None


class Replica:
    """A model in training on one worker.

    Parameters
    ----------
    recipe : Recipe
    device : torch.device
        Where it computes.
    """

    def __init__(self, recipe: Recipe, device: torch.device = CPU) -> None:
        self.device = device
        self.model = copy.deepcopy(recipe.model).to(device).train()
        # No need to hold what it began with.
        self.recipe = replace(recipe, model=self.model, loss=recipe.loss.on(device))
        parameters = list(self.model.parameters())
        self.buffer = GradientBuffer([p for p in parameters if p.requires_grad])
        self.optimizer = recipe.optimizer(parameters)
        self.scheduler = recipe.scheduler(self.optimizer) if recipe.scheduler else None
        self._fused = [{"fused": group["fused"]} if "fused" in group else {} for group in self.optimizer.param_groups]
        self._by_closure = needs_closure(self.optimizer)
        self.step = 0
        self.records: list[StepRecord] = []
        self.spent = [0.0] * (len(PHASES) - 1)
        self.share_rows = 0
        #: Squared norm of the share's mean gradient; None in a step that does not measure it.
        self.share_norm: float | None = None
        self._measuring = False
        self._shard: Shard | None = None
        self._commits: Commits = PrivateCommits()
        self._changed = True  # since the last commit
        #: Whether an update has begun and not come to its end: then the state is of no step.
        self._torn = False
        self.commit()

    @property
    def averaged_buffers(self) -> list[Tensor]:
        """Buffers that workers average when they commit: running statistics, which are means over what each saw."""
        return [b for b in self.model.buffers() if b.is_floating_point()]

    def gradient(self, step: int, holding: Holding, rank: int) -> GradientSum:
        """The summed gradient of this worker's share of a step.

        Parameters
        ----------
        step : int
        holding : Holding
        rank : int
            Seeds, with the step, the random numbers that the model draws.

        Returns
        -------
        GradientSum
            A view of this replica's buffer: the next call overwrites it.
        """
        start = perf_counter()
        share = holding.share(step)
        finish(self.device)
        # The same for all workers, so that the sum over the batch is a mean, if the loss is one of its rows.
        unit = float(self.recipe.order.batch_rows(step)) if self.recipe.loss.divides and self.buffer.direct else 1.0
        if share is None:
            self.buffer.clear(unit)
        loaded = perf_counter()
        self.spent[DATA] += loaded - start
        if share is not None:
            seed(self.device, _mix(self.recipe.seed, step, rank))
            with _running_statistics_for(self.model, len(share)):
                total = self.buffer.forward(self.model, self.recipe.loss, share)
            finish(self.device)
            forwarded = perf_counter()
            self.buffer.backward(total, unit)
            finish(self.device)
            self.spent[FORWARD] += forwarded - loaded
            self.spent[BACKWARD] += perf_counter() - forwarded
        self.share_rows = len(share) if share is not None else 0
        self.share_norm = self.buffer.sum.mean_squared_norm if self._measuring else None
        return self.buffer.sum

    def measure_norms(self) -> None:
        """Measure the norms of gradients in the next step: now and then, for each costs a pass over the gradient."""
        self._measuring = True

    def update(self, summed: Callable[[], GradientSum]) -> None:
        """Do one step of the optimizer, by the gradient over the whole batch.

        Parameters
        ----------
        summed : callable
            Returns the sum over the global batch at the present parameters. Called once; more often for an
            optimizer that evaluates its step several times, such as LBFGS.
        """
        began = perf_counter()
        before = sum(self.spent)
        rate = learning_rate(self.optimizer)
        # From when this worker's gradient can be summed, others may update their slices of the memory in common.
        self._changed = self._torn = True
        if self._shard is None:
            loss, norms = self._update_whole(summed, rate)
        else:
            loss, norms = self._update_shard(self._shard, summed(), rate)
        self._schedule()
        finish(self.device)
        wall = perf_counter() - began
        self.spent[UPDATE] += wall - (sum(self.spent) - before)
        self.records.append(StepRecord(self.step, loss, rate, self.spent, wall, self.share_rows, norms))
        self.spent = [0.0] * len(self.spent)
        self.step += 1
        self._torn = self._measuring = False

    def _update_whole(self, summed: Callable[[], GradientSum], rate: float) -> tuple[float, tuple[float, float] | None]:
        """Update all parameters; returns the loss, and the norms if they are measured."""
        losses: list[float] = []
        norms: tuple[float, float] | None = None

        def evaluate() -> float:
            nonlocal norms
            losses.append(self.buffer.load(summed()))
            if len(losses) == 1:  # a line search may well try what is not finite
                self._check_loss(losses[0], rate)
                if self.share_norm is not None:
                    gradient = self.buffer.sum.total
                    norms = self.share_norm, float(torch.dot(gradient, gradient))
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.buffer.parameters, self.recipe.clip_norm)
            return losses[-1]

        if self._by_closure:
            self.optimizer.step(evaluate)
        else:
            evaluate()
            self.optimizer.step()
        return losses[0], norms

    def _update_shard(self, shard: Shard, total: GradientSum, rate: float) -> tuple[float, tuple[float, float] | None]:
        """Update this worker's slice of the parameters, as others do theirs; returns the same."""
        loss = total.mean_loss
        self._check_loss(loss, rate)
        shard.read(total.pieces)
        shard.divide(total.divisor)
        squared = float("nan")
        if self.share_norm is not None or self.recipe.clip_norm is not None:
            squared = shard.squared_norm()
        if self.recipe.clip_norm is not None:
            shard.divide(max(1.0, (math.sqrt(squared) + _CLIP_EPSILON) / self.recipe.clip_norm))
        shard.step(total.reached)
        return loss, None if self.share_norm is None else (self.share_norm, squared)

    # --- sharing

    @property
    def common_nbytes(self) -> int:
        """Bytes of common memory in which workers can divide the update among them; 0 if they cannot."""
        trained = self.buffer.parameters
        if not trained or not self.buffer.direct or not can_shard(self.optimizer, trained):
            return 0
        return common_nbytes(self.buffer.sum.total.numel(), self.buffer.dtype)

    @property
    def sharded(self) -> bool:
        """Whether this worker updates its own slice alone."""
        return self._shard is not None

    def share(self, common: Common) -> None:
        """Update a slice from now on; all members do, with the same state. Only where `common_nbytes` is not 0."""
        self._shard = Shard(self.optimizer, self.buffer.parameters, common)
        where = self._shard.where
        if (where.stop - where.start) * self.buffer.dtype.itemsize >= _LARGE_SLICE:
            self.buffer.keep_apart(where)
        self.spent = [0.0] * len(self.spent)  # no step has begun

    def unshare(self) -> None:
        """Hold everything in this process's own memory again."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.leave()

    def _check_loss(self, loss: float, rate: float) -> None:
        if self.recipe.stop_on_nonfinite and not math.isfinite(loss):
            raise Diverged(f"The loss of step {self.step} is {loss}, at learning rate {rate:g}.", step=self.step)

    def check_parameters(self) -> None:
        """Refuse what no step can go on from: a loss can be finite where its gradient is not.

        Raises
        ------
        Diverged
            If a parameter is not finite, and the recipe says that this ends the run.
        """
        if not self.recipe.stop_on_nonfinite:
            return
        for name, parameter in self.model.named_parameters():
            # A sum is not finite if any term is not, and is cheap; an overflow of the sum alone is looked at again.
            values = parameter.detach()
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise Diverged(
                    f"Parameter {name} is not finite after {self.step} steps, at learning rate "
                    f"{learning_rate(self.optimizer):g}: an update since step {self.committed_step} made it so.",
                    step=self.step,
                )

    def _schedule(self) -> None:
        if self.scheduler is None:
            return
        at_epoch_end = (self.step + 1) % self.recipe.order.steps_per_epoch == 0
        if self.recipe.scheduler_every == "step" or at_epoch_end:
            self.scheduler.step()

    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate; the next commit keeps it."""
        set_learning_rate(self.optimizer, value, self.scheduler)
        self._changed = True

    def take_records(self) -> list[StepRecord]:
        """The accounts of the steps since the last call."""
        records, self.records = self.records, []
        return records

    def live_state(self) -> State:
        """The present state, whose tensors are the ones in use."""
        return {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.model.named_parameters()},
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }

    def commit(self) -> float:
        """Keep the present state, to which a roll-back returns; says how many seconds that took."""
        began = perf_counter()
        if self._changed:
            self.go_on()
            self._commits.keep(self.live_state())
            self._changed = False
        return perf_counter() - began

    def go_on(self) -> None:
        """Make ready for more steps without a commit; done by every commit too, so that all workers do it alike."""
        prefer_fused(self.optimizer)

    def commit_to(self, commits: Commits) -> None:
        """Keep commits elsewhere from now on; the present state must be there already."""
        self._commits, self._changed = commits, False

    @property
    def committed_step(self) -> int:
        """Steps done at the last commit."""
        return self._commits.step

    def roll_back(self) -> None:
        """Return to the last commit."""
        self._return_to(self._commits.step)

    def state_of(self, step: int) -> State | None:
        """The present state or a commit, if one of them is of this step; not to be changed."""
        return self.live_state() if self.step == step and not self._torn else self._commits.of_step(step)

    def _return_to(self, step: int) -> bool:
        """Return to the commit of a step; says whether there is one."""
        state = self._commits.of_step(step)
        if state is not None:
            self.load(state)
        return state is not None

    def fall_back(self, step: int) -> bool:
        """Go back to a step that every member of the group has finished; says whether that state is here.

        It is a commit; or the present state, of a member that finished a segment and was never told to begin the next,
        or had not come to an update in it.
        """
        if self._return_to(step):
            return True
        if self.step != step or self._torn:
            return False
        self._forget_accounts()
        self.commit()
        return True

    def _forget_accounts(self) -> None:
        self.records, self.spent = [], [0.0] * len(self.spent)

    def load(self, state: State) -> None:
        """Go to a state, and commit it."""
        self.unshare()
        load_model_state(self.model, state)
        self.optimizer.load_state_dict(copy_state(state["optimizer"]))
        for group, chosen in zip(self.optimizer.param_groups, self._fused, strict=True):
            group.update(chosen)  # it may have been another kind of device's
        if self.scheduler and state["scheduler"] is not None:
            self.scheduler.load_state_dict(copy_state(state["scheduler"]))
        self.step = int(state["step"])
        self._torn = False
        self._forget_accounts()
        self._changed = True
        self.commit()


@contextmanager
def _running_statistics_for(model: nn.Module, rows: int) -> Iterator[None]:
    """A single row has no statistics of its own: batch normalisation then uses the running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if rows == 1 else []
    training = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in training:
        norm.training = False
    try:
        yield
    finally:
        for norm in training:
            norm.training = True


def load_model_state(model: nn.Module, state: State) -> None:
    """Copy the parameters and buffers of a state into a model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["parameters"][name])
        for name, buffer in model.named_buffers():
            buffer.copy_(state["buffers"][name])


def average_buffers(model: nn.Module, every: Sequence[Mapping[str, Tensor]]) -> None:
    """Set a model's buffers from those of all workers: running statistics to their means, others to the first's."""
    for name, buffer in model.named_buffers():
        values = [buffers[name] for buffers in every]
        # In doubles, because a sum of numbers at the edge of a type's range lies outside it.
        buffer.copy_(torch.stack(values).double().mean(0) if buffer.is_floating_point() else values[0])


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer evaluates the loss itself, several times a step."""
    return isinstance(optimizer, torch.optim.LBFGS)


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three numbers; neighbours land far apart."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
