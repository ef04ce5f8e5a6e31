"""The life of a panel: ready, live over a run, and settled into a plain picture.

A panel reads events and expresses requests, as any user could. Its thread looks at the run a few times a second; the
callbacks of its widgets only record requests, and never raise: what goes wrong is said in the panel.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from parakit.errors import ParakitError, RunError
from parakit.events.history import History
from parakit.events.progress import progress_line
from parakit.events.records import StepDone
from parakit.events.summary import RunSummary
from parakit.formatting import many, unit_of
from parakit.pacing import NEWS_SECONDS
from parakit.plots.live import LivePicture
from parakit.runs.run import Run
from parakit.system.threads import yield_to_others
from parakit.widgets import report
from parakit.widgets.controls import Controls, Settings
from parakit.widgets.output import Place, cell_id, cell_number
from parakit.widgets.settings import Draft
from parakit.widgets.tour import Itinerary, Steering, stops_of_a_tour
from parakit.workers.pool import Workers

__all__ = ["Panel"]

_FASTEST_SECONDS, _SLOWEST_SECONDS = 0.25, 0.5  # between frames: 4 to 2 a second
_DRAWING_SHARE = 0.02  # of the time may go into drawing, as far as the slowest pace allows
_JOIN_SECONDS = 10.0
_BLOCKING_SECONDS = 0.5
_RESERVED_ROWS = 10
_WHAT_IS_LEFT = "The model is in .run.model, the events in .history.\nRun the cell again for another run."
_RIVAL_TRIES, _RIVAL_EVERY_SECONDS = 3, 6.0
_BASELINE = "measuring 1 worker first"
_TOUR = "visiting every worker count"

# All panels, so that a new one can take the place of those whose cell is executed again, or that show the same run.
_panels: weakref.WeakSet[Panel] = weakref.WeakSet()


class Panel:
    """A control room in the notebook; `parakit.panel` makes and opens one.

    Attributes
    ----------
    run : Run or None
        None until Start was pressed.
    frames : int
        Live pictures drawn so far.
    """

    def __init__(
        self, pool: Workers, run: Run | None, draft: Draft | None, settings: Settings, baselines: bool, tour: bool
    ) -> None:
        self.run = run
        self.frames = 0
        self._pool = pool
        self._draft = draft
        self._settings = settings
        self._baselines = baselines
        self._tour_first = tour
        self._owns_run = False
        self._summary = RunSummary()
        self._summary.start = draft.start_planned if draft else None  # the first axes are those of the run
        self._picture = LivePicture(settings.most_workers)
        self._places: list[Place] = []
        self._born_in = cell_number()
        self._cell = cell_id()
        self._blocking = False
        self._trouble = ""
        self._remarks = _remarks(pool)
        self._rival_tries = 0  # beyond the first
        self._steering: Steering | None = None
        self._leaving = threading.Event()
        self._settled = False
        self._lock = threading.RLock()  # the texts are written by callbacks and by the thread
        self._thread: threading.Thread | None = None
        self._controls = Controls(settings, getattr(pool, "dashboard", None))
        self._connect()

    @property
    def history(self) -> History:
        """The events of the run so far; empty before the start."""
        return self.run.history if self.run is not None else History()

    # --- what a person does

    def _connect(self) -> None:
        controls = self._controls
        controls.on_workers(lambda count: self._guarded(lambda: self._ask_workers(count)))
        controls.on_learning_rate(lambda rate: self._guarded(lambda: self._ask_rate(rate)))
        for button, action in (
            (controls.start, self.start), (controls.pause, self._pause_or_resume), (controls.stop, self._stop),
            (controls.tour, self.tour), (controls.save, self.save), (controls.close, self.close),
        ):  # fmt: skip
            button.on_click(lambda _, act=action: self._guarded(act))

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do what a widget asks for; errors are shown in the panel, because nobody reads a kernel's log."""
        self._trouble = ""
        try:
            action()
        except Exception as error:
            self._trouble = str(error) if isinstance(error, ParakitError) else f"{type(error).__name__}: {error}"
        self._show_texts()

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
        if self._settled:
            raise RunError("This panel was closed before its run was started.", remedy="run the cell again")
        controls = self._controls
        controls.show_text("Starting: checking model, data and workers", "")
        wanted = controls.workers.value
        try:
            self.run = self._draft.start(
                wanted,
                workers=1 if self._baselines else wanted,
                strategy=self._settings.strategies[controls.strategy.value],
                batch_size=controls.batch_size.value,
                learning_rate=controls.learning_rate.value if self._settings.learning_rate is not None else None,
                epochs=controls.epochs.value if self._settings.epochs is not None else None,
            )
        except BaseException:
            self._show_texts()  # nothing is starting any more
            raise
        self._owns_run = True
        self._go_live(wanted)
        return self.run

    def tour(self) -> None:
        """Train for a moment with every worker count there is, and come back to the present one.

        Raises
        ------
        RunError
            If no run is going on.
        """
        steering = self._steering
        if steering is None or self.run is None or self._over:
            raise RunError("There is no run to visit worker counts with.", remedy="start one first")
        if self._baselines:
            self._time_plain()
        steering.travel(Itinerary(self._stops(), _TOUR, yields=True))

    def _stops(self) -> list[int]:
        """What a tour visits."""
        most = self._settings.most_workers
        there = self._pool.size if self._pool.size > 1 else min(most, 4)
        chunks = most if self.run is None else len(self.run.plan.job.recipe.order.sizes)
        return stops_of_a_tour(min(there, most, chunks))

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
        self._say(f"Saved {files[0].name} and {files[1].name} in {Path(folder).resolve().name}/")
        return files[0], files[1]

    def close(self) -> None:
        """Leave a plain picture and text in the panel's place.

        A run that this panel started is stopped, since nobody could reach it any more; a run that was given goes on.
        Closing twice does nothing but write the picture again.
        """
        self._leave("The panel was closed" + ("" if self._over else self._fate()))

    def _fate(self) -> str:
        if self.run is None:
            return " before a run was started."
        return ", so its run was stopped." if self._owns_run else "; the run goes on: run.stop() ends it."

    def _leave(self, why: str) -> None:
        if not self._over:
            self._remarks.append(why)
            if self.run is not None and self._owns_run:
                self.run.stop()
                with suppress(ParakitError):
                    self.run.wait(_JOIN_SECONDS, progress=False)
        self._leaving.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_SECONDS)
        if self._steering is not None:
            self._steering.go_home()
        self._settle()

    def _ask_workers(self, count: int) -> None:
        if self._steering is None:
            return
        try:
            if self._steering.ask(count):
                self._say("The tour was ended by hand")
        except ParakitError:
            self._show_wanted()
            raise
        if self._steering.trip is not None:
            self._say_that_it_waits(count)

    def _say_that_it_waits(self, count: int) -> None:
        self._say(f"{many(count, 'worker')} asked for; first 1 worker is measured")

    def _show_wanted(self) -> None:
        steering = self._steering
        assert steering is not None
        self._controls.show_workers(lambda: steering.wanted)

    def _ask_rate(self, rate: float) -> None:
        if self.run is None:
            return
        try:
            self.run.set_learning_rate(rate)
        except ParakitError:
            if self._settings.learning_rate is not None:
                last = self.history.latest(StepDone)
                self._controls.show_rate(last.learning_rate if last else self.run.plan.rate)
            raise

    def _pause_or_resume(self) -> None:
        if self.run is None:
            return
        if self._controls.pause.description == "Resume":
            self.run.resume()
        else:
            self.run.pause()

    def _stop(self) -> None:
        if self.run is not None:
            self.run.stop()

    # --- a live run

    @property
    def _over(self) -> bool:
        return self.run is not None and self.run.status in ("finished", "failed")

    def _go_live(self, wanted: int) -> None:
        assert self.run is not None
        self.run.want_news(NEWS_SECONDS)
        self._summary.follow(self.run.history)
        self._steering = Steering(self.run, wanted, lambda count: self._unasked("resize", count))
        self._show_wanted()
        if self._baselines:
            self._measure_baselines()
        if self._tour_first:
            with suppress(RunError):  # the run may be over already
                self.tour()
        if not self._blocking:
            self._thread = threading.Thread(target=self._watch, name="parakit-panel", daemon=True)
            self._thread.start()

    def _measure_baselines(self) -> None:
        assert self.run is not None
        assert self._steering is not None
        with suppress(ParakitError):  # the run may end at any moment
            if self._summary.plain is None:
                self._time_plain()
            if self._summary.one is None:
                self._steering.travel(Itinerary([1], _BASELINE, yields=False))
                if self._steering.wanted != 1:
                    self._say_that_it_waits(self._steering.wanted)

    def _time_plain(self) -> None:
        assert self.run is not None
        with self._unasked("measure", None):
            self.run.measure_baseline()

    @contextmanager
    def _unasked(self, request: str, value: float | None) -> Iterator[None]:
        """Submit a request that no person has; the log tells it apart."""
        self._summary.unasked.append((request, value))
        try:
            yield
        except ParakitError:
            self._summary.unasked.remove((request, value))
            raise

    def _watch(self) -> None:
        yield_to_others()
        pace = _FASTEST_SECONDS
        while not self._leaving.wait(pace) and not self._over:
            news = self._look()
            self._show_texts()
            if news:
                pace = self._show_picture()
            self._show_report()  # of the same look, so that picture and table agree
        if not self._leaving.is_set():
            self._settle()

    def _look(self) -> bool:
        """Take in the news and steer; says whether there was any."""
        assert self.run is not None
        assert self._steering is not None
        news = self._summary.follow(self.run.history)
        travelling = self._steering.trip is not None
        self._steering.look(time.perf_counter(), self._summary)
        if self._baselines and self._rival_due(came_home=travelling and self._steering.trip is None):
            self._rival_tries += 1
            with suppress(ParakitError):
                self._time_plain()
        self._show_wanted()
        return news

    def _rival_due(self, *, came_home: bool) -> bool:
        """Whether to time plain PyTorch again.

        Its threads wait for each other busily, so whatever else the machine does, such as starting workers, slows it
        down many times over. It is timed again after an itinerary, and while its quartiles lie far apart.
        """
        if self._summary.plain is None or self._rival_tries >= _RIVAL_TRIES:
            return False
        late_enough = self._summary.seconds > (1 + self._rival_tries) * _RIVAL_EVERY_SECONDS
        return came_home or (self._summary.uncertain and late_enough)

    def _show_picture(self) -> float:
        """Draw a frame; returns how long to wait for the next one, so that drawing takes a small share of the time."""
        began = time.thread_time()
        try:
            self._controls.picture.value = self._picture.frame(self._summary)
            self.frames += 1
        except Exception as error:
            self._trouble = f"The picture could not be drawn: {type(error).__name__}: {error}"
        return min(_SLOWEST_SECONDS, max(_FASTEST_SECONDS, (time.thread_time() - began) / _DRAWING_SHARE))

    def _show_texts(self) -> None:
        with self._lock:
            if self._settled:
                return
            status, progress = self._texts()
            trouble = f'<div style="color:var(--jp-error-color1,#b00020)">{report.as_html(self._trouble)}</div>'
            self._controls.show_state(_state_of(self.run))
            self._controls.show_text(
                report.as_html(status) + (trouble if self._trouble else ""), report.as_html(progress)
            )

    def _texts(self) -> tuple[str, str]:
        run, steering = self.run, self._steering
        if run is None or steering is None:
            return report.headline(None, 0), "; ".join(self._remarks)
        purpose = steering.trip.purpose if steering.trip else ""
        aside = f" ({purpose})" if purpose else ""
        known = self._summary.efficiency(run.world_size)
        line = progress_line(run, known if known == known else None, workers=False)
        return report.headline(run, steering.wanted, aside, touring=purpose == _TOUR), line

    def _show_report(self) -> None:
        with self._lock:
            if not self._settled:
                rows = 1 + min(len(self._stops()), _RESERVED_ROWS)
                self._controls.show_report(
                    report.summary_html(self._summary, self._remarks, rows=rows), report.log_html(self._summary.log)
                )

    def _say(self, text: str) -> None:
        now = self._summary.seconds if self.run is None or self._over else self.run.elapsed_seconds
        with self._lock:  # the thread may be reading the log
            self._summary.log.append((now, text))

    # --- the place in the notebook

    def open(self, *, block: bool) -> None:
        """Take the place of an older panel, and show what there is to show."""
        alive = not self._over
        if alive:
            for other in [other for other in _panels if self._replaces(other)]:
                self._succeed(other)
            _panels.add(self)
        else:
            self._settled = True
            self._summary.follow(self.history)
            self._controls.shut()
        self._blocking = block and alive
        if not self._blocking:
            if alive:
                self._summary.follow(self.history)
                self._show_picture()  # empty axes and an empty table: what comes later takes no other place
                self._show_texts()
                self._show_report()
            self._show()
        if self.run is not None and alive:
            self._go_live(self.run.target)
        elif self._blocking:
            self.start()
        if self._blocking:
            self._follow()

    def _replaces(self, other: Panel) -> bool:
        """Whether another panel has to go: both show one run, or its cell is executed again and so lost its place."""
        if other._settled or other._pool is not self._pool:
            return False
        unknown = self._cell is None or other._cell is None
        return unknown or other._cell == self._cell or (self.run is not None and other.run is self.run)

    def _succeed(self, former: Panel) -> None:
        """Take over from an older panel."""
        if former.run is not None and former.run is self.run:
            self._owns_run, former._owns_run = former._owns_run, False
        stopped = former._owns_run and not former._over
        former._leave("A newer panel took its place" + ("" if former._over else former._fate()))
        if stopped:
            assert former.run is not None
            self._remarks.append(
                f"An earlier panel of this cell was replaced, and its run stopped at step {former.run.step} "
                f"of {former.run.steps}."
            )

    def _ipython_display_(self) -> None:
        if not self._places or cell_number() != self._born_in:
            self._show()

    def _show(self) -> None:
        place = Place()
        self._places.append(place)
        if self._settled:
            place.settle(*self._last_words())
        else:
            place.show(self._controls.box)

    def _settle(self) -> None:
        """Replace the widgets by a plain picture and text."""
        with self._lock:
            again, self._settled = self._settled, True
        if self.run is not None:
            self.run.want_news(None)
            if self._over:  # its last event follows its status, and then it lets go of the pool
                with suppress(ParakitError):
                    self.run.wait(_JOIN_SECONDS, progress=False)
            self._summary.follow(self.run.history)
        words = self._last_words()
        for place in self._places:
            place.settle(*words)
        if not again:
            self._controls.shut()

    def _last_words(self) -> tuple[bytes | None, str]:
        run = self.run
        if run is None:
            return None, "\n".join(self._remarks)
        facts = [report.headline(run, run.world_size)]
        facts += [str(run.error)] if run.error else []
        facts += [_WHAT_IS_LEFT] if self._over else []
        with self._lock:  # a figure is drawn by one thread at a time
            picture = self._picture.still(self._summary)
        return picture, report.summary_text(self._summary, [*facts, *self._remarks])

    def _follow(self) -> None:
        """Follow the run in the calling thread, with plain pictures in place of widgets."""
        place = Place()
        self._places.append(place)
        assert self.run is not None
        try:
            while not self._over:
                if self._look():
                    text = "\n".join(self._texts())
                    place.settle(self._picture.frame(self._summary), text)
                time.sleep(_BLOCKING_SECONDS)
        except BaseException:
            self._leave("The cell was interrupted" + self._fate())
            raise
        self._settle()

    def __repr__(self) -> str:
        what = "no run yet" if self.run is None else repr(self.run)
        return f"<Panel{' (closed)' if self._settled else ''}: {what}>"


def _remarks(pool: Workers) -> list[str]:
    """What people should know about a pool before they judge its speed."""
    if pool.in_turns:
        return ["Virtual workers compute one after the other in this process: their number does not change the speed."]
    if pool.cores == 1:
        one = f"There is 1 {unit_of(pool.device)} here, which all workers share"
        return [f"{one}: more of them cannot be faster on this machine."]
    return []


def _state_of(run: Run | None) -> str:
    if run is None:
        return "ready"
    return run.status if run.status in ("running", "paused") else "over"
