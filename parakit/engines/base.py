"""The engine of a worker: what trains there.

An engine holds the model, the optimizer and the schedule of one worker, or its part of them. A member, a session in one
process and the team that runs beside the notebook know it by what stands here alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from parakit.checkpoints.in_memory import InMemorySnapshots
from parakit.checkpoints.in_shared_memory import Room
from parakit.checkpoints.state import Snapshots, State
from parakit.collectives.base import Summed
from parakit.data.local_chunks import LocalChunks
from parakit.engines.account import StepAccount, StepRecord
from parakit.engines.evaluation import Tally
from parakit.engines.turns import Turns
from parakit.gradients.gradient_sum import Counts, GradientSum

__all__ = ["Collected", "Engine", "Group", "GroupNeeds"]

_NO_TASKS = "this engine is for strategies that run on the workers"


class GroupNeeds(NamedTuple):
    """What an engine needs of the group that it is to join: the vector it adds most often, and bytes in common."""

    numel: int
    dtype: torch.dtype
    common: int


class Group(Protocol):
    """The members of a group, as the engine of one of them sees it. Each verb is called by all, in the same order.

    Attributes
    ----------
    rank, size : int
    vector : tensor or None
        Zero, of the size that the engine needs: from it the group adds without a copy. None if any place is as good.
    divides : bool
        Whether the members of a host have memory in common and `reduce_scatter`, and so can divide the update.
    """

    rank: int
    size: int
    vector: Tensor | None
    divides: bool

    def sum(self, values: Tensor) -> None:
        """Replace numbers by their sums over all members."""

    def sum_gradient(self, vector: Tensor, tail: int) -> None:
        """The same for a gradient, whose last elements, so many, are counts."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all members."""

    def reduce_scatter(self, vector: Tensor, *, tail: int, own: Sequence[Tensor] | None) -> Summed:
        """The slice of this member, of the sum of every member's vector."""

    def memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A vector in memory that the members of a host map."""

    def slice_of(self, numel: int) -> slice:
        """The part of such a vector that is this member's."""

    def barrier(self) -> None:
        """Wait for them; what each wrote before is then seen by all."""

    def add(self, values: Tensor) -> None:
        """Replace a few numbers by their sums over them."""


@dataclass(frozen=True)
class Collected:
    """What shares that were computed for somebody else's update left on one worker.

    Attributes
    ----------
    records : list of StepRecord
    buffers : dict of str to Tensor
        Of its model.
    attributes : dict
        Of its model and its loss, as far as they are a part of the state.
    marks : list of float
        Of what all workers have alike.
    """

    records: list[StepRecord]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]
    marks: list[float]


