"""Agreement: what all workers come to alike, though nobody adds it up: counts of calls, and what they lead to.

Such a value is a part of the state of a run, and one worker's speaks for all. That it is the same on all of them was
seen when the model was tried; here it is looked at again, now and then, by marks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from parakit.errors import ModelError
from parakit.model_state.attributes import ABSENT, Attributes, Kept
from parakit.model_state.buffers import Buffers, Rule
from parakit.model_state.structure import Structure
from parakit.validation import in_short

__all__ = ["Agreement"]

_ROUNDING = 1e-9  # relative: what the same numbers come to in another order


class Looking(Protocol):
    """Who looks at a worker's model and its loss."""

    structure: Structure
    buffers: Buffers
    attributes: Attributes


class Agreement:
    """What one worker has alike with the others.

    Parameters
    ----------
    looking : Looking
    rules : mapping of str to Rule
        Of buffers that change.
    counted : sequence of str
        Attributes that are known to be a part of the state.
    watched : bool
        Whether somebody calls forward more often than a plain loop does, to look at it.
    """

    def __init__(self, looking: Looking, rules: Mapping[str, Rule], counted: Sequence[str], *, watched: bool) -> None:
        self._watched = watched
        self._structure, self._buffers, self._attributes = looking.structure, looking.buffers, looking.attributes
        self._alike = [name for name, rule in rules.items() if rule == "alike"]
        self._known = tuple(counted)
        self._counted = dict.fromkeys(counted)

    # --- attributes in a state

    def counted(self) -> dict[str, Kept]:
        """Attributes that are a part of the state, as they are now; ABSENT where there is none."""
        return self._attributes.read(self._counted) if self._counted else {}

    def state(self) -> dict[str, Kept]:
        """The same for a state, which holds only what is there."""
        return {path: kept for path, kept in self.counted().items() if kept is not ABSENT}

    def completed(self, attributes: Mapping[str, Kept]) -> dict[str, Kept]:
        """Those of a state, with what is to be taken away."""
        return {**dict.fromkeys(self._counted, ABSENT), **attributes}

    def late(self) -> dict[str, Kept]:
        """Attributes that began to change in the middle of a run, and are no part of the state yet, as they were."""
        return {path: was for path, was in self._attributes.surprises().items() if path not in self._counted}

    def count_late(self) -> None:
        """Let them be a part of the state."""
        self._counted |= dict.fromkeys(self.late())

    # --- that it holds

    def check_structure(self, *, alone: bool) -> None:
        """Refuse what forward does to the model beyond what was seen when it was tried.

        Parameters
        ----------
        alone : bool
            Whether no other worker takes part: then a buffer may begin to change, if nobody watches.

        Raises
        ------
        ModelError
        """
        self._structure.check()
        surprises = self._buffers.surprises()
        if surprises and (self._watched or not alone):
            raise ModelError(
                f"forward has changed the buffer {surprises[0]}, and did not when the model was tried.",
                cause="a queue, a count or a running value that begins later, or only for some inputs",
                remedy=f"say what several of it come to: train(..., buffers={{{surprises[0]!r}: rule}})",
            )

    def marks(self) -> list[float]:
        """Numbers that are the same on all workers, if all is alike.

        One of each buffer, one of each attribute that counts, and one of all attributes that began to later.
        """
        return [*self._buffers.alike(), *self._attributes.marks(self._known), *self._attributes.marks([self._late])]

    def check(self, mine: Sequence[float], others: Sequence[float]) -> None:
        """Refuse marks that differ.

        Parameters
        ----------
        mine, others : sequence of float
            Of `marks`: from this worker, and from another, or the means of all.

        Raises
        ------
        ModelError
        """
        pairs = zip(mine, others, strict=True)
        off = [not (math.isnan(a) or math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING)) for a, b in pairs]
        if any(off):
            raise ModelError(
                f"Workers have come to different values of {self._named()[off.index(True)]}, which forward changes as "
                "if they were the same for all rows.",
                cause="a count or a running value that goes by the rows a worker sees, or something of its process, "
                "such as its number",
                remedy="make it a buffer with a rule: train(..., buffers={...}); let it count calls, not rows; or do "
                "not keep it",
            )

    @property
    def _late(self) -> tuple[str, ...]:
        return tuple(path for path in self._attributes.surprises() if path not in self._known)

    def _named(self) -> list[Any]:
        """What `marks` are of."""
        late = in_short(self._late)
        return [
            *(f"the buffer {name}" for name in self._alike), *(f"the attribute {path}" for path in self._known),
            f"the attributes {late}" if late else "attributes that began to change",
        ]  # fmt: skip
