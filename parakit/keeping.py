"""The notebook's copy of what is trained: fetched as often as a small share of the time allows, and saved there."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable

from torch import nn

from parakit.checkpoints import Saver
from parakit.commits import State
from parakit.replica import load_model_state
from parakit.workers.base import Crew

__all__ = ["Keeper"]

_FETCH_SHARE = 0.02  # of the time may go into fetching the state from a worker, with whom it could be lost
_READ_SHARE = 0.005  # the same, for reading it where it outlives the workers
_LEAST_SECONDS = 1.0  # from one to the next: workers wait for orders meanwhile, or share the memory's bandwidth
_SAVING_SECONDS = 30.0  # that the last checkpoint may take


class Keeper:
    """The newest state on the notebook's side, fetched as often as a small share of the time allows.

    Parameters
    ----------
    model : nn.Module
        As it is before the first state.
    saver : Saver or None
        Gets a state as often as it is due, and the last one.
    say : callable
        Told what goes wrong with saving.
    """

    def __init__(
        self, model: nn.Module, saver: Saver | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._saver = saver
        self._say = say
        self._saved = -1
        self._lock = threading.Lock()
        self._initial = model
        self._state: State | None = None
        self._older: State | None = None
        self._model: nn.Module | None = None
        self._not_before = 0.0
        self.step = 0

    def due(self, now: float) -> bool:
        """Whether it is time for a newer state."""
        return now >= self._not_before or (self._saver is not None and self._saver.due(now))

    def keep(self, crew: Crew, step: int, now: float, *, busy: bool = False, final: bool = False) -> None:
        """Fetch a state if it is time to, or the one of this step at the end; hand it on if that is due.

        One that lies where this process can read it may be a segment older. While workers are busy with a segment that
        was ordered ahead, only such a one is taken.
        """
        saving = final or (self._saver is not None and self._saver.due(now))
        if (final or self.due(now)) and (step != self.step or self._state is None):
            began, share = time.perf_counter(), _READ_SHARE
            state = None if final else crew.salvage(step)
            if state is None or (self._state is not None and int(state["step"]) <= self.step):
                if busy:
                    return
                state, share = crew.state(step), _FETCH_SHARE
            self.take(state)
            spent = time.perf_counter() - began
            self._not_before = now + max(_LEAST_SECONDS, spent / share)
        if saving:
            self._save(now)

    def _save(self, now: float) -> None:
        if self._saver is None:
            return
        with self._lock:
            state, step = self._state, self.step
        if state is not None and step != self._saved:
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

    def take(self, state: State) -> None:
        """Keep a state."""
        with self._lock:
            if self._state is not None and self.step < int(state["step"]):
                self._older = self._state
            self._state, self._model, self.step = state, None, int(state["step"])

    def older_than(self, step: int) -> State | None:
        """The newest state of an earlier step, of the two that are kept."""
        with self._lock:
            known = [state for state in (self._state, self._older) if state is not None and int(state["step"]) < step]
            return known[0] if known else None

    @property
    def state(self) -> State | None:
        """The newest state, or None before the first; not to be changed."""
        with self._lock:
            return self._state

    @property
    def model(self) -> nn.Module:
        """The model with the newest state, made when it is first asked for."""
        with self._lock:
            if self._model is None:
                self._model = copy.deepcopy(self._initial).eval()
                if self._state is not None:
                    load_model_state(self._model, self._state)
            return self._model
