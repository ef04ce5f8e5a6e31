"""Bands of a fit: all coefficients that the measurements do not reject, and how far apart their predictions lie.

A profile likelihood: a throughput lies in the band if some coefficients within the bounds give it with a sum of squares
that an F test does not reject. Such a band is right also where a coefficient is at its bound, keeps its promise with
few measurements, and cannot reach beyond what the law itself allows. Owns the region of coefficients; refuses to solve.

References
----------
Bates and Watts, "Nonlinear Regression Analysis and Its Applications", 1988 (profiles; chapter 6).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt

from parakit.scaling.laws.laws import Law
from parakit.scaling.laws.observations import Points
from parakit.scaling.laws.solver import ENDLESS, Face, in_parts, reaches, squares

__all__ = ["Region"]

Floats = npt.NDArray[np.float64]

_RAYS, _STEPS = 180, 24
_MANY_COUNTS = 200  # from which on fewer do: the region is small then, and round
_RAYS_OF_MANY, _STEPS_OF_MANY = 36, 8
_DOUBLINGS, _HALVINGS = 60, 14  # of a ray whose last part matters least
_LEAST_EXCESS = 1e-20  # what rounding leaves of an exact curve


class Region:
    """Coefficients whose sum of squares exceeds the least by so much at most, as a cloud of them.

    Rays leave the best of all, and within each face of the bounds that is not rejected the best of that, up to where
    the sum of squares is too large or a bound is met; the cloud are points along them. So what lies at a bound is in it
    exactly.

    Parameters
    ----------
    law : Law
    points : Points
    found : sequence of Face
        The best first; see `parakit.scaling.laws.solver.faces`.
    excess : float
        Of the sum of squares.
    """

    def __init__(self, law: Law, points: Points, found: tuple[Face, ...], excess: float) -> None:
        self._law, self._points = law, points
        self._allowed = found[0].sum_of_squares + max(excess, _LEAST_EXCESS)
        self._large = len(points.counts) > _MANY_COUNTS
        self._reach = reaches(law, points)
        self._most = np.log1p(np.minimum(np.asarray(law.bounds) * self._reach, ENDLESS))
        taken = [face for face in found if face.sum_of_squares <= self._allowed]
        everywhere = Face(tuple(range(len(law.coefficients))), found[0].coefficients, found[0].sum_of_squares)
        self._sizes = np.concatenate([self._from(face) for face in (*taken, everywhere)])

    def edges(self, n: Floats, *, new: float = 0.0) -> tuple[Floats, Floats]:
        """Logarithms of the lowest and highest throughput at some counts, (counts,) each.

        Parameters
        ----------
        new : float
            0 for the law itself, or the share of a measurement's variance that is to come: 1 / repeats.
        """
        parts = [self._some_edges(part, new) for part in in_parts(n, len(self._sizes))]
        low, high = (np.concatenate(edges) for edges in zip(*parts, strict=True))
        # The rate of one worker is the only one to which an endless loss at all other counts leaves no limit.
        return low, np.where((n <= 1) & self.endless, np.inf, high)

    def _some_edges(self, n: Floats, new: float) -> tuple[Floats, Floats]:
        cloud, spared, rates = self._cloud
        middle = rates[:, None] + np.log(n) - np.log(1 + cloud @ self._law.matrix(n).T)
        half = (np.sqrt(spared * (1 / self._points.many + new)))[:, None]
        return (middle - half).min(axis=0), (middle + half).max(axis=0)

    @cached_property
    def _cloud(self) -> tuple[Floats, Floats, Floats]:
        """Coefficients, how much of the allowed squares each leaves to lambda, and the logarithm of its lambda."""
        cloud = np.expm1(self._sizes) / self._reach
        least, rates = squares(self._law, self._points, cloud)
        return cloud, np.maximum(self._allowed - least, 0.0), rates

    @property
    def limits(self) -> list[tuple[float, float]]:
        """The lowest and highest value of each coefficient; infinite where the measurements do not limit it."""
        lowest, highest = self._sizes.min(axis=0), self._sizes.max(axis=0)
        reached = highest >= self._most * (1 - 1e-9)
        bounds = np.where(reached, self._law.bounds, np.expm1(highest) / self._reach)
        return list(zip((np.expm1(lowest) / self._reach).tolist(), bounds.tolist(), strict=True))

    @property
    def endless(self) -> bool:
        """Whether the measurements leave some coefficient without a limit."""
        return any(math.isinf(high) for _, high in self.limits)

    # --- rays. Coefficients are searched by z = log(1 + coefficient times the reach of its term): near the best
    # --- that is linear, and far from it a step of any size is one.

    def _squares(self, sizes: Floats) -> Floats:
        return squares(self._law, self._points, np.expm1(sizes) / self._reach)[0]

    def _from(self, face: Face) -> Floats:
        """Points along rays from the best of a face, within that face; (points, coefficients)."""
        origin = np.log1p(face.coefficients * self._reach)
        if not face.kept:
            return origin[None]
        spared = self._allowed - face.sum_of_squares
        directions = self._directions(origin, list(face.kept)) * math.sqrt(spared)
        ends = self._ends(origin, directions)
        shares = np.sin(np.linspace(0, np.pi / 2, _STEPS_OF_MANY if self._large else _STEPS))
        along = origin + (shares[:, None] * ends)[:, :, None] * directions
        return np.asarray(np.clip(along, 0, self._most).reshape(-1, len(origin)))

    def _directions(self, origin: Floats, kept: list[int]) -> Floats:
        """Ways to go, each as long as adds 1 to the sum of squares, near the origin."""
        losses = 1 + self._law.matrix(self._points.counts) @ (np.expm1(origin) / self._reach)
        matrix = self._law.matrix(self._points.counts)[:, kept]
        slope = matrix / losses[:, None] * (np.exp(origin) / self._reach)[kept]
        share = self._points.repeats / self._points.many
        slope = np.sqrt(self._points.repeats)[:, None] * (slope - share @ slope)
        sizes, turned = np.linalg.eigh(slope.T @ slope)
        sizes = np.maximum(sizes, max(1e-12 * float(sizes.max()), 1e-24))
        vectors = _unit_vectors(len(kept), _RAYS_OF_MANY if self._large else _RAYS)
        found = np.zeros((len(vectors), len(origin)))
        found[:, kept] = vectors @ (turned / np.sqrt(sizes)).T
        return found

    def _ends(self, origin: Floats, directions: Floats) -> Floats:
        """How far each ray goes, as a multiple of its direction."""
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(directions > 0, (self._most - origin) / directions, -origin / directions)
        room = np.where(directions == 0, np.inf, room).min(axis=1)

        def within(at: Floats) -> npt.NDArray[np.bool_]:
            sizes = np.clip(origin + at[:, None] * directions, 0, self._most)
            return np.asarray(self._squares(sizes) <= self._allowed)

        inner: Floats = np.zeros_like(room)
        outer: Floats = np.minimum(1.0, room)
        for _ in range(_DOUBLINGS):
            further = within(outer)
            inner = np.where(further, outer, inner)
            if not (further & (outer < room)).any():
                break
            outer = np.where(further, np.minimum(2 * outer, room), outer)
        inner = np.where(within(outer), outer, inner)
        for _ in range(_HALVINGS):
            middle = (inner + outer) / 2
            good = within(middle)
            inner, outer = np.where(good, middle, inner), np.where(good, outer, middle)
        return inner


def _unit_vectors(size: int, many: int) -> Floats:
    """Directions in so many dimensions; the same ones always."""
    if size == 1:
        return np.array([[1.0], [-1.0]])
    if size == 2:
        angles = np.linspace(0, 2 * np.pi, many, endpoint=False)
        return np.column_stack([np.cos(angles), np.sin(angles)])
    drawn = np.random.default_rng(0).standard_normal((many * size**2, size))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
