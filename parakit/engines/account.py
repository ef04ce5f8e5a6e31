"""The account of a worker's steps: what each took, by its phases, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch

from parakit.events.records import PHASES
from parakit.system.devices import finish

__all__ = ["BACKWARD", "DATA", "EXCHANGE", "FORWARD", "UPDATE", "StepAccount", "StepRecord"]

DATA, FORWARD, BACKWARD, EXCHANGE, UPDATE = (PHASES.index(phase) for phase in PHASES[:5])


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


class StepAccount:
    """What the steps of one worker took, and what came of them.

    Parameters
    ----------
    device : torch.device
        Whose work is waited for before the time is told.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Forget the steps that were done and the one going on."""
        self.records: list[StepRecord] = []
        #: Rows of the present step.
        self.rows = 0
        #: Squared norm of the mean gradient of the present share; NaN where nobody measured it.
        self.share_norm = float("nan")
        #: Whether this step measures the norms of gradients: now and then, for each costs a pass over the gradient.
        self.measuring = False
        self.forget_seconds()

    def forget_seconds(self) -> None:
        """Let nothing be spent in the present step yet."""
        self.seconds = [0.0] * (len(PHASES) - 1)

    def begin(self) -> None:
        """Tell the time from here."""
        self._at = perf_counter()

    def lap(self, phase: int) -> None:
        """Book the time since `begin`, or the last lap, as that of a phase."""
        finish(self._device)
        now = perf_counter()
        self.seconds[phase] += now - self._at
        self._at = now

    def begin_update(self) -> None:
        """An update begins, in which gradients are computed and exchanged."""
        self._began, self._before = perf_counter(), sum(self.seconds)

    def close(self, step: int, loss: float, rate: float, norms: tuple[float, float] | None) -> None:
        """The update is done, and with it the step: what of its time is of no other phase was the update's."""
        finish(self._device)
        wall = perf_counter() - self._began
        self.seconds[UPDATE] += wall - (sum(self.seconds) - self._before)
        self.record(StepRecord(step, loss, rate, self.seconds, wall, self.rows, norms))

    def record(self, record: StepRecord) -> None:
        """Keep the account of a step, and begin with the next."""
        self.records.append(record)
        self.forget_seconds()
        self.measuring, self.share_norm = False, float("nan")

    def take_records(self) -> list[StepRecord]:
        """The accounts of the steps since the last call."""
        records, self.records = self.records, []
        return records
