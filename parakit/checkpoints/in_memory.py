"""Snapshots: the states that a process can go back to.

Owns copies of states; refuses to know what is trained.
"""

from __future__ import annotations

from parakit.checkpoints.state import State, copy_state

__all__ = ["InMemorySnapshots"]


class InMemorySnapshots:
    """The newest states, in this process's own memory.

    Parameters
    ----------
    most : int
        How many to keep. A state is written into the memory of the oldest one.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._states: list[State] = []  # the newest first
        self._spare: list[State] = []  # memory of states that do not count any more

    @property
    def step(self) -> int:
        """Steps of the newest state."""
        return int(self._states[0]["step"]) if self._states else -1

    def keep(self, state: State) -> None:
        """Keep a copy of a state; those of the same step and of later ones count no more."""
        earlier = [kept for kept in self._states if kept["step"] < state["step"]]
        self._spare += [kept for kept in self._states if kept["step"] >= state["step"]]
        self._spare += earlier[self._most - 1 :]
        into = self._spare.pop() if self._spare else None
        self._states = [copy_state(state, into), *earlier[: self._most - 1]]

    def give_up(self) -> bool:
        """Keep nothing, and no memory for it; says whether there was any."""
        some = bool(self._states or self._spare)
        self._states, self._spare = [], []
        return some

    def of_step(self, step: int) -> State | None:
        """The state of a step, if it is kept."""
        return next((kept for kept in self._states if kept["step"] == step), None)
