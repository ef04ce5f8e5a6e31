"""A replica: one worker's copy of what is trained.

Owns the model, the optimizer, the schedule and the committed state of one process; refuses to know how gradients
travel. A step is a function of (seed, step, share): random numbers that a model draws (dropout masks) come from a
generator seeded by (seed, step, rank), so a step that is done again draws the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from parakit.checkpoints.in_memory import InMemorySnapshots
from parakit.checkpoints.in_shared_memory import Room
from parakit.checkpoints.state import Snapshots, State, copy_state
from parakit.data.local_chunks import LocalChunks
from parakit.engines.base import StepRecord
from parakit.engines.evaluation import ROWS_AT_ONCE, Tally, tally
from parakit.engines.fused_updates import prefer_fused
from parakit.engines.optimizers import learning_rate, set_learning_rate
from parakit.engines.recipe import Parts, Recipe
from parakit.engines.sharded_update import Common, Shard, can_shard, common_nbytes
from parakit.engines.share_gradient import DATA, ShareGradient
from parakit.errors import Diverged
from parakit.events.records import PHASES
from parakit.gradients.gradient_buffer import GradientBuffer
from parakit.gradients.gradient_sum import GradientSum
from parakit.model_state.agreement import Agreement
from parakit.model_state.attributes import Attributes
from parakit.model_state.buffers import buffers_of
from parakit.model_state.hooks import ParameterHooks
from parakit.model_state.peers import Peers
from parakit.system.devices import CPU, finish
from parakit.tensor_layout import shaped_like

__all__ = [
    "Replica",
    "evaluated",
    "load_parts",
    "set_mode",
]

_LARGE_SLICE = 1 << 18  # bytes of a gradient; to copy a smaller one takes less time than to leave it in its pieces
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_

EXCHANGE, UPDATE = (PHASES.index(p) for p in PHASES[3:5])


class Replica:
    """A model in training on one worker.

    Parameters
    ----------
    recipe : Recipe
    device : torch.device
        Where it computes.
    """

    def __init__(self, recipe: Recipe, device: torch.device = CPU) -> None:
        self.device, self.recipe = device, recipe
        parts = recipe.parts()
        self.model = parts.model.to(device)
        self.loss = recipe.loss_of(parts).on(device)
        self._parts = parts
        parameters = list(self.model.parameters())
        self.hooks = ParameterHooks(parameters)
        self.buffer = GradientBuffer([p for p in parameters if p.requires_grad])
        self.computation = ShareGradient(recipe, self.model, self.loss, self.buffer, device, self.hooks.functions)
        self.optimizer = parts.optimizer(parameters)
        set_mode(self.optimizer, "train")
        self.scheduler = parts.scheduler(self.optimizer) if parts.scheduler else None
        self._fused = [{"fused": group["fused"]} if "fused" in group else {} for group in self.optimizer.param_groups]
        self.agreement = Agreement(
            self.computation, recipe.traits.rules, recipe.traits.counted, watched=recipe.check > 0
        )
        self.step = 0
        self.records: list[StepRecord] = []
        self.phase_seconds = [0.0] * (len(PHASES) - 1)
        self.local_rows = 0
        #: Squared norm of the share's mean gradient; None in a step that does not measure it.
        self.share_norm: float | None = None
        self._measuring = False
        self._shard: Shard | None = None
        self._commits: Snapshots = InMemorySnapshots()
        self._dirty = True  # since the last commit
        #: Whether an update has begun and not come to its end: then the state is of no step.
        self._mid_update = False
        self.go_on()

    @property
    def strategy(self) -> Any:
        """The strategy, where it came along."""
        return self._parts.strategy

    @property
    def averaged_buffers(self) -> list[Tensor]:
        """Buffers that workers average when they commit: running statistics, which are means over what each saw."""
        return self.computation.buffers.statistics()

    def speak_to(self, peers: Peers) -> None:
        """Belong to a group, whose workers may speak to each other in the middle of a step."""
        self.computation.peers = peers

    def gradient(self, step: int, holding: LocalChunks, rank: int) -> GradientSum:
        """The summed gradient of this worker's share of a step.

        Parameters
        ----------
        step : int
        holding : LocalChunks
        rank : int
            Seeds, with the step, the random numbers that the model draws.

        Returns
        -------
        GradientSum
            A view of this replica's buffer: the next call overwrites it.
        """
        start = perf_counter()
        share = holding.share(step)
        if self.recipe.traits.gather:
            self.computation.places = holding.places(step)
        finish(self.device)
        self.phase_seconds[DATA] += perf_counter() - start
        self.computation.compute(step, share, holding.spare, _mix(self.recipe.seed, step, rank), self.phase_seconds)
        self.local_rows = len(share) if share is not None else 0
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
        before = sum(self.phase_seconds)
        rate = learning_rate(self.optimizer)
        # From when this worker's gradient can be summed, others may update their slices of the memory in common.
        self._dirty = self._mid_update = True
        if self._shard is None:
            loss, norms = self._update_whole(summed, rate)
        else:
            loss, norms = self._update_shard(self._shard, summed(), rate)
        self._schedule()
        finish(self.device)
        wall = perf_counter() - began
        self.phase_seconds[UPDATE] += wall - (sum(self.phase_seconds) - before)
        self.records.append(StepRecord(self.step, loss, rate, self.phase_seconds, wall, self.local_rows, norms))
        self.phase_seconds = [0.0] * len(self.phase_seconds)
        self.step += 1
        self._mid_update = self._measuring = False

    def _update_whole(self, summed: Callable[[], GradientSum], rate: float) -> tuple[float, tuple[float, float] | None]:
        """Update all parameters; returns the loss, and the norms if they are measured."""
        losses: list[float] = []
        norms: tuple[float, float] | None = None

        def evaluate() -> Tensor:
            nonlocal norms
            with torch.enable_grad():
                total = summed()
            losses.append(self._loss_of(total))
            self.buffer.load(total)
            if len(losses) == 1:  # a line search may well try what is not finite
                self._check_loss(losses[0], rate)
                if self.share_norm is not None:
                    gradient = self.buffer.sum.total
                    norms = self.share_norm, float(torch.dot(gradient, gradient))
            self.hooks.call()
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.buffer.parameters, self.recipe.clip_norm)
            return torch.tensor(losses[-1], dtype=torch.float64)

        if self.recipe.traits.closure:
            self.optimizer.step(evaluate)  # type: ignore[arg-type]  # as torch's own may return tensors too
        else:
            evaluate()
            self.optimizer.step()
        return losses[0], norms

    def _update_shard(self, shard: Shard, total: GradientSum, rate: float) -> tuple[float, tuple[float, float] | None]:
        """Update this worker's slice of the parameters, as others do theirs; returns the same."""
        loss = self._loss_of(total)
        self._check_loss(loss, rate)
        shard.read(total.pieces)
        shard.divide(total.divisor)
        squared = float("nan")
        if self.share_norm is not None or self.recipe.clip_norm is not None:
            squared = shard.squared_norm()
        if self.recipe.clip_norm is not None:
            shard.divide(max(1.0, (math.sqrt(squared) + _CLIP_EPSILON) / self.recipe.clip_norm))
        shard.step(total.used)
        return loss, None if self.share_norm is None else (self.share_norm, squared)

    def _loss_of(self, total: GradientSum) -> float:
        """The loss of a batch; not a number if it is a mean over nothing, as where every label is ignored."""
        return math.nan if self.loss.divides and total.count == 0 else total.mean_loss

    # --- sharing

    @property
    def common_nbytes(self) -> int:
        """Bytes of common memory in which workers can divide the update among them; 0 if they cannot."""
        trained = self.buffer.parameters
        if not trained or not self.buffer.direct or not can_shard(self.optimizer, trained):
            return 0
        # Who looks at whole gradients, or holds on to the memory of a parameter, does not get along with slices.
        if self.hooks or self.recipe.traits.rewrites or self.recipe.frozen.ties:
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
            self.buffer.leave_slice(where)
        self.phase_seconds = [0.0] * len(self.phase_seconds)  # no step has begun

    def unshare(self) -> None:
        """Hold everything in this process's own memory again."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.leave()

    def own_memory(self) -> None:
        """Hold what changes in memory of this process's own, rather than in a copy that is made page by page."""
        if self.recipe.frozen.ties or self.device.type != "cpu":
            return
        changing = list(buffers_of(self.model, self.loss.function).values())
        changing += [] if self._shard is not None else self.buffer.parameters
        for tensor in changing:
            flat = tensor.new_empty(tensor.numel())
            tensor.data = shaped_like(flat, tensor).copy_(tensor)

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
        self._dirty = True

    def take_records(self) -> list[StepRecord]:
        """The accounts of the steps since the last call."""
        records, self.records = self.records, []
        return records

    def live_state(self) -> State:
        """The present state, whose tensors are the ones in use."""
        return {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.model.named_parameters()},
            "buffers": {name: b.detach() for name, b in buffers_of(self.model, self.loss.function).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "attributes": self.agreement.state(),
        }

    @property
    def room(self) -> Room:
        """What the states of this run will take, as far as can be foreseen; the same on all members, at all times."""
        buffers = buffers_of(self.model, self.loss.function).values()
        return Room.foreseen([*self.model.parameters(), *buffers], self.buffer.parameters)

    def tally(self, holding: LocalChunks) -> Tally:
        """Evaluate the present model on the rows held; where a loss looks at a whole piece, chunk by chunk."""
        traits, total = self.recipe.traits, Tally()
        pieces = holding.each.values() if traits.gather else [held] if (held := holding.samples) is not None else []
        with evaluated(self.optimizer):
            for piece in pieces:
                total += tally(
                    self.model, self.loss, piece, len(piece) if traits.gather else ROWS_AT_ONCE,
                    judging=traits.judged, needs_grad=traits.grad_in_evaluation, copies=traits.writes,
                )  # fmt: skip
        return total

    def show(self, values: State) -> None:
        """Have the parameters and buffers of somebody else, as to evaluate them."""
        load_parts(self._parts, values)

    def commit(self) -> float:
        """Keep the present state, to which a roll-back returns; says how many seconds that took."""
        began = perf_counter()
        if self._dirty:
            self.go_on()
            self.agreement.count_late()
            self._commits.keep(self.live_state())
            self._dirty = False
        return perf_counter() - began

    def go_on(self) -> None:
        """Make ready for more steps without a commit; done by every commit too, so that all workers do it alike."""
        prefer_fused(self.optimizer)
        self.computation.look_closely()

    def commit_to(self, commits: Snapshots) -> None:
        """Keep commits elsewhere from now on."""
        self._commits, self._dirty = commits, commits.step != self.step

    @property
    def committed_step(self) -> int:
        """Steps done at the last commit."""
        return self._commits.step

    def roll_back(self) -> None:
        """Return to the last commit."""
        self._return_to(self._commits.step)

    def state_of(self, step: int) -> State | None:
        """The present state or a commit, if one of them is of this step; not to be changed."""
        return self.live_state() if self.step == step and not self._mid_update else self._commits.of_step(step)

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
        if self.step != step or self._mid_update:
            return False
        self._forget_accounts()
        self.commit()
        return True

    def _forget_accounts(self) -> None:
        self.records, self.phase_seconds = [], [0.0] * len(self.phase_seconds)

    def load(self, state: State) -> None:
        """Go to a state, and commit it."""
        self.unshare()
        counted = self.agreement.completed(state.get("attributes") or {})
        load_parts(self._parts, {**state, "attributes": counted}, self.computation.attributes)
        self.computation.buffers.forget()
        self.optimizer.load_state_dict(copy_state(state["optimizer"]))
        for group, chosen in zip(self.optimizer.param_groups, self._fused, strict=True):
            group.update(chosen)  # it may have been another kind of device's
        _lay_out(self.optimizer)
        set_mode(self.optimizer, "train")
        if self.scheduler and state["scheduler"] is not None:
            self.scheduler.load_state_dict(copy_state(state["scheduler"]))
        self.step = int(state["step"])
        self._mid_update = False
        self._forget_accounts()
        self._dirty = True
        self.commit()


def load_parts(parts: Parts, state: State, attributes: Attributes | None = None) -> None:
    """Set the parameters, buffers and attributes of a model and its loss to those of a state."""
    buffers = buffers_of(parts.model, parts.loss)
    with torch.no_grad():
        parameters = dict(parts.model.named_parameters())
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
        for name in buffers.keys() & state["buffers"].keys():
            buffers[name].copy_(state["buffers"][name])
    if counted := state.get("attributes"):
        if attributes is None:
            Attributes(parts.model, parts.loss).write(counted, own=True)
        else:
            attributes.write(counted)


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Lay out what an optimizer keeps for its parameters as they are, as its own steps would: a state has one order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                laid = shaped_like(value.new_empty(value.numel()), parameter)
                state[name] = laid.copy_(value)


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Tell an optimizer that wants to know, such as a schedule-free one, whether its model trains or is evaluated."""
    tell = getattr(optimizer, mode, None)
    if callable(tell):
        tell()


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let parameters be those to evaluate, for an optimizer that trains others."""
    set_mode(optimizer, "eval")
    try:
        yield
    finally:
        set_mode(optimizer, "train")


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three numbers; neighbours land far apart."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
