"""The live picture: four plots on one figure, a frame in a few milliseconds.

A machine's cores belong to the run, so a frame must be cheap. What rarely changes (axes, ticks, legends) is drawn once
and kept as a background; a frame puts the background back and draws the curves, points and bars over it. Live frames
have a palette of few colours, because encoding them is most of the work; the last picture has all of them.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from parakit.events.summary import RunSummary
from parakit.plots.curves import CurvePlot
from parakit.plots.phases import BreakdownPlot
from parakit.plots.speedups import SpeedupPlot
from parakit.plots.style import AREA_TONES, INK, PALETTE

__all__ = ["LivePicture"]

_WIDTH, _HEIGHT, _DPI = 10.0, 6.6, 100


class Plot(Protocol):
    """What a live picture is made of."""

    ax: Any

    @property
    def artists(self) -> list[Any]:
        """What changes from frame to frame."""

    def update(self, summary: RunSummary, *, snug: bool = False) -> bool:
        """Show what a course has by now, in limits that fit it if `snug`; whether more than the artists changed."""


class LivePicture:
    """Loss, throughput, speedup and breakdown of a run, drawn again and again.

    Parameters
    ----------
    most : int
        How far the axis of workers reaches.
    """

    def __init__(self, most: int) -> None:
        # Not pyplot: its figures are global, and this one is drawn in a thread of the panel.
        self._figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self._figure)
        # Fixed places: a layout engine would double the cost, and make the axes jump.
        grid = self._figure.subplots(2, 2)
        self._figure.subplots_adjust(left=0.07, right=0.975, top=0.9, bottom=0.08, hspace=0.48, wspace=0.25)
        self._plots: list[Plot] = [
            CurvePlot(grid[0, 0], "loss", growing=True),
            CurvePlot(grid[0, 1], "rate", growing=True),
            SpeedupPlot(grid[1, 0], most=most),
            BreakdownPlot(grid[1, 1]),
        ]
        for plot, title in zip(self._plots, _TITLES, strict=True):
            plot.ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=20)
            plot.ax.tick_params(labelsize=8.5)
            plot.ax.xaxis.label.set_size(9)
            plot.ax.yaxis.label.set_size(9)
        self._background: Any = None

    def frame(self, summary: RunSummary) -> bytes:
        """The picture now, as a PNG of few colours."""
        moved = [plot.update(summary) for plot in self._plots]
        if any(moved) or self._background is None:
            self._draw_background()
        self._canvas.restore_region(self._background)
        for plot in self._plots:
            for artist in plot.artists:
                plot.ax.draw_artist(artist)
        return _png(self._pixels().quantize(palette=_palette(), dither=Image.Dither.NONE))

    def still(self, summary: RunSummary) -> bytes:
        """The picture now, as a PNG in all colours."""
        self._animate(False)
        for plot in self._plots:
            plot.update(summary, snug=True)
        self._canvas.draw()
        self._background = None  # limits may have moved: a later frame begins anew
        return _png(self._pixels(), level=9)

    def _draw_background(self) -> None:
        self._animate(True)  # what is animated is left out of the drawing of everything
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self._figure.bbox)

    def _animate(self, animated: bool) -> None:
        for plot in self._plots:
            for artist in plot.artists:
                artist.set_animated(animated)

    def _pixels(self) -> Image.Image:
        size = self._canvas.get_width_height()
        return Image.frombuffer("RGBA", size, self._canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")


_TITLES = ("Loss", "Throughput", "Speedup", "Where each worker's time goes")


def _png(image: Image.Image, level: int = 1) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", compress_level=level)
    return file.getvalue()


def _palette() -> Image.Image:
    """All our colours in shades from white, for their smooth edges; 256 in all."""
    global _made
    if _made is None:
        tones = np.array([_rgb(tone) for tone in AREA_TONES], np.float64)
        # No shades next to white: Pillow looks colours up in boxes of four levels, and would take them for it.
        shades = [np.linspace(255, _rgb(colour), 29)[2:] for colour in PALETTE]
        flat = np.vstack([tones, *shades]).round().astype(int)
        _made = Image.new("P", (1, 1))
        _made.putpalette(flat.ravel().tolist())
    return _made


def _rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


_made: Image.Image | None = None
