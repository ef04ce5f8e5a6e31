"""Late changes: attributes that begin to change in the middle of a run, while it is looked at.

To look means to call forward more often than a plain loop does, and what counts calls would count these. What was seen
to change when the model was tried is given back by `Still`; numbers that begin later are given back here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from parakit.model_state.attributes import Attributes

__all__ = ["Late"]


class Late:
    """Gives back plain values that change while a run is looked at.

    Parameters
    ----------
    attributes : Attributes

    Attributes
    ----------
    seen : bool
        Whether some did when it was last looked at.
    """

    def __init__(self, attributes: Attributes) -> None:
        self._attributes = attributes
        self.seen = False

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Let calls not count meanwhile."""
        before = self._attributes.plain()
        try:
            yield
        finally:
            self.seen = self._attributes.give_back(before)
