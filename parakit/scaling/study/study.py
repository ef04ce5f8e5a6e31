"""`Scaling`: a study of how speed grows with workers, every repeat of it, and what follows from them.

Owns the measurements of a sweep and the events of their steps; sums up, keeps, and hands on to fits, to a cost model
and to pictures. Refuses to measure, and to fit curves itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from parakit.costs.model import CostModel
from parakit.errors import InputError
from parakit.events.history import History
from parakit.scaling.study import archive
from parakit.scaling.study.notes import remarks, title
from parakit.scaling.study.records import About, Measurement, Row, Spread, check_different, from_plain, rows
from parakit.scaling.study.table import Table
from parakit.validation import brief, check_whole, plain

if TYPE_CHECKING:
    import pandas

    from parakit.scaling.laws.fit import Fit
    from parakit.scaling.laws.selection import Comparison, Prediction

__all__ = ["Scaling"]

_ENOUGH = 3  # worker counts with a core for each worker, from which on the crowded ones are left out of fits
_Found = TypeVar("_Found")


class Scaling:
    """How speed grows with workers: all repeats, and what follows from them. `parakit.sweep` makes one.

    Parameters
    ----------
    measurements : sequence of Measurement
        In the order in which they were made.
    about : About
        What was trained, on what.
    histories : sequence of History
        The steps that were timed, for `costs`; a history a run.
    stopped : str
        Why the sweep ended before it was complete; "" if it did not.
    notes : sequence of str
        What else went wrong.

    Attributes
    ----------
    fits : dict of str to Fit
        What `fit` found, by the names of the laws; pictures show them.

    Examples
    --------
    >>> from parakit.scaling.study.records import About, Measurement
    >>> from parakit.scaling.study.study import Scaling
    >>> rates = {1: (100.0, 102.0), 2: (190.0, 198.0)}
    >>> study = Scaling([
    ...     Measurement(workers, block, block, rate, 1.0, 5, 5.0, cores=2)
    ...     for workers, repeats in rates.items() for block, rate in enumerate(repeats)
    ... ], About(cores=2))
    >>> round(study.speedup(2).median, 2)
    1.92
    """

    _draw: ClassVar[Callable[[Scaling], bytes | None] | None] = None

    def __init__(
        self,
        measurements: Iterable[Measurement],
        about: About | None = None,
        *,
        histories: Sequence[History] = (),
        stopped: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.measurements = tuple(measurements)
        for measured in self.measurements:
            if not isinstance(measured, Measurement):
                raise InputError(f"A study is made of Measurement, not of {brief(measured)}.")
        check_different(self.measurements)
        self.about = About() if about is None else about
        self.histories = tuple(histories)
        self.stopped = stopped
        self.notes = tuple(notes)
        self.fits: dict[str, Fit] = {}

    @classmethod
    def draw_with(cls, draw: Callable[[Scaling], bytes | None]) -> None:
        """Have studies drawn as PNGs by a function, from now on; pictures are made above studies."""
        cls._draw = staticmethod(draw)

    # --- what was measured

    @property
    def mode(self) -> str:
        """How work grows with workers: "strong", where it does not, or "weak"."""
        return self.about.mode

    @property
    def simulated(self) -> bool:
        """Whether any of it was priced on a virtual clock, and not measured."""
        return self.about.simulated or any(m.simulated for m in self.measurements)

    @property
    def complete(self) -> bool:
        """Whether everything that was to be measured was."""
        repeats = {n: sum(m.workers == n for m in self.measurements) for n in self.about.counts}
        return not self.stopped and all(count >= self.about.repeats for count in repeats.values())

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return rows(self.measurements, self.mode)

    @property
    def workers(self) -> tuple[int, ...]:
        """The worker counts that were measured, ascending."""
        return tuple(row.workers for row in self._rows)

    @property
    def crowded(self) -> tuple[int, ...]:
        """Those of them with more busy threads than cores."""
        return tuple(row.workers for row in self._rows if row.crowded)

    @property
    def fits_crowded(self) -> bool:
        """Whether fits rest on crowded counts too, unless told otherwise, as there are too few others."""
        return bool(self.crowded) and len(self._rows) - len(self.crowded) < _ENOUGH

    @property
    def baselines(self) -> dict[str, Spread]:
        """Samples per second of the rivals, by their names: plain PyTorch with one core, and with all cores."""
        return from_plain(self.measurements)

    def row(self, workers: int) -> Row:
        """A worker count, summed up.

        Raises
        ------
        InputError
            If it was not measured.
        """
        found = next((row for row in self._rows if row.workers == plain(workers)), None)
        if found is None:
            raise InputError(
                f"{brief(workers)} workers were not measured: this study has {_listed(self.workers)}.",
                remedy="choose one of these, or study.predict(n)",
            )
        return found

    def speedup(self, workers: int) -> Spread:
        """Speedup over one worker.

        The ratio of rates is taken within each block of the sweep, in which every count was visited once: what
        disturbed the machine for longer than a block cancels. Median and quartiles are over the blocks.

        Raises
        ------
        InputError
            If this count, or one worker, was not measured.
        """
        found = self.row(workers)
        self.row(1)
        return found.speedup

    def efficiency(self, workers: int) -> float:
        """Speedup over the number of workers; errors as for `speedup`."""
        return self.speedup(workers).median / workers

    def table(self) -> Table:
        """A row a worker count: rate, speedups, efficiency and the Karp–Flatt serial fraction; below, remarks."""
        return Table(self._rows, title(self), remarks(self))

    # --- what follows

    def fit(self, law: str = "usl", *, crowded: bool | None = None) -> Fit:
        """Fit a law of scaling to all repeats.

        Parameters
        ----------
        law : str
            Such as "usl", "amdahl", "linear"; see `parakit.scaling.laws.laws`.
        crowded : bool, optional
            Whether counts with more workers than cores take part. Default: only if fewer than three others were
            measured; then the fit says what this machine does when it is crowded, and the study says so.

        Returns
        -------
        Fit
            Also kept in `fits`, for pictures.

        Raises
        ------
        InputError
            If too few worker counts were measured.
        """
        taken = _for_fits(self, crowded)
        from parakit.scaling.laws.fit import fit

        found = self._marked(fit(law, *taken))
        self.fits[law if isinstance(law, str) else str(getattr(law, "name", law))] = found
        return found

    def compare(self, *, crowded: bool | None = None) -> Comparison:
        """Fit all candidate laws and compare how well they predict what they have not seen; parameters as for `fit`.

        The cost model stands beside them, where one can be calibrated (`costs` says why not): it was not fitted.
        """
        taken = _for_fits(self, crowded)
        from parakit.scaling.laws.selection import compare

        found = compare(*taken, extra=self._calibrated())
        return replace(self._marked(found), fits={name: self._marked(each) for name, each in found.fits.items()})

    def predict(self, n: int, *, crowded: bool | None = None) -> Prediction:
        """What N workers would do, with how far the laws that fit differ about it.

        Parameters
        ----------
        n : int
        crowded : bool, optional
            As for `fit`.

        Raises
        ------
        WorkerCountError, InputError
            If n is no number of workers, or too few counts were measured.
        """
        n = plain(n)
        check_whole("n", n, 1)
        return self.compare(crowded=crowded).predict(n)

    def _marked(self, found: _Found) -> _Found:
        """What was found, marked as simulated if the measurements were."""
        marked: Any = found
        return replace(marked, simulated=True) if self.simulated else found

    def _calibrated(self) -> list[CostModel]:
        """The cost model, where the steps suffice for one."""
        try:
            return [self.costs]
        except InputError:
            return []

    @cached_property
    def costs(self) -> CostModel:
        """The cost model of what was trained, calibrated from the steps that were timed.

        Raises
        ------
        InputError
            If there are too few steps, or none because the study was made by hand.
        """
        if not self.histories:
            raise InputError(
                "This study has no events of steps, from which a cost model could be calibrated.",
                cause="it was made by hand, or its sweep ended before anything was measured",
                remedy="make one with parakit.sweep",
            )
        changes: dict[str, Any] = {"weak": True, "batch_size": self.about.batch_size} if self.mode == "weak" else {}
        return self._marked(CostModel.from_history(self.histories, **changes))

    # --- keeping

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fits, as plain values."""
        return archive.pack(self.measurements, self.about, self.histories, self.stopped, self.notes)

    def to_json(self) -> str:
        """The study as JSON, with the steps that were timed."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Scaling:
        """The study that `to_json` wrote.

        Raises
        ------
        InputError
            If the text is no such study, or holds values that cannot be.
        """
        values = archive.unpack(text)
        return cls(values.pop("measurements"), **values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the study to a JSON file; `load` reads it.

        Raises
        ------
        InputError
            If the name does not end in .json, or its folder does not exist.
        """
        return archive.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scaling:
        """The study that `save` wrote; errors as for `from_json`."""
        return cls.from_json(archive.read(path))

    def to_frame(self) -> pandas.DataFrame:
        """The repeats as a pandas data frame, one row a measurement."""
        return archive.frame(self.measurements)

    # --- showing

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        return self.table()._repr_html_()

    def _repr_png_(self) -> bytes | None:
        """A picture of the speedups; None where nothing can be drawn."""
        return None if Scaling._draw is None else Scaling._draw(self)


def _for_fits(study: Scaling, crowded: bool | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Worker counts and rates of all repeats that take part in a fit; (repeats,) each."""
    left_out = () if crowded or (crowded is None and study.fits_crowded) else study.crowded
    taken = [m for m in study.measurements if m.kind == "workers" and m.workers not in left_out]
    counts = sorted({m.workers for m in taken})
    if len(counts) < 2:
        known = f"only {_listed(counts)} of them" if counts else "none"
        raise InputError(
            f"A law of scaling needs at least two worker counts; {known} can be used.",
            cause="more workers than cores are left out" if left_out else "the sweep was made at one count",
            remedy="parakit.sweep(..., workers=[1, 2, 4])" + (", or crowded=True" if left_out else ""),
        )
    return np.array([m.workers for m in taken], np.int64), np.array([m.rate for m in taken], np.float64)


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(f"{count:,}" for count in counts) if counts else "none"
