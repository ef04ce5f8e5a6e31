"""What one worker reports of a step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StepRecord"]


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
