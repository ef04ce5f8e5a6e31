"""The replicated engine: each worker has the whole model, and all make the same update.

A step is a function of (seed, step, share): random numbers that a model draws (dropout masks) come from a generator
seeded by (seed, step, rank), so a step that is done again draws the same ones. Where the workers of a host share
memory, each updates its own slice of what lies there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from parakit.checkpoints.in_shared_memory import Room
from parakit.checkpoints.state import State, copy_state
from parakit.data.local_chunks import LocalChunks
from parakit.engines import optimizers
from parakit.engines.account import StepRecord
from parakit.engines.base import Collected, Engine, Group, GroupNeeds
from parakit.engines.evaluation import ROWS_AT_ONCE, Tally, tally
from parakit.engines.fused_updates import prefer_fused
from parakit.engines.passes import passes_for
from parakit.engines.recipe import Parts, Recipe, load_parts
from parakit.engines.sharded_update import Shard, can_shard, common_nbytes
from parakit.engines.step import Updater, gradient, update
from parakit.engines.turns import Turns
from parakit.engines.whole_update import WholeUpdate
from parakit.errors import Diverged
from parakit.gradients.gradient_buffer import GradientBuffer
from parakit.gradients.gradient_sum import Counts, GradientSlice, GradientSum, flatten, unflatten_into
from parakit.model_state.agreement import Agreement
from parakit.model_state.buffers import buffers_of
from parakit.model_state.hooks import ParameterHooks
from parakit.model_state.peers import ALONE
from parakit.system.devices import CPU
from parakit.tensor_layout import shaped_like

__all__ = ["Replica"]

_LARGE_SLICE = 1 << 18  # bytes of a gradient; to copy a smaller one takes less time than to leave it in its pieces


class Replica(Engine):
    """A model in training on one worker.

    Parameters
    ----------
    recipe : Recipe
    parts : Parts, optional
        A living copy of the recipe's, for this engine alone; made here by default.
    device : torch.device
        Where it computes.
    """

    def __init__(self, recipe: Recipe, parts: Parts | None = None, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.recipe = recipe
        self._parts = parts = recipe.parts() if parts is None else parts
        self.strategy = parts.strategy
        self.model = parts.model.to(device)
        self.loss = recipe.loss_of(parts).on(device)
        parameters = list(self.model.parameters())
        self.hooks = ParameterHooks(parameters)
        self.buffer = GradientBuffer([p for p in parameters if p.requires_grad])
        self.passes = passes_for(recipe, self.model, self.loss, self.buffer, self.hooks.functions)
        self.optimizer = parts.optimizer(parameters)
        optimizers.set_mode(self.optimizer, "train")
        self.scheduler = parts.scheduler(self.optimizer) if parts.scheduler else None
        self._fused = [{"fused": group["fused"]} if "fused" in group else {} for group in self.optimizer.param_groups]
        traits = recipe.traits
        self.agreement = Agreement(self.passes, traits.rules, traits.counted, watched=recipe.check > 0)
        self._whole_update = WholeUpdate(self.optimizer, self.buffer, self.hooks, closure=traits.closure)
        #: How the sum of a batch becomes an update.
        self.updater: Updater = self._whole_update
        self.go_on()

    # --- a step

    def gradient(self, step: int, chunks: LocalChunks, rank: int) -> GradientSum:
        """The summed gradient of this worker's share of a step: of the buffer, so the next call overwrites it."""
        return gradient(self, step, chunks, rank)

    def update(self, summed: Callable[[], Any]) -> None:
        """Do one step of the optimizer, by the gradient over the whole batch."""
        update(self, summed)

    def sum_for_update(self, part: GradientSum) -> Counts:
        """The sum of every member's part; of this member's slice alone, where the update is divided."""
        if not self.sharded:
            return self.all_reduce(part)
        assert self._group is not None
        vector, own = self.buffer.detach_slice(part)
        summed = self._group.reduce_scatter(vector, tail=part.tail, own=own)
        return GradientSlice(summed.pieces, summed.tail, part.unit)

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group; NaN where an optimizer has none."""
        return optimizers.learning_rate(self.optimizer)

    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate; the next commit keeps it."""
        optimizers.set_learning_rate(self.optimizer, value, self.scheduler)
        self._dirty = True

    # --- the group

    @property
    def needs(self) -> GroupNeeds:
        """The size of the gradient; and memory in common, if the update can be divided."""
        return GroupNeeds(self.buffer.numel, self.buffer.dtype, self._common_nbytes())

    def _common_nbytes(self) -> int:
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
        return isinstance(self.updater, Shard)

    def join(self, group: Group) -> None:
        """Belong to a group: gradients live where it adds them, and the update is divided where that can be."""
        self._group = group
        self.passes.peers = ALONE if group.size == 1 else group
        vector = self.buffer.fresh_vector() if group.vector is None else group.vector
        kept = self._share(group) if group.divides else None
        self.buffer.live_in(vector, alone=group.size == 1, kept=kept)
        self.own_memory()

    def _share(self, group: Group) -> slice | None:
        """Update a slice from now on; says where it is, if it is to stay where torch makes it."""
        shard = Shard(self.optimizer, self.buffer.parameters, group)
        self.updater = shard
        self.account.forget_seconds()  # no step has begun
        large = (shard.where.stop - shard.where.start) * self.buffer.dtype.itemsize >= _LARGE_SLICE
        return shard.where if large else None

    def leave(self) -> None:
        """Belong to no group, and hold everything in this process's own memory again."""
        self._group, self.passes.peers = None, ALONE
        shard, self.updater = self.updater, self._whole_update
        if isinstance(shard, Shard):
            shard.leave()

    def own_memory(self) -> None:
        """Hold what changes in memory of this process's own, rather than in a copy that is made page by page."""
        if self.recipe.frozen.ties or self.device.type != "cpu":
            return
        changing = list(buffers_of(self.model, self.loss.function).values())
        changing += [] if self.sharded else self.buffer.parameters
        for tensor in changing:
            flat = tensor.new_empty(tensor.numel())
            tensor.data = shaped_like(flat, tensor).copy_(tensor)

    # --- the end of a segment

    def finish_segment(self, *, alone: bool) -> None:
        """Average running statistics, and see that all have alike what they should, and that it is finite."""
        self._check_parameters()
        self.agreement.check_structure(alone=alone)
        if self._group is None or alone:
            return
        marks = torch.tensor(self.agreement.marks(), dtype=torch.float64)
        together = marks.clone()
        self._group.average([*self.averaged_buffers, together])
        self.agreement.check(marks.tolist(), together.tolist())

    @property
    def averaged_buffers(self) -> list[Tensor]:
        """Buffers that workers average when they commit: running statistics, which are means over what each saw."""
        return self.passes.buffers.statistics()

    def _check_parameters(self) -> None:
        """Refuse what no step can go on from: a loss can be finite where its gradient is not."""
        if not self.recipe.stop_on_nonfinite:
            return
        for name, parameter in self.model.named_parameters():
            # A sum is not finite if any term is not, and is cheap; an overflow of the sum alone is looked at again.
            values = parameter.detach()
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise Diverged(
                    f"Parameter {name} is not finite after {self.step} steps, at learning rate "
                    f"{self.learning_rate:g}: an update since step {self.committed_step} made it so.",
                    step=self.step,
                )

    # --- the state

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

    def commit(self) -> float:
        """Keep the present state; attributes that began to change in the middle of the run are a part of it."""
        if self._dirty:
            self.agreement.count_late()
        return super().commit()

    def go_on(self) -> None:
        """Use torch's fused update where the optimizer can by now, and look closely at the next step."""
        prefer_fused(self.optimizer)
        self.passes.look_closely()

    def restore(self, state: State) -> None:
        """Take over a state."""
        shard, self.updater = self.updater, self._whole_update
        if isinstance(shard, Shard):
            shard.leave()
        counted = self.agreement.completed(state.get("attributes") or {})
        load_parts(self._parts, {**state, "attributes": counted}, self.passes.attributes)
        self.passes.buffers.forget()
        self.optimizer.load_state_dict(copy_state(state["optimizer"]))
        for group, chosen in zip(self.optimizer.param_groups, self._fused, strict=True):
            group.update(chosen)  # it may have been another kind of device's
        optimizers.lay_out_state(self.optimizer)
        optimizers.set_mode(self.optimizer, "train")
        if self.scheduler and state["scheduler"] is not None:
            self.scheduler.load_state_dict(copy_state(state["scheduler"]))

    # --- evaluation

    def tally(self, chunks: LocalChunks) -> Tally:
        """Evaluate the present model on the rows held; where a loss looks at a whole piece, chunk by chunk."""
        traits, total = self.recipe.traits, Tally()
        pieces = chunks.each.values() if traits.gather else [held] if (held := chunks.samples) is not None else []
        with optimizers.evaluation_mode(self.optimizer):
            for piece in pieces:
                total += tally(
                    self.model, self.loss, piece, len(piece) if traits.gather else ROWS_AT_ONCE,
                    judging=traits.judged, needs_grad=traits.grad_in_evaluation, copies=traits.writes,
                )  # fmt: skip
        return total

    # --- where one engine updates, and others compute

    def values(self) -> State:
        """The parameters and buffers to evaluate; their tensors are the ones in use only until the next step."""
        with optimizers.evaluation_mode(self.optimizer):
            state = self.live_state()
            return copy_state({part: state[part] for part in ("parameters", "buffers")})  # type: ignore[no-any-return]

    def show(self, values: State) -> None:
        """Have the parameters and buffers of another engine, as to evaluate them."""
        load_parts(self._parts, values)

    def flat_parameters(self) -> Tensor:
        """All parameters in one vector, for the `gradient_at` of others."""
        return flatten(self.model.parameters(), self.buffer.dtype)

    def gradient_at(self, parameters: Tensor, step: int, chunks: LocalChunks, rank: int) -> GradientSum:
        """The gradient of a share at the parameters of another engine; what else there is to tell, `collect` tells."""
        began = perf_counter()
        unflatten_into(parameters, list(self.model.parameters()))
        part, account = self.gradient(step, chunks, rank).on_cpu(), self.account
        wall = perf_counter() - began
        account.record(StepRecord(step, math.nan, math.nan, account.seconds, wall, account.rows))
        return part

    def collect(self, *, alone: bool) -> Collected:
        """What the shares since the last call left here."""
        self.agreement.check_structure(alone=alone)
        buffers = {name: b.clone().cpu() for name, b in self.passes.buffers.there.items()}
        return Collected(self.account.take_records(), buffers, self.agreement.state(), self.agreement.marks())

    def adopt(self, collected: Sequence[Collected]) -> None:
        """Have what shares left on other workers: what all have alike, and the means of what they do not."""
        self.passes.buffers.take([one.buffers for one in collected])
        for other in collected[1:]:
            self.agreement.check(collected[0].marks, other.marks)
        self.passes.attributes.write(collected[0].attributes)

    # --- where workers take turns with one engine

    def turns(self, own: dict[int, dict[str, Tensor]]) -> Turns:
        """Let workers compute the shares of a step one after the other."""
        return Turns(self.passes, self.agreement, self.recipe.traits.rules, own)

    def lend(self) -> Callable[[], None]:
        """Use variables that the model shares with this process; what is returned gives them back as they were."""
        attributes = self.passes.attributes
        lent = attributes.shared(self.recipe.traits.counted)
        return lambda: attributes.restore(lent)
