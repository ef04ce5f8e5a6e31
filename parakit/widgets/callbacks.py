"""What the widgets of a panel call: it records requests, and never raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parakit.errors import ParakitError
from parakit.widgets.controls import Controls
from parakit.widgets.live import LiveRun
from parakit.widgets.screen import Screen

__all__ = ["Callbacks"]


class Callbacks:
    """Actions behind the controls; what goes wrong is told in words, because nobody reads a kernel's log.

    Parameters
    ----------
    live : callable
        The run that is steered, None as long as there is none.
    screen : Screen
        Where trouble is told.
    """

    def __init__(self, live: Callable[[], LiveRun | None], screen: Screen) -> None:
        self._live = live
        self._screen = screen

    def connect(self, controls: Controls, **buttons: Callable[[], Any]) -> None:
        """Have the controls act; buttons that are not about the run alone are given by their names."""
        controls.on_workers(lambda count: self._steer(lambda live: live.ask_workers(count)))
        controls.on_learning_rate(lambda rate: self._steer(lambda live: live.ask_rate(rate)))
        controls.pause.on_click(lambda _: self._steer(lambda live: live.pause_or_resume()))
        controls.stop.on_click(lambda _: self._steer(lambda live: live.run.stop()))
        for name, action in buttons.items():
            getattr(controls, name).on_click(lambda _, act=action: self._guarded(act))

    def _steer(self, ask: Callable[[LiveRun], None]) -> None:
        live = self._live()
        self._guarded(lambda: None if live is None else ask(live))

    def _guarded(self, action: Callable[[], Any]) -> None:
        self._screen.trouble = ""
        try:
            action()
        except Exception as error:
            self._screen.trouble = str(error) if isinstance(error, ParakitError) else f"{type(error).__name__}: {error}"
        live = self._live()
        self._screen.show_texts(None if live is None else live.run, live)
