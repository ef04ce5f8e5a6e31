"""What a panel shows: the picture and how often it is drawn, two lines of text, the table, and the last words.

Refuses to know when any of it is due.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from parakit.errors import ParakitError
from parakit.events.progress import progress_line
from parakit.events.summary import RunSummary
from parakit.plots.live import LivePicture
from parakit.runs.run import Run
from parakit.widgets import report
from parakit.widgets.controls import Controls
from parakit.widgets.life import Life
from parakit.widgets.live import LiveRun
from parakit.widgets.log import Log
from parakit.widgets.output import Outputs
from parakit.widgets.tour import TOUR
from parakit.widgets.watcher import JOIN_SECONDS

__all__ = ["Picture", "Screen"]

_FASTEST_SECONDS, _SLOWEST_SECONDS = 0.25, 0.5  # between frames: 4 to 2 a second
_DRAWING_SHARE = 0.02  # of the time may go into drawing, as far as the slowest pace allows
_BLOCKING_SECONDS = 0.5
_RESERVED_ROWS = 10
_WHAT_IS_LEFT = "The model is in .run.model, the events in .history.\nRun the cell again for another run."


class Picture:
    """The picture of a run, frame by frame.

    Attributes
    ----------
    frames : int
        Live pictures drawn so far.
    pace_seconds : float
        To wait for the next one, so that drawing takes a small share of the time.
    """

    def __init__(self, summary: RunSummary, most_workers: int) -> None:
        self.live = LivePicture(most_workers)
        self.frames = 0
        self.pace_seconds = _FASTEST_SECONDS
        self._summary = summary
        self._lock = threading.Lock()  # a figure is drawn by one thread at a time

    def draw(self, controls: Controls) -> None:
        """Show another frame."""
        began = time.thread_time()
        try:
            controls.picture.value = self.live.frame(self._summary)
            self.frames += 1
        finally:
            spent = (time.thread_time() - began) / _DRAWING_SHARE
            self.pace_seconds = min(_SLOWEST_SECONDS, max(_FASTEST_SECONDS, spent))

    def still(self) -> bytes:
        """The picture that is left."""
        with self._lock:
            return self.live.still(self._summary)


class Screen:
    """Texts, table and picture of a panel: in its widgets while it lives, and in plain outputs afterwards.

    Parameters
    ----------
    controls : Controls
    summary : RunSummary
    remarks : sequence of str
        What people should know beside the table; more may come.
    life : Life

    Attributes
    ----------
    trouble : str
        What went wrong with the last request.
    """

    def __init__(self, controls: Controls, summary: RunSummary, remarks: Sequence[str], life: Life) -> None:
        self.picture = Picture(summary, controls.settings.most_workers)
        self.log = Log(summary)
        self.outputs = Outputs()
        self.trouble = ""
        self._controls = controls
        self._summary = summary
        self._remarks = remarks
        self._life = life

    # --- while the panel lives

    def show_picture(self) -> None:
        """Draw a frame; where that fails, the texts say so."""
        try:
            self.picture.draw(self._controls)
        except Exception as error:
            self.trouble = f"The picture could not be drawn: {type(error).__name__}: {error}"

    def show_texts(self, run: Run | None, live: LiveRun | None) -> None:
        """What the run does, and the trouble that there is."""
        with self._life.lock:
            if self._life.settled:
                return
            status, progress = self._texts(run, live)
            trouble = f'<div style="color:var(--jp-error-color1,#b00020)">{report.as_html(self.trouble)}</div>'
            self._controls.show_state(_state_of(run))
            self._controls.show_text(
                report.as_html(status) + (trouble if self.trouble else ""), report.as_html(progress)
            )

    def _texts(self, run: Run | None, live: LiveRun | None) -> tuple[str, str]:
        if run is None or live is None:
            return report.headline(None, 0), "; ".join(self._remarks)
        steering = live.steering
        purpose = steering.trip.purpose if steering.trip else ""
        aside = f" ({purpose})" if purpose else ""
        known = self._summary.efficiency(run.world_size)
        line = progress_line(run, known if known == known else None, workers=False)
        return report.headline(run, steering.wanted, aside, touring=purpose == TOUR), line

    def show_report(self, counts: int) -> None:
        """Table and log, with room for so many worker counts."""
        with self._life.lock:
            if not self._life.settled:
                rows = 1 + min(counts, _RESERVED_ROWS)
                summary = report.summary_html(self._summary, self._remarks, rows=rows)
                self._controls.show_report(summary, self.log.html())

    # --- in the notebook

    def show(self, run: Run | None) -> None:
        """Show the widgets in the present cell, or what is left of them."""
        place = self.outputs.add()
        if self._life.settled:
            place.settle(*self.last_words(run))
        else:
            place.show(self._controls.box)

    def follow(self, run: Run, live: LiveRun) -> None:
        """Follow a run in the calling thread until it is over, with plain pictures in place of widgets."""
        place = self.outputs.add()
        while not report.is_over(run):
            if live.look():
                text = "\n".join(self._texts(run, live))
                place.settle(self.picture.live.frame(self._summary), text)
            time.sleep(_BLOCKING_SECONDS)

    def settle(self, run: Run | None) -> None:
        """Replace the widgets by a plain picture and text."""
        first = self._life.settle()
        if run is not None:
            run.want_news(None)
            if report.is_over(run):  # its last event follows its status, and then it lets go of the pool
                with suppress(ParakitError):
                    run.wait(JOIN_SECONDS, progress=False)
            self._summary.follow(run.history)
        if self.outputs.places:
            self.outputs.settle(*self.last_words(run))
        if first:
            self._controls.shut()

    def last_words(self, run: Run | None) -> tuple[bytes | None, str]:
        """Picture and text that are left in a panel's place."""
        if run is None:
            return None, "\n".join(self._remarks)
        facts = [report.headline(run, run.world_size)]
        facts += [str(run.error)] if run.error else []
        facts += [_WHAT_IS_LEFT] if report.is_over(run) else []
        return self.picture.still(), report.summary_text(self._summary, [*facts, *self._remarks])


def _state_of(run: Run | None) -> str:
    if run is None:
        return "ready"
    return run.status if run.status in ("running", "paused") else "over"
