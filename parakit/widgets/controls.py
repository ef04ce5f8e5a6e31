"""The widgets of a panel, and nothing but widgets: what they do is said by whoever owns them.

The only importer of ipywidgets. Everything is made in the thread that makes the panel; later only traits change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets as w

__all__ = ["Controls", "Settings"]

_FIXED = "fixed while a run goes on: what a step computes would change"
_NO_RUN = "nothing is training yet: press Start first"
_OVER = "the run is over"
_NATURAL: dict[str, Any] = {"description_width": "initial"}
_PICTURE_WIDTH = 1000
_LOG_HEIGHT = "7.5em"
_LINE = "line-height:1.6;min-height:1.6em"  # what is below does not jump when a line gets its words
_LINK = 'target="_blank" style="text-decoration:underline"'


@dataclass(frozen=True)
class Settings:
    """What the controls show at first.

    Attributes
    ----------
    workers, most_workers : int
    strategies : dict
        By name; the first is chosen.
    batch_size, most_samples : int
    learning_rate : float or None
        None where the optimizer has none.
    epochs : int or None
        None where the run's length is given otherwise.
    """

    workers: int
    most_workers: int
    strategies: dict[str, Any]
    batch_size: int
    most_samples: int
    learning_rate: float | None
    epochs: int | None


class Controls:
    """Sliders, boxes, buttons, picture and texts of a panel."""

    def __init__(self, settings: Settings, dashboard: str | None) -> None:
        self.settings = settings
        count = {"min": 1, "max": settings.most_workers, "value": settings.workers}
        self.workers = w.IntSlider(description="Workers", continuous_update=False, style=_NATURAL,
                                   layout=w.Layout(width="270px"), **count)  # fmt: skip
        # The slider has no name for a screen reader; the box beside it has, and holds the same value.
        self.workers_box = w.BoundedIntText(description="number of workers", style=_NATURAL,
                                            layout=w.Layout(width="180px"), **count)  # fmt: skip
        self.strategy = w.Dropdown(description="Strategy", options=list(settings.strategies), style=_NATURAL,
                                   layout=w.Layout(width="190px"))  # fmt: skip
        self.batch_size = w.BoundedIntText(description="Batch size", min=1, max=settings.most_samples,
                                           value=settings.batch_size, style=_NATURAL,
                                           layout=w.Layout(width="160px"))  # fmt: skip
        # Without bounds, so that a refusal can name what was typed.
        self.learning_rate = w.FloatText(description="Learning rate", step=0.01, value=settings.learning_rate or 0.0,
                                         style=_NATURAL, layout=w.Layout(width="165px"))  # fmt: skip
        self.epochs = w.BoundedIntText(description="Epochs", min=1, max=10**6, value=settings.epochs or 1,
                                       style=_NATURAL, layout=w.Layout(width="130px"))  # fmt: skip
        self.start = _button("Start", "success", "start training with these settings")
        self.pause = _button("Pause", "", _NO_RUN)
        self.stop = _button("Stop", "warning", _NO_RUN)
        self.tour = _button("Visit every worker count", "", _NO_RUN, "auto")
        self.save = _button("Save history", "", _NO_RUN, "auto")
        self.close = _button("Close", "", "leave a plain picture in place of the panel", "70px")
        self.status = w.HTML()
        self.progress = w.HTML()
        # A widget's own margin would be added to the full width, and the panel scroll sideways.
        self.picture = w.Image(format="png", layout=w.Layout(width="100%", max_width=f"{_PICTURE_WIDTH}px", margin="0",
                                                             object_fit="contain", height="auto"))  # fmt: skip
        self.summary = w.HTML()
        self.log = w.HTML(layout=w.Layout(height=_LOG_HEIGHT, overflow="auto", max_width=f"{_PICTURE_WIDTH}px",
                                          margin="0"))  # fmt: skip
        self.box = w.VBox([
            _row(self.workers, self.workers_box, self.learning_rate),
            _row(self.strategy, self.batch_size, *([] if settings.epochs is None else [self.epochs])),
            _row(self.start, self.pause, self.stop, self.tour, self.save, self.close),
            self.status, self.progress, self.picture, self.summary, self.log,
            *([w.HTML(f'<a href="{escape(dashboard)}" {_LINK}>Dask dashboard of these workers</a>')]
              if dashboard else []),
        ])  # fmt: skip
        self._lock = threading.RLock()  # a request is recorded while nobody shows an older one
        self._listening = True
        self.workers.observe(lambda change: self._both(change["new"]), "value")
        self.workers_box.observe(lambda change: self._both(change["new"]), "value")
        self._on_workers: Callable[[int], None] = lambda _: None
        self._asked = settings.workers
        self.show_state("ready")

    # --- what a person does

    def chosen(self) -> dict[str, Any]:
        """Options of `parakit.train`, as they are set."""
        settings = self.settings
        return {
            "strategy": settings.strategies[self.strategy.value],
            "batch_size": self.batch_size.value,
            "learning_rate": None if settings.learning_rate is None else self.learning_rate.value,
            "epochs": None if settings.epochs is None else self.epochs.value,
        }

    def on_workers(self, request: Callable[[int], None]) -> None:
        """Call with each number that a person sets."""
        self._on_workers = request

    def on_learning_rate(self, request: Callable[[float], None]) -> None:
        """Call with each rate that a person sets."""

        def hear(change: Any) -> None:
            with self._lock:
                if self._listening:
                    request(change["new"])

        self.learning_rate.observe(hear, "value")

    def _both(self, count: int) -> None:
        # One of the two changed; the other follows, and the request is submitted once.
        with self._lock:
            if count == self._asked:
                return
            self._asked = count
            self.workers.value = self.workers_box.value = count
            if self._listening:
                self._on_workers(count)

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """Let controls move without a request."""
        with self._lock:
            listening, self._listening = self._listening, False
            try:
                yield
            finally:
                self._listening = listening

    # --- what the run does

    def show_workers(self, wanted: Callable[[], int]) -> None:
        """Move slider and box, without a request, to what is wanted by the time when nobody submits one."""
        with self._unheard():
            self._both(min(wanted(), self.workers.max))

    def show_rate(self, rate: float) -> None:
        """Show a learning rate without a request."""
        with self._unheard():
            self.learning_rate.value = rate

    def show_state(self, state: str) -> None:
        """Enable what can be used when a run is "ready", "running", "paused" or "over", and say why the rest cannot."""
        going = state in ("running", "paused")
        for control in (self.strategy, self.batch_size, self.epochs):
            _enable(control, state == "ready", _FIXED if going else _OVER, "takes effect with Start")
        _enable(self.start, state == "ready", "this run has started already; run the cell again for another",
                "start training with these settings")  # fmt: skip
        self.pause.description = "Resume" if state == "paused" else "Pause"
        missing = _NO_RUN if state == "ready" else _OVER
        _enable(self.pause, going, missing, "go on" if state == "paused" else "stand still after the present step")
        _enable(self.stop, going, missing, "finish after the present step; the model is kept")
        _enable(
            self.tour,
            going,
            missing,
            "time plain PyTorch, then train for a moment with each worker count, to fill the speedup plot",
        )
        _enable(self.save, state != "ready", missing, "write the events so far as JSON and CSV beside the notebook")
        for control in (self.workers, self.workers_box):
            _enable(control, state != "over", _OVER, "change it at any time, also while the run goes on")
        rate_text = "all parameter groups and the schedule scale with it; takes effect between two segments"
        has_rate = self.settings.learning_rate is not None
        _enable(self.learning_rate, has_rate and state != "over",
                _OVER if has_rate else "this optimizer has no learning rate", rate_text)  # fmt: skip

    def show_text(self, status: str, progress: str) -> None:
        """The two lines above the picture; the first is read aloud when it changes."""
        _set(self.status, f'<div role="status" style="font-weight:600;{_LINE}">{status}</div>')
        _set(self.progress, f'<div style="{_LINE};font-variant-numeric:tabular-nums">{progress}</div>')

    def show_report(self, summary: str, log: str) -> None:
        """Table and log below the picture."""
        _set(self.summary, summary)
        _set(self.log, log)

    def shut(self) -> None:
        """Take the widgets out of the page and of the kernel's memory."""
        self._listening = False
        for widget in (*_inside(self.box), self.box, self.epochs):
            for part in (widget, widget.layout, getattr(widget, "style", None)):
                if part is not None:
                    part.close()


def _inside(box: w.Box) -> list[w.Widget]:
    return [inner for child in box.children for inner in (*_inside(child), child)] if isinstance(box, w.Box) else []


def _row(*controls: w.Widget) -> w.Box:
    return w.Box(controls, layout=w.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 7px"))


def _button(text: str, style: str, tooltip: str, width: str = "80px") -> w.Button:
    return w.Button(description=text, button_style=style, tooltip=tooltip, layout=w.Layout(width=width))


def _enable(control: w.Widget, enabled: bool, why_not: str, purpose: str) -> None:
    control.disabled = not enabled
    control.tooltip = purpose if enabled else why_not


def _set(html: w.HTML, text: str) -> None:
    if html.value != text:
        html.value = text
