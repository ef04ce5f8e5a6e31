"""When to write checkpoints: every so many seconds, in a thread of its own.

Owns that thread, and the one state that waits for it. Nothing is raised into training: what could not be written is
told in words. Refuses an interval that is no number above 0.

Reference: Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974: how often to save,
from what one checkpoint costs and how often things fail.
"""

from __future__ import annotations

import threading

from parakit.checkpoints.compatibility import Identity
from parakit.checkpoints.folder import Checkpoints
from parakit.checkpoints.state import State
from parakit.validation import check_positive

__all__ = ["Saver"]


class Saver:
    """Writes a checkpoint every so many seconds, in a thread of its own; training does not wait for it.

    A checkpoint that cannot be written is told, not raised: training goes on.

    Parameters
    ----------
    checkpoints : Checkpoints
    every_seconds : float
    identity : dict
        Written into each.
    """

    def __init__(self, checkpoints: Checkpoints, every_seconds: float, identity: Identity) -> None:
        check_positive("every_seconds", every_seconds)
        self._checkpoints = checkpoints
        self._every_seconds = every_seconds
        self._identity = identity
        self._changed = threading.Condition()
        self._last_seconds = 0.0
        self._waiting: State | None = None
        self._closed = False
        self._errors: list[str] = []
        self._thread: threading.Thread | None = None

    @property
    def due_at(self) -> float:
        """When it is time for a checkpoint, in seconds since the start of the run."""
        return self._last_seconds + self._every_seconds

    def offer(self, state: State, now_seconds: float) -> None:
        """Hand over a state to be written; it takes the place of one that still waits.

        Parameters
        ----------
        state : State
            Not changed by anybody from now on.
        now_seconds : float
            Since the start of the run.
        """
        with self._changed:
            assert not self._closed, "nothing is offered after close"
            self._last_seconds = now_seconds
            self._waiting = state
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="parakit-checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, limit_seconds: float) -> None:
        """Write what waits, and end the thread; what takes longer than the limit is among the `errors`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(limit_seconds)
            if self._thread.is_alive():
                self._tell(f"The last checkpoint was not written within {limit_seconds:g} s; it is not waited for.")

    def errors(self) -> list[str]:
        """What went wrong since this was last asked, a sentence each."""
        with self._changed:
            errors, self._errors = self._errors, []
            return errors

    def _tell(self, sentence: str) -> None:
        with self._changed:
            self._errors.append(sentence)

    def _work(self) -> None:
        while (state := self._next()) is not None:
            try:
                self._checkpoints.save(state, self._identity)
            except Exception as error:
                self._tell(" ".join(str(error).splitlines()))
            del state  # the memory of a large model is not held until the next one comes

    def _next(self) -> State | None:
        """The state to write; None once all are written and no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            state, self._waiting = self._waiting, None
            return state
