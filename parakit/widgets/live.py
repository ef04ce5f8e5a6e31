"""A run under a panel: what a person asks of it, and what the panel asks of it by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from parakit.errors import ParakitError
from parakit.events.records import StepDone
from parakit.events.summary import RunSummary
from parakit.formatting import many
from parakit.pacing import NEWS_SECONDS
from parakit.runs.run import Run
from parakit.widgets.baseline_schedule import BaselineSchedule
from parakit.widgets.controls import Controls
from parakit.widgets.log import Log
from parakit.widgets.tour import TOUR, Itinerary, Steering

__all__ = ["LiveRun"]

_BASELINE = "measuring 1 worker first"


class LiveRun:
    """A run that goes on, steered by the controls of a panel.

    Parameters
    ----------
    run : Run
    wanted : int
        How many workers a person wants it to have.
    controls : Controls
    summary : RunSummary
    log : Log
    baselines : bool
        Whether to measure what speed is relative to.
    """

    def __init__(
        self, run: Run, wanted: int, controls: Controls, summary: RunSummary, log: Log, *, baselines: bool
    ) -> None:
        self.run = run
        self._controls = controls
        self._summary = summary
        self._log = log
        self._schedule = BaselineSchedule() if baselines else None
        self.steering = Steering(run, wanted, lambda count: log.unasked("resize", count))

    def begin(self) -> None:
        """Follow the run from now on, and measure what speed is relative to."""
        self.run.want_news(NEWS_SECONDS)
        self._summary.follow(self.run.history)
        self._show_wanted()
        if self._schedule is not None:
            self._measure_baselines()

    # --- what a person asks

    def ask_workers(self, count: int) -> None:
        """Have so many workers, perhaps once one worker has been measured."""
        try:
            if self.steering.ask(count):
                self._log.say("The tour was ended by hand", self.run)
        except ParakitError:
            self._show_wanted()
            raise
        if self.steering.trip is not None:
            self._say_that_it_waits(count)

    def ask_rate(self, rate: float) -> None:
        """Have another learning rate; if it cannot be, the present one is shown again."""
        try:
            self.run.set_learning_rate(rate)
        except ParakitError:
            if self._controls.settings.learning_rate is not None:
                last = self.run.history.latest(StepDone)
                self._controls.show_rate(last.learning_rate if last else self.run.plan.rate)
            raise

    def pause_or_resume(self) -> None:
        """Do what the button says."""
        if self._controls.pause.description == "Resume":
            self.run.resume()
        else:
            self.run.pause()

    def tour(self, stops: Sequence[int]) -> None:
        """Visit some worker counts, and come back."""
        if self._schedule is not None:
            self._time_plain()
        self.steering.travel(Itinerary(stops, TOUR, yields=True))

    # --- what the panel asks

    def _measure_baselines(self) -> None:
        with suppress(ParakitError):  # the run may end at any moment
            if self._summary.plain is None:
                self._time_plain()
            if self._summary.one is None:
                self.steering.travel(Itinerary([1], _BASELINE, yields=False))
                if self.steering.wanted != 1:
                    self._say_that_it_waits(self.steering.wanted)

    def _time_plain(self) -> None:
        with self._log.unasked("measure", None):
            self.run.measure_baseline()

    def look(self) -> bool:
        """Take in the news and steer; says whether there was any."""
        news = self._summary.follow(self.run.history)
        travelling = self.steering.trip is not None
        self.steering.look(time.perf_counter(), self._summary)
        came_home = travelling and self.steering.trip is None
        if self._schedule is not None and self._schedule.due(self._summary, came_home=came_home):
            with suppress(ParakitError):
                self._time_plain()
        self._show_wanted()
        return news

    def _show_wanted(self) -> None:
        self._controls.show_workers(lambda: self.steering.wanted)

    def _say_that_it_waits(self, count: int) -> None:
        self._log.say(f"{many(count, 'worker')} asked for; first 1 worker is measured", self.run)
