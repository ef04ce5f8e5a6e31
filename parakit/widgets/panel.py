"""The life of a panel: ready, live over a run, and settled into a plain picture.

A panel reads events and submits requests, as any user could. Its thread looks at the run a few times a second; the
callbacks of its widgets only record requests, and never raise: what goes wrong is said in the panel.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from parakit.errors import ParakitError, RunError
from parakit.events.history import History
from parakit.events.summary import RunSummary
from parakit.runs.run import Run
from parakit.widgets import report
from parakit.widgets.callbacks import Callbacks
from parakit.widgets.controls import Controls, Settings
from parakit.widgets.life import Life, Stage
from parakit.widgets.live import LiveRun
from parakit.widgets.screen import Screen
from parakit.widgets.settings import Draft
from parakit.widgets.tour import stops_of_a_tour
from parakit.widgets.watcher import JOIN_SECONDS, Watcher
from parakit.workers.pool import Workers

__all__ = ["Panel"]

# All panels, so that a new one can take the place of those whose cell is executed again, or that show the same run.
_panels: weakref.WeakSet[Panel] = weakref.WeakSet()


class Panel:
    """A control room in the notebook; `parakit.panel` makes and opens one.

    Attributes
    ----------
    run : Run or None
        None until Start was pressed.
    """

    def __init__(
        self, pool: Workers, run: Run | None, draft: Draft | None, settings: Settings, baselines: bool, tour: bool
    ) -> None:
        self.run = run
        self._pool, self._draft = pool, draft
        self._baselines, self._tour_first = baselines, tour
        self._owns_run = False
        self._life = Life()
        self._live: LiveRun | None = None
        self._watcher: Watcher | None = None
        self._summary = RunSummary()
        self._summary.start = draft.start_planned if draft else None  # the first axes are those of the run
        self._remarks = report.remarks_on(pool)
        self._controls = Controls(settings, getattr(pool, "dashboard", None))
        self._screen = Screen(self._controls, self._summary, self._remarks, self._life)
        Callbacks(lambda: self._live, self._screen).connect(
            self._controls, start=self.start, tour=self.tour, save=self.save, close=self.close
        )

    @property
    def frames(self) -> int:
        """Live pictures drawn so far."""
        return self._screen.picture.frames

    @property
    def history(self) -> History:
        """The events of the run so far; empty before the start."""
        return self.run.history if self.run is not None else History()

    # --- what a person does

    def start(self) -> Run:
        """Start the run with the settings of the controls, as the button does.

        Raises
        ------
        RunError
            If a run was started already.
        ParakitError
            As `parakit.train`.
        """
        if self.run is not None or self._draft is None:
            raise RunError(f"This panel has its run already: it is {self.run.status if self.run else 'none'}.",
                           remedy="run the cell again for another panel")  # fmt: skip
        if self._life.settled:
            raise RunError("This panel was closed before its run was started.", remedy="run the cell again")
        self._controls.show_text("Starting: checking model, data and workers", "")
        wanted = self._controls.workers.value
        try:
            self.run = self._draft.start(wanted, workers=1 if self._baselines else wanted, **self._controls.chosen())
        except BaseException:
            self._screen.show_texts(self.run, self._live)  # nothing is starting any more
            raise
        self._owns_run = True
        return self._go_live(self.run, wanted)

    def tour(self) -> None:
        """Train for a moment with every worker count there is, and come back to the present one.

        Raises
        ------
        RunError
            If no run is going on.
        """
        if self._live is None or self._life.stage is not Stage.LIVE or report.is_over(self.run):
            raise RunError("There is no run to visit worker counts with.", remedy="start one first")
        self._live.tour(self._stops())

    def _stops(self) -> list[int]:
        return stops_of_a_tour(self._pool, self.run, self._controls.settings.most_workers)

    def save(self, folder: str | os.PathLike[str] = ".") -> tuple[Path, Path]:
        """Write the events so far as JSON, and the steps as CSV.

        Parameters
        ----------
        folder : path, optional
            Where; the notebook's own folder by default.

        Returns
        -------
        tuple of Path
            The two files.
        """
        name = f"parakit-history-{datetime.now():%Y%m%d-%H%M%S}"
        files = tuple(self.history.save(Path(folder) / f"{name}.{kind}") for kind in ("json", "csv"))
        said = f"Saved {files[0].name} and {files[1].name} in {Path(folder).resolve().name}/"
        self._screen.log.say(said, self.run)
        return files[0], files[1]

    # --- a live run

    def _go_live(self, run: Run, wanted: int) -> Run:
        self._life.stage = Stage.LIVE
        self._live = LiveRun(run, wanted, self._controls, self._summary, self._screen.log, baselines=self._baselines)
        self._live.begin()
        if self._tour_first:
            with suppress(RunError):  # the run may be over already
                self.tour()
        if self._watcher is not None:
            self._watcher.start()
        return run

    def _look(self) -> float | None:
        """Look at the run and show what there is; returns the seconds until the next look, None once it is over."""
        if self._live is None or report.is_over(self.run):
            return None
        news = self._live.look()
        self._screen.show_texts(self.run, self._live)
        if news:
            self._screen.show_picture()
        self._screen.show_report(len(self._stops()))  # of the same look, so that picture and table agree
        return self._screen.picture.pace_seconds

    # --- the place in the notebook

    def open(self, *, block: bool) -> None:
        """Take the place of an older panel, and show what there is to show."""
        if report.is_over(self.run):
            self._screen.settle(self.run)
            self._screen.show(self.run)
            return
        for other in [other for other in _panels if self._replaces(other)]:
            self._succeed(other)
        _panels.add(self)
        if block:
            self._open_blocking()
            return
        self._watcher = Watcher(self._look, lambda: self._screen.settle(self.run), self._screen.picture.pace_seconds)
        self._summary.follow(self.history)
        self._screen.show_picture()  # empty axes and an empty table: what comes later takes no other place
        self._screen.show_texts(self.run, self._live)
        self._screen.show_report(len(self._stops()))
        self._screen.show(self.run)
        if self.run is not None:
            self._go_live(self.run, self.run.target)

    def _open_blocking(self) -> None:
        run = self.start() if self.run is None else self._go_live(self.run, self.run.target)
        assert self._live is not None
        try:
            self._screen.follow(run, self._live)
        except BaseException:
            self._leave("The cell was interrupted" + self._fate())
            raise
        self._screen.settle(self.run)

    def _ipython_display_(self) -> None:
        if not self._screen.outputs.shown:
            self._screen.show(self.run)

    def _replaces(self, other: Panel) -> bool:
        """Whether another panel has to go: both show one run, or its cell is executed again and so lost its place."""
        if other._life.settled or other._pool is not self._pool:
            return False
        mine, its = self._screen.outputs.cell, other._screen.outputs.cell
        return mine is None or its in (None, mine) or (self.run is not None and other.run is self.run)

    def _succeed(self, former: Panel) -> None:
        """Take over from an older panel."""
        if former.run is not None and former.run is self.run:
            self._owns_run, former._owns_run = former._owns_run, False
        stopped = former.run if former._owns_run and not report.is_over(former.run) else None
        former._leave("A newer panel took its place" + former._fate())
        if stopped is not None:
            self._remarks.append(
                f"An earlier panel of this cell was replaced, and its run stopped at step {stopped.step} "
                f"of {stopped.steps}."
            )

    # --- the end

    def close(self) -> None:
        """Leave a plain picture and text in the panel's place.

        A run that this panel started is stopped, since nobody could reach it any more; a run that was given goes on.
        Closing twice does nothing but write the picture again.
        """
        self._leave("The panel was closed" + self._fate())

    def _fate(self) -> str:
        """What becomes of the run without this panel, if it is not over."""
        if self.run is None:
            return " before a run was started."
        if report.is_over(self.run):
            return ""
        return ", so its run was stopped." if self._owns_run else "; the run goes on: run.stop() ends it."

    def _leave(self, why: str) -> None:
        if not report.is_over(self.run):
            self._remarks.append(why)
            if self.run is not None and self._owns_run:
                self.run.stop()
                with suppress(ParakitError):
                    self.run.wait(JOIN_SECONDS, progress=False)
        if self._watcher is not None:
            self._watcher.leave()
        if self._live is not None:
            self._live.steering.go_home()
        self._screen.settle(self.run)

    def __repr__(self) -> str:
        what = "no run yet" if self.run is None else repr(self.run)
        return f"<Panel{' (closed)' if self._life.settled else ''}: {what}>"
