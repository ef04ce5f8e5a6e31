"""Labels beside points, at places where no curve runs.

Owns the choice of a place: it is made when the axes are drawn, as only then their size is known. Refuses to let two
labels overlap: one that has no place of its own is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from parakit.plots.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axes._base import _AxesBase
    from matplotlib.text import Annotation

__all__ = ["label_points"]

Floats = npt.NDArray[np.float64]

# Where a label may stand, the best first: directions, and how far from its point, in points of print.
_SIDES = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0))
_FAR = (9.0, 15.0, 21.0)
_SLANTED = 0.7
_PAD = 2.0  # pixels around a label that are its own
_MARKER = 6.0  # pixels that a point takes on each side
_SAMPLE = 2.0  # pixels between the places at which a curve is looked at
_MOST_SAMPLES = 4096  # of a piece of it, which may reach far out of the picture
_FORBIDDEN = 1e6
_LATER = 0.1  # of a pixel of a curve: what a place costs for each that is better
_FARTHER = 0.5  # and for each step away from its point


def label_points(ax: Axes, labels: Iterable[tuple[float, float, str]], *, size: float = 9.0) -> None:
    """Label some points; places are chosen anew whenever the axes are drawn.

    Parameters
    ----------
    ax : Axes
    labels : iterable of (x, y, text)
        In the order of their importance: where there is no room for all, later ones are left out.
    size : float
        Of the font.
    """
    texts = [
        ax.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=size, color=INK, ha="center",
                    va="center", zorder=6, path_effects=[withStroke(linewidth=2, foreground="white")])
        for x, y, text in labels
    ]  # fmt: skip
    for text in texts:
        text.set_in_layout(False)
    if texts:
        ax.add_artist(_Placing(texts))


class _Placing(Artist):
    """Draws nothing, but moves labels before they are drawn."""

    def __init__(self, texts: Sequence[Annotation]) -> None:
        super().__init__()
        self._texts = texts
        self.set_zorder(-1)
        self.set_in_layout(False)

    def draw(self, renderer: Any) -> None:
        """Find a place for each label."""
        ax = self.axes
        assert ax is not None
        curves, points = _curves(ax), ax.transData.transform([text.xy for text in self._texts])
        taken = [Bbox.from_extents(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in points]
        per_point = renderer.points_to_pixels(1.0)
        for text, point in zip(self._texts, points, strict=True):
            text.set_visible(True)
            extent = text.get_window_extent(renderer)
            offsets = _offsets(extent.width / per_point, extent.height / per_point)
            boxes = [_box(point + per_point * offset, extent) for offset in offsets]
            costs = [_cost(box, place, curves, taken, ax.bbox) for place, box in enumerate(boxes)]
            best = int(np.argmin(costs))
            text.set_visible(costs[best] < _FORBIDDEN)
            text.set_position(tuple(offsets[best]))
            if text.get_visible():
                taken.append(boxes[best])


def _offsets(width: float, height: float) -> list[Floats]:
    """Where the middle of a label of some size may lie, relative to its point; all in points of print."""
    offsets = []
    for far in _FAR:
        for across, up in _SIDES:
            away = far * (_SLANTED if across and up else 1.0)
            offsets.append(np.array([across * (away + width / 2), up * (away + height / 2)]))
    return offsets


def _box(middle: Floats, extent: Bbox) -> Bbox:
    half = np.array([extent.width, extent.height]) / 2 + _PAD
    return Bbox([middle - half, middle + half])


def _cost(box: Bbox, place: int, curves: Floats, taken: Sequence[Bbox], within: Bbox) -> float:
    """How bad a place is: by the pixels of curves that it covers, or none at all."""
    outside = box.x0 < within.x0 or box.x1 > within.x1 or box.y0 < within.y0 or box.y1 > within.y1
    if outside or any(box.overlaps(other) for other in taken):
        return _FORBIDDEN
    x, y = curves.T
    covered = (x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)
    step, side = divmod(place, len(_SIDES))
    return float(_SAMPLE * covered.sum() + _LATER * side + _FARTHER * step)


def _curves(ax: _AxesBase) -> Floats:
    """Places that lines run through, in pixels; (places, 2)."""
    every = [np.zeros((0, 2))]
    for line in ax.lines:
        path = line.get_transform().transform(np.asarray(line.get_xydata(), np.float64))
        path = path[np.isfinite(path).all(axis=1)]
        for start, end in pairwise(path):
            count = min(_MOST_SAMPLES, int(np.hypot(*(end - start)) / _SAMPLE) + 2)
            every.append(start + np.linspace(0.0, 1.0, count)[:, None] * (end - start))
    places: Floats = np.concatenate(every)
    return places
