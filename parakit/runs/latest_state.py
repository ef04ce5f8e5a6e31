"""The notebook's hold on what is trained: the newest state that this process can read, and its model.

Where workers commit to memory that this process maps, nothing is copied before somebody asks. Otherwise a copy is
fetched as often as a small share of the time allows. States are saved from here.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from torch import nn

from parakit.checkpoints import Saver
from parakit.checkpoints.in_shared_memory import SnapshotsReader
from parakit.checkpoints.state import State, copy_state
from parakit.engines.make import make_engine
from parakit.engines.optimizers import set_mode
from parakit.engines.recipe import Recipe, load_parts
from parakit.runs.state import Copied
from parakit.workers.session import Session

__all__ = ["LatestState"]

_FETCH_SHARE = 0.02  # of the time may go into fetching the state from a worker, with whom it could be lost
_LEAST_SECONDS = 1.0  # from one to the next: workers wait for orders meanwhile, or share the memory's bandwidth
_TRIES = 20
_SAVING_SECONDS = 30.0  # that the last checkpoint may take


class LatestState:
    """The newest state on the notebook's side.

    Parameters
    ----------
    recipe : Recipe
        Of what is trained.
    resumed : State or None
        What it began with, if not with the recipe's own.
    saver : Saver or None
        Gets a state as often as it is due, and the last one.
    say : callable
        Told what goes wrong with saving.
    """

    def __init__(self, recipe: Recipe, resumed: State | None, saver: Saver | None, say: Callable[[str], None]) -> None:
        self._saver = saver
        self._say = say
        self._saved = -1
        self._lock = threading.Lock()
        self._recipe = recipe
        self._resumed = resumed
        self._snapshots: SnapshotsReader | None = None  # in which the newest state is, if it is set
        self._state: State | None = None  # a copy, otherwise
        self._older: State | None = None
        self._model: nn.Module | None = None
        self._not_before = 0.0
        self._counted = 0  # steps of the run that count: there may be states of later ones
        self.step = 0
        if resumed is not None:
            self.take(resumed)

    @property
    def copied(self) -> Copied:
        """Of which step there is a state here, and when a newer one and a checkpoint are due."""
        save_at = math.inf if self._saver is None else self._saver.due_at
        return Copied(self.step if self._some else -1, self._not_before, save_at)

    def count(self, step: int) -> None:
        """Note how many steps of the run count."""
        self._counted = step

    def keep(self, session: Session, step: int, now: float, *, save: bool, busy: bool) -> None:
        """Have the state of a step, or a newer one than before; hand it on if it is to be saved.

        One that lies where this process can read it may be a segment older. While workers are busy with a segment that
        was ordered ahead, only such a one is taken.
        """
        if step != self.step or not self._some:
            began = time.perf_counter()
            if not self._found_in(session.snapshots, step):
                if busy:
                    return
                self.take(session.state(step))
            self._wait_after(now, began)
        if save:
            self._save(now)

    def keep_last(self, session: Session, step: int, now: float) -> None:
        """Have the state of this very step while nothing goes on, and save it."""
        self._counted = step
        if step != self.step or not self._some:
            began = time.perf_counter()
            session.settle()
            if not self._found_in(session.snapshots, step, final=True):
                self.take(session.state(step))
            self._wait_after(now, began)
        self._save(now)

    def _wait_after(self, now: float, began: float) -> None:
        self._not_before = now + max(_LEAST_SECONDS, (time.perf_counter() - began) / _FETCH_SHARE)

    @property
    def _some(self) -> bool:
        return self._snapshots is not None or self._state is not None

    def _found_in(self, snapshots: SnapshotsReader | None, step: int, *, final: bool = False) -> bool:
        """Take the newest state of shared snapshots for the present one, uncopied; says whether that is a newer one."""
        found = -1 if snapshots is None else snapshots.newest_step(step)
        if found < (step if final else 0) or (self._some and found <= self.step and not final):
            return False
        with self._lock:
            self._snapshots, self._state, self._older = snapshots, None, None
            if found != self.step:
                self._model = None
            self.step = found
        return True

    def _save(self, now: float) -> None:
        if self._saver is None:
            return
        step = self.step
        if step != self._saved and (state := self.state) is not None:
            self._saved = step
            self._saver.offer(state, now)
        self._tell()

    def _tell(self) -> None:
        for told in self._saver.errors() if self._saver else ():
            self._say(told)

    def close(self) -> None:
        """Save the newest state, and wait until it is written."""
        if self._saver is not None:
            self._save(float("inf"))
            self._saver.close(_SAVING_SECONDS)
            self._tell()

    def settle(self) -> None:
        """Nobody writes any more: give the memory of older states back."""
        with self._lock:
            if self._snapshots is not None:
                self._snapshots.keep_only(self.step)

    def take(self, state: State) -> None:
        """Keep a state."""
        self._counted = int(state["step"])
        with self._lock:
            if self._state is not None and self.step < int(state["step"]):
                self._older = self._state
            self._snapshots = None
            self._state, self._model, self.step = state, None, int(state["step"])

    def newest_left(self, survived: State | None) -> State:
        """The newest state after every holder died: one that survived in shared memory, the copy here, or the first."""
        if survived is not None and int(survived["step"]) >= self.step:
            self.take(survived)
        return self.state or self._first()

    def go_before(self, step: int) -> None:
        """Have a state of an earlier step, if the newest is not."""
        if self.step >= step:
            self.take(self.older_than(step) or self._first())

    def _first(self) -> State:
        """What the run began with."""
        if self._resumed is not None:
            return self._resumed
        with self._recipe.settings.in_force():
            return dict(copy_state(make_engine(self._recipe).live_state()))

    def older_than(self, step: int) -> State | None:
        """The newest state of an earlier step, of those that can be read."""
        with self._lock:
            if self._snapshots is not None:
                return self._snapshots.newest(step - 1)
            known = [state for state in (self._state, self._older) if state is not None and int(state["step"]) < step]
            return known[0] if known else None

    @property
    def state(self) -> State | None:
        """The newest state, or None before the first; not to be changed."""
        with self._lock:
            return self._state if self._snapshots is None else self._snapshots.newest(self._counted)

    @property
    def model(self) -> nn.Module:
        """The model with the newest state, made when it is first asked for; modules are in the modes of training."""
        with self._lock:
            if self._model is None:
                self._model = self._made()
            return self._model

    def _made(self) -> nn.Module:
        def of(state: State) -> tuple[nn.Module, int]:
            return _model_of(self._recipe, state), int(state["step"])

        for _ in range(_TRIES if self._snapshots is not None else 0):  # which state counts may just have changed
            assert self._snapshots is not None
            if (made := self._snapshots.visit(self._counted, of)) is not None:
                model, self.step = made
                return model
        return _model_of(self._recipe, self._state)


def _model_of(recipe: Recipe, state: State | None) -> nn.Module:
    parts = recipe.parts()
    if state is not None:
        load_parts(parts, state)
        optimizer = parts.optimizer(list(parts.model.parameters()))
        if callable(getattr(optimizer, "eval", None)):  # it trains other parameters than those to evaluate
            optimizer.load_state_dict(copy_state(state["optimizer"]))
            set_mode(optimizer, "eval")
    return parts.model
