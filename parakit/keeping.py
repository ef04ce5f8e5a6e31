"""The notebook's copy of what is trained: fetched as often as a small share of the time allows."""

from __future__ import annotations

import copy
import threading
import time

from torch import nn

from parakit.replica import State, load_model_state
from parakit.workers.base import Crew

__all__ = ["Keeper"]

_KEEP_SHARE = 0.02  # of the time may go into fetching the state


class Keeper:
    """The newest state on the notebook's side, fetched as often as a small share of the time allows."""

    def __init__(self, model: nn.Module) -> None:
        self._lock = threading.Lock()
        self._initial = model
        self._state: State | None = None
        self._model: nn.Module | None = None
        self._not_before = 0.0
        self.step = 0

    def keep(self, crew: Crew, step: int, now: float, *, final: bool) -> None:
        """Fetch the state of a step if it is time to, or in any case at the end."""
        if (not final and now < self._not_before) or (step == self.step and self._state is not None):
            return
        began = time.perf_counter()
        self.take(crew.state())
        spent = time.perf_counter() - began
        self._not_before = now + spent / _KEEP_SHARE

    def take(self, state: State) -> None:
        """Keep a state."""
        with self._lock:
            self._state, self._model, self.step = state, None, int(state["step"])

    @property
    def model(self) -> nn.Module:
        """The model with the newest state, made when it is first asked for."""
        with self._lock:
            if self._model is None:
                self._model = copy.deepcopy(self._initial).eval()
                if self._state is not None:
                    load_model_state(self._model, self._state)
            return self._model
