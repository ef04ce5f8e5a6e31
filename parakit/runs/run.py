"""A run as its user sees it: requests go in at any moment, events come out."""

from __future__ import annotations

import math
from copy import copy

from parakit.data.chunks import check_chunks
from parakit.errors import InputError, RunEnded, RunError, WaitTimeout
from parakit.events.progress import progress_line, show_progress
from parakit.events.records import StepDone
from parakit.formatting import in_a_notebook
from parakit.runs.background import BackgroundRun
from parakit.validation import check_positive, check_rate, plain

__all__ = ["Run"]


class Run(BackgroundRun):
    """A training run that is going on in the background; `parakit.train` makes one.

    A request (`resize`, `set_learning_rate`, `measure_baseline`, `pause`, `resume`, `stop`) returns at once and takes
    effect after the present step. The run's course is in `history`; the trained model is `model`.
    """

    def resize(self, workers: int) -> None:
        """Ask for another number of workers.

        Parameters
        ----------
        workers : int
            From 1 to what the pool has or can grow to, and at most the number of chunks.

        Raises
        ------
        WorkerCountError
            If that many can never be had.
        RunEnded
            If the run is over.
        """
        self._check_going("resize")
        count = self._pool.check_count(plain(workers), most=self._pool.most)
        check_chunks(count, len(self._plan.assignment.training.sizes))
        self._request("resize", count, target=count)

    def set_learning_rate(self, value: float) -> None:
        """Ask to go on at another learning rate.

        All parameter groups and the schedule scale by one factor, which takes the first group's present rate to the
        value: groups keep their proportions, and a schedule goes on along its own curve. Where the present rate is
        0, every group gets the value itself.

        Parameters
        ----------
        value : float
            Above 0.

        Raises
        ------
        InputError
            If it is no such number, or the optimizer has no learning rate.
        RunEnded
            If the run is over.
        """
        self._check_going("set_learning_rate")
        check_rate("the learning rate", value, self._plan.rate)
        rate = float(value)
        self._request("learning rate", rate, rate=rate)

    def measure_baseline(self) -> None:
        """Ask for the speed of plain PyTorch: the same model and batches, in one process with all its cores.

        The run stands still for it, about a second and a half, while one worker of the pool times the loop; what
        comes of it is a `Baseline` event in the history. If it fails, the history says why, and the run goes on.

        Raises
        ------
        RunEnded
            If the run is over.
        """
        self._check_going("measure_baseline")
        self._request("measure", None, measuring=True)

    def want_news(self, seconds: float | None) -> None:
        """Say how old news may be, as a panel does while it is open; has no effect on a run that is over.

        Steps come into the history when their segment ends. Segments of large models last up to 0.8 s, because each
        costs time beside its steps; whoever watches can have shorter ones.

        Parameters
        ----------
        seconds : float or None
            Segments are no longer than this, down to 0.25 s. None: as long as the run likes.

        Raises
        ------
        InputError
            If it is no number above 0.
        """
        seconds = plain(seconds)
        check_positive("seconds", seconds, none=True)
        self._requests.news_seconds = math.inf if seconds is None else float(seconds)

    def pause(self) -> None:
        """Ask the run to stand still after its present step, holding its workers."""
        self._check_going("pause")
        self._request("pause", None, paused=True)

    def resume(self) -> None:
        """Ask a paused run to go on."""
        self._check_going("resume")
        self._request("resume", None, paused=False)

    def stop(self) -> None:
        """Ask the run to finish after its present step; does nothing once it has ended."""
        if not self._ended.is_set():
            self._request("stop", None, stopping=True)

    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> Run:
        """Wait until the run has ended.

        Parameters
        ----------
        timeout : float, optional
            Seconds; None waits as long as the run goes on.
        progress : bool, optional
            Whether to show a line of progress meanwhile. Default: in scripts and terminals, not in notebooks.

        Returns
        -------
        Run
            This run.

        Raises
        ------
        RunFailed
            If the run failed.
        WaitTimeout
            If it has not ended in time; it goes on.
        RunError
            If it is paused and no timeout was given, as nothing would ever end the wait.
        """
        timeout = plain(timeout)
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout < 0):
            raise InputError(f"timeout is {timeout!r}; it must be a number of seconds, or None.")
        goals = self._requests.goals
        if timeout is None and goals.paused and not goals.stopping and not self._ended.is_set():
            raise RunError(
                f"The run is paused at step {self.step} of {self.steps}, so waiting for its end would never end.",
                remedy="run.resume() first, or wait(timeout=...)",
            )
        show = not in_a_notebook() if progress is None else progress
        if show:
            show_progress(self, self._ended, timeout)
        else:
            self._ended.wait(timeout)
        if not self._ended.is_set():
            raise WaitTimeout(
                f"The run has not ended within {timeout:g} s: it is {self.status} at step {self.step} of {self.steps}.",
                remedy="wait longer, or run.stop()",
            )
        if self.error is not None:
            raise copy(self.error) from self.error.__cause__  # without the traceback that it has already
        return self

    def _check_going(self, request: str) -> None:
        if self._ended.is_set():
            raise RunEnded(
                f"The run is {self.status} at step {self.step} of {self.steps}; {request} has no effect any more.",
                remedy="start another run with parakit.train(run.model, ...)",
            )

    def __repr__(self) -> str:
        latest = self._history.latest(StepDone)
        loss = f", loss {latest.loss:.4g}" if latest else ""
        early = ", stopped early" if self.stopped_early else ""
        failed = f"\n{self.error}" if self.error else ""
        many = "1 worker" if self.world_size == 1 else f"{self.world_size} workers"
        rest = f", {progress_line(self)}" if self.status == "running" and latest else f", {many}"
        return f"<Run {self.status}{early}: step {self.step:,} of {self.steps:,}{loss}{rest}>{failed}"
