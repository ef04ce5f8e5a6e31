"""Recipes: what is trained and how, at rest, and what was found out about it when it was tried.

A recipe is the same on every worker and never changes in a run. The model and all the code that belongs to it are one
frozen copy, from which each worker makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from parakit.checkpoints.state import State
from parakit.data.chunks import EpochOrder
from parakit.losses.summed import Form, SummedLoss
from parakit.model_state.attributes import Attributes
from parakit.model_state.buffers import Rule, buffers_of
from parakit.serialization import Frozen, freeze
from parakit.system.process_settings import Draws, Settings

__all__ = ["OptimizerFactory", "Parts", "Recipe", "SchedulerFactory", "Traits", "load_parts"]

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass
class Parts:
    """A model, and the code that belongs to it: they may know each other, so they are copied together.

    Attributes
    ----------
    model : nn.Module
    loss : callable
        The user's.
    optimizer : callable
        Makes the optimizer from the list of parameters.
    scheduler : callable or None
        Makes a learning-rate scheduler from the optimizer.
    strategy : Strategy or None
        What is run on the workers: it may share module-wide variables with the model.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Any]
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    strategy: Any = None


@dataclass(frozen=True)
class Traits:
    """What a model, a loss and an optimizer do beyond computing rows one by one, as far as trying them told.

    Attributes
    ----------
    form : Form
        In which the loss adds up over shares.
    calls : int
        Means over classes that it calls for.
    closure : bool
        Whether the optimizer evaluates the loss itself, several times a step.
    grad_in_evaluation : bool
        Whether evaluating needs gradients, as of energies.
    draws : Draws
        From whose generators of random numbers they draw.
    noisy : bool
        Whether there are draws from torch's that no layer of torch's makes: those can be silenced, these replaced.
    rules : mapping of str to Rule
        Of each buffer that forward changes.
    counted, passing : tuple of str
        Attributes that are a part of the state, and those that only hold what the last rows left.
    rewrites : tuple of str
        Parameters that forward changes itself.
    synchronised : bool
        Whether batch normalisation goes over all workers.
    gather : bool
        Whether the loss gets the outputs of the whole batch.
    judged : bool
        Whether an accuracy means something.
    writes : bool
        Whether forward or the loss writes to the rows that they are given.
    """

    form: Form = "mean"
    calls: int = 0
    closure: bool = False
    grad_in_evaluation: bool = False
    draws: Draws = field(default_factory=Draws)
    noisy: bool = False
    rules: Mapping[str, Rule] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    synchronised: bool = False
    gather: bool = False
    judged: bool = True
    writes: bool = False

    @property
    def meets(self) -> bool:
        """Whether workers speak to each other in the middle of a step."""
        return (
            self.synchronised
            or self.gather
            or self.form == "several means"
            or bool(self.rewrites)
            or any(rule not in ("statistics", "alike", "own") for rule in self.rules.values())
        )

    @property
    def stands_in(self) -> bool:
        """Whether a worker without rows in a step has to go through its motions, to keep up with the others."""
        return self.meets or bool(self.counted) or "alike" in self.rules.values()

    @property
    def undivided(self) -> bool:
        """Whether workers that take turns in one process have to take the whole batch at once."""
        return self.synchronised or self.gather or self.form == "several means" or bool(self.rewrites)


@dataclass(frozen=True)
class Recipe:
    """What to train and how: the same on every worker, and never changed in a run.

    Parameters
    ----------
    frozen : Frozen
        Of `Parts`.
    traits : Traits
    scheduler_every : {"epoch", "step"}
        When the scheduler steps.
    clip_norm : float, optional
        The largest 2-norm of the global gradient; larger ones are scaled down to it.
    seed : int
    order : EpochOrder
    stop_on_nonfinite : bool
        Whether a loss or a parameter that is NaN or infinite ends the run.
    settings : Settings
        Of the process that all this comes from.
    check : float
        Share of the time in which it is looked at whether the gradient of a batch is the sum of its parts'.
    """

    frozen: Frozen = field(repr=False)
    traits: Traits
    scheduler_every: str
    clip_norm: float | None
    seed: int
    order: EpochOrder
    stop_on_nonfinite: bool = True
    settings: Settings = field(default_factory=Settings)
    check: float = 0.0

    @classmethod
    def of(cls, parts: Parts, traits: Traits, **how: Any) -> Recipe:
        """A recipe of parts that are alive, and stay as they are."""
        model = parts.model
        own = [*model.modules(), *model.parameters(), *model.buffers()]
        return cls(freeze(parts, own=own).at_rest(), traits, **how)

    def parts(self) -> Parts:
        """A living copy."""
        parts: Parts = self.frozen.thaw()
        return parts

    def loss_of(self, parts: Parts) -> SummedLoss:
        """The loss of a living copy, as a sum."""
        return SummedLoss(parts.loss, self.traits.form, self.traits.calls)


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