class Engine(ABC):
    """What trains on one worker. Owns the committed states; refuses to know how orders come, and who the others are.

    A step is `gradient`, the sum over the workers, and `update`, in the order of `parakit.engines.step`. Until it joins
    a group, and after it leaves it, an engine is alone: then it holds everything, and its state is that of the run.

    Parameters
    ----------
    device : torch.device
        Where it computes.
    """

    #: Whether each member of a group holds the whole state of the run. Where it holds a part, the state of the run is
    #: what `merge` makes of the states of all members, and nobody keeps commits for others.
    whole: ClassVar[bool] = True
    #: The strategy, where it came along with the model.
    strategy: Any

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.account = StepAccount(device)
        #: Steps done.
        self.step = 0
        self._group: Group | None = None
        self._commits: Snapshots = InMemorySnapshots()
        self._dirty = True  # since the last commit
        #: Whether an update has begun and not come to its end: then the state is of no step.
        self._mid_update = False

    # --- the group

    @property
    @abstractmethod
    def needs(self) -> GroupNeeds:
        """What it needs of a group."""

    @abstractmethod
    def join(self, group: Group) -> None:
        """Belong to a group; all of its members have the same state. It may be a group of one."""

    @abstractmethod
    def leave(self) -> None:
        """Belong to no group; what others hold is not asked for any more."""

    # --- a step

    @abstractmethod
    def gradient(self, step: int, chunks: LocalChunks, rank: int) -> GradientSum:
        """The summed gradient of this worker's share of a step; the next call may overwrite it.

        Parameters
        ----------
        step : int
        chunks : LocalChunks
        rank : int
            Seeds, with the step, the random numbers that the model draws.
        """

    def all_reduce(self, part: GradientSum) -> GradientSum:
        """The sum of every member's part."""
        if self._group is not None and self._group.size > 1:
            self._group.sum_gradient(part.vector, part.tail)
        return part

    def sum_for_update(self, part: GradientSum) -> Counts:
        """The same, as far as the update needs it here."""
        return self.all_reduce(part)

    @abstractmethod
    def update(self, summed: Callable[[], Any]) -> None:
        """Do one step of the optimizer, by the gradient over the whole batch.

        Parameters
        ----------
        summed : callable
            Returns the sum over the global batch at the present parameters. Called once; more often for an
            optimizer that evaluates its step several times, such as LBFGS.
        """

    def measure_norms(self) -> None:
        """Measure the norms of gradients in the next step."""
        self.account.measuring = True

    @abstractmethod
    def finish_segment(self, *, alone: bool) -> None:
        """Bring together what no step needs of the others, and refuse what no step can go on from.

        Parameters
        ----------
        alone : bool
            Whether no other worker takes part.

        Raises
        ------
        Diverged
            If a parameter is not finite, and the recipe says that this ends the run.
        ModelError
            If workers have come to different values of what they should have alike.
        """

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Of the first parameter group; NaN where an optimizer has none."""

    @abstractmethod
    def set_learning_rate(self, value: float) -> None:
        """Go on at another learning rate; the next commit keeps it."""

    @abstractmethod
    def tally(self, chunks: LocalChunks) -> Tally:
        """Evaluate the present model on the rows held."""

    # --- where one engine updates, and others compute: by default, none of that

    def values(self) -> State:
        """The parameters and buffers to evaluate, as a copy."""
        raise NotImplementedError(_NO_TASKS)

    def show(self, values: State) -> None:
        """Have the parameters and buffers of another engine, as to evaluate them."""
        raise NotImplementedError(_NO_TASKS)

    def flat_parameters(self) -> Tensor:
        """All parameters in one vector, for the `gradient_at` of others."""
        raise NotImplementedError(_NO_TASKS)

    def gradient_at(self, parameters: Tensor, step: int, chunks: LocalChunks, rank: int) -> GradientSum:
        """The gradient of a share at the parameters of another engine; what else there is to tell, `collect` tells."""
        raise NotImplementedError(_NO_TASKS)

    def collect(self, *, alone: bool) -> Collected:
        """What the shares since the last call left here."""
        raise NotImplementedError(_NO_TASKS)

    def adopt(self, collected: Sequence[Collected]) -> None:
        """Have what shares left on other workers: what all have alike, and the means of what they do not."""
        raise NotImplementedError(_NO_TASKS)

    # --- several workers in one process

    @abstractmethod
    def own_memory(self) -> None:
        """Hold what changes in memory of this process's own, rather than in a copy that is made page by page."""

    @abstractmethod
    def turns(self, own: dict[int, dict[str, Tensor]]) -> Turns:
        """Let workers compute the shares of a step one after the other; `own` keeps what each has for itself."""

    @abstractmethod
    def lend(self) -> Callable[[], None]:
        """Use variables that the model shares with this process; what is returned gives them back as they were."""

    # --- the state

    @abstractmethod
    def live_state(self) -> State:
        """The present state, or this member's part of it; its tensors are the ones in use."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Take over a state, which stays as it is: of the run, or what this member's `live_state` was in its group."""

    @classmethod
    def merge(cls, states: Sequence[State]) -> State:
        """The state of the run, from those of all members in the order of their ranks."""
        return states[0]

    @property
    @abstractmethod
    def room(self) -> Room:
        """What the states of this run will take, as far as can be foreseen; the same on all members, at all times."""

    @abstractmethod
    def go_on(self) -> None:
        """Make ready for more steps without a commit; done by every commit too, so that all workers do it alike."""

    def load(self, state: State) -> None:
        """Go to a state, and commit it."""
        self.restore(state)
        self.step = int(state["step"])
        self._dirty, self._mid_update = True, False
        self.account.forget()
        self.commit()

    def begin_update(self) -> None:
        """From now on, and until `end_update`, the state is of no step."""
        # From when this worker's gradient can be summed, others may update their slices of memory in common.
        self._dirty = self._mid_update = True

    def end_update(self) -> None:
        """A step is done."""
        self.step += 1
        self._mid_update = False

    def commit(self) -> float:
        """Keep the present state, to which a roll-back returns; says how many seconds that took."""
        began = perf_counter()
        if self._dirty:
            self.go_on()
            self._commits.keep(self.live_state())
            self._dirty = False
        return perf_counter() - began

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

    def _return_to(self, step: int) -> bool:
        """Return to the commit of a step; says whether there is one."""
        state = self._commits.of_step(step)
        if state is not None:
            self.load(state)
        return state is not None

    def state_of(self, step: int) -> State | None:
        """The present state or a commit, if one of them is of this step; not to be changed."""
        return self.live_state() if self.step == step and not self._mid_update else self._commits.of_step(step)

    def fall_back(self, step: int) -> bool:
        """Go back to a step that every member of the group has finished; says whether that state is here.

        It is a commit; or the present state, of a member that finished a segment and was never told to begin the next,
        or had not come to an update in it.
        """
        if self._return_to(step):
            return True
        if self.step != step or self._mid_update:
            return False
        self.account.forget()
        self.commit()
        return True
