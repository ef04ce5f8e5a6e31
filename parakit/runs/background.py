"""A run in the background: the thread that it goes on in, and all that can be read of it at any moment."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from parakit.checkpoints.state import State
from parakit.errors import RunError
from parakit.events.history import History
from parakit.events.noise_scale import NoiseEstimator, NoiseScale
from parakit.events.records import GradientNorms, Requested
from parakit.runs.loop import RunLoop
from parakit.runs.plan import Plan
from parakit.runs.requests import Requests
from parakit.system.threads import quick_thread_switches
from parakit.workers.pool import Workers

__all__ = ["BackgroundRun"]

_LET_GO_SECONDS = 10.0


class BackgroundRun:
    """A run loop in a thread of its own, from a plan to its end.

    Parameters
    ----------
    plan : Plan
    pool : Workers
        Held by the run until it is over.
    history : History
        Gets its events.
    """

    def __init__(self, plan: Plan, pool: Workers, history: History) -> None:
        self._plan = plan
        self._pool = pool
        self._history = history
        rate = plan.resumption.rate if plan.resumption else None
        self._requests = Requests(plan.workers, pool.clock, rate)
        self._loop = RunLoop(plan, pool, history, self._requests)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_through, name=f"parakit-run-{plan.job.run_id}", daemon=True)
        pool.hold(plan.job.run_id, self._let_go)
        self._thread.start()

    def _go_through(self) -> None:
        try:
            with quick_thread_switches():
                self._loop.run()
        finally:
            self._pool.free(self._plan.job.run_id)
            self._ended.set()

    def _let_go(self) -> None:
        """End the run because its pool closes."""
        if not self._ended.is_set():
            self._request("stop", None, stopping=True)
        self._thread.join(_LET_GO_SECONDS)

    def _request(self, name: str, value: int | float | None, **goals: Any) -> None:
        with self._requests.changed:  # requests of several threads are kept in the order of their times
            self._history.append(Requested(self._loop.now(), name, value))
        self._requests.submit(**goals)

    @property
    def status(self) -> str:
        """What the run is doing: "running", "paused", "finished" or "failed".

        A run that was stopped is finished; `stopped_early` tells the difference. Once it is over, its pool is free.
        """
        status = self._loop.status
        if status in ("finished", "failed") and threading.current_thread() is not self._thread:
            self._ended.wait(_LET_GO_SECONDS)  # an instant
        return status

    @property
    def stopped_early(self) -> bool:
        """Whether the run finished because `stop` was called before its last step."""
        return self.status == "finished" and self._loop.step < self._plan.steps

    @property
    def history(self) -> History:
        """The events so far."""
        return self._history

    @property
    def step(self) -> int:
        """Committed steps."""
        return self._loop.step

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self._plan.steps

    @property
    def world_size(self) -> int:
        """Active workers."""
        return len(self._loop.members)

    @property
    def members(self) -> tuple[str, ...]:
        """The active workers as the pool names them, in the order of their ranks."""
        return self._loop.members

    @property
    def target(self) -> int:
        """Workers asked for: the newest request, or `world_size` once that is granted or given up."""
        return self._requests.goals.target

    @property
    def plan(self) -> Plan:
        """What is trained, and how."""
        return self._plan

    @property
    def measuring(self) -> bool:
        """Whether plain PyTorch is being timed, or will be next: training waits for it."""
        return self._requests.goals.measuring and not self._ended.is_set()

    @property
    def elapsed_seconds(self) -> float:
        """Since the start of the run."""
        return self._loop.now()

    @property
    def pool(self) -> Workers:
        """The workers that it trains on."""
        return self._pool

    @property
    def model(self) -> nn.Module:
        """The model on the notebook's side: trained when the run has ended, the newest state fetched until then.

        Each newer state comes as a new object, in evaluation mode; the model given to `train` is never changed.
        """
        return self._loop.latest.model

    @property
    def model_step(self) -> int:
        """Steps that `model` was trained for."""
        return self._loop.latest.step

    @property
    def news_seconds(self) -> float:
        """How old news may be, for whoever watches; infinite if nobody does."""
        return self._requests.news_seconds

    def kept_state(self) -> State:
        """What another run goes on from: the newest state on the notebook's side.

        Raises
        ------
        RunError
            If the run is going on, or ended before it had any.
        """
        state = self._loop.latest.state
        if state is None or not self._ended.is_set():
            raise RunError(
                f"The run is {self.status} at step {self.step}; there is nothing to go on from"
                f"{' yet' if not self._ended.is_set() else ''}.",
                remedy="run.stop() and run.wait() first" if not self._ended.is_set() else "train anew",
            )
        return state

    @property
    def noise(self) -> NoiseScale:
        """The gradient noise scale, as the run's gradients tell it so far: how large a batch still pays.

        Estimated in one step of each segment with several workers; `NoiseScale.words` says when it is not known.
        """
        estimator = NoiseEstimator()
        for norms in self._history.of(GradientNorms):
            estimator.update(norms.step, norms.norms_squared, norms.samples, norms.global_norm_squared)
        return estimator.latest

    @property
    def error(self) -> RunError | None:
        """Why the run failed, or None."""
        return self._loop.error
