"""Calibration: the terms of a step's cost, read off the events of runs.

Owns the way from accounts of steps to a few numbers, and says in words what had to be assumed; refuses to predict.
What is usual is a mean over all but the steps that took more than twice the median: a median alone would leave out
that most disturbances make steps longer, and predict too much. Workers that share a core
take longer in proportion, which is taken out again, so that the numbers are those of a worker with a core of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parakit.costs.collectives import Link, all_reduce_seconds, find_algorithm
from parakit.costs.networks import NETWORKS, Network
from parakit.costs.settled_steps import FEWEST_STEPS, WARM_UP_STEPS, Group, groups_of
from parakit.errors import InputError
from parakit.events.history import History
from parakit.events.records import EXCHANGE_WAYS, RunStart, SegmentDone

__all__ = ["Calibration", "calibrate", "usual_seconds"]

Floats = npt.NDArray[np.float64]

_TELLS_APART = 100.0  # condition of a fit beyond which noise decides which cause is blamed
_STRAGGLES = 2.0  # times the usual time of a worker's part
_BYTES = 4  # of a float32
_MOST_CONTENTION = 4.0


@dataclass(frozen=True)
class Calibration:
    """What runs say about the cost of a step; seconds are of a worker with a core of its own.

    Attributes
    ----------
    sample_seconds, fixed_seconds : float
        Of computing, for each sample and for each step.
    contention : float
        What every other busy core of a machine adds to both, and to the update, as a share of it.
    spread : float
        Relative standard deviation of a worker's computing, from worker to worker and step to step.
    phases : tuple of three floats
        Shares of data, forward and backward in computing.
    stragglers, straggler_times : float
        How often a worker takes more than twice its usual time, and how many times as long it takes then.
    update_seconds, control_seconds : float
        Of the optimizer, for each step; of orders, commit and report, for each segment.
    nbytes, batch_size, cores, threads : int
        Of the exchange in bytes; of the runs.
    divided_update : bool
        Whether the workers of a host divide the update among them; its seconds are those of the whole.
    algorithm : str
    network : Network
    simulated : bool
        Whether any of the runs lived by a virtual clock.
    remarks : tuple of str
        What was assumed, and why.
    """

    sample_seconds: float
    fixed_seconds: float
    contention: float
    spread: float
    phases: tuple[float, float, float]
    stragglers: float
    straggler_times: float
    update_seconds: float
    control_seconds: float
    nbytes: int
    batch_size: int
    cores: int
    threads: int
    divided_update: bool
    algorithm: str
    network: Network
    simulated: bool
    remarks: tuple[str, ...]


def calibrate(histories: History | Iterable[History], *, algorithm: str | None = None) -> Calibration:
    """The cost of a step, from what happened in one or several runs of the same model.

    Parameters
    ----------
    histories : History, or several
        With steps at several worker counts if the exchange is to be measured, not assumed.
    algorithm : str, optional
        Of the exchange. Default: what the runs say of themselves: shared memory, a ring where gloo was used, as gloo's
        own all-reduce is one, or what a simulation priced; a ring, too, where nobody says.

    Returns
    -------
    Calibration

    Raises
    ------
    InputError
        If there are too few steps, or the runs are of models of different sizes.
    """
    every = [histories] if isinstance(histories, History) else list(histories)
    starts = [_start(history) for history in every]
    groups = [group for history, start in zip(every, starts, strict=True) for group in groups_of(history, start)]
    if not groups:
        raise InputError(
            f"There are no {WARM_UP_STEPS + FEWEST_STEPS} steps at any one worker count in this history.",
            cause="the run was too short, or resized all the time",
            remedy="train for more steps before calibrating a cost model",
        )
    start = starts[0]
    remarks: list[str] = []
    sample_seconds, fixed_seconds, contention = _computing(groups, remarks)
    spread, stragglers, times = _variation(groups, remarks)
    method = next((group for group in groups if group.travels), groups[0]).method
    chosen = find_algorithm(algorithm or _algorithm(method.way, remarks))
    simulated = any(start.simulated for start in starts)
    if simulated:
        remarks.append("Calibrated from simulated runs: these are the numbers that they were priced with.")
    nbytes = _BYTES * start.parameters
    network = _network(groups, chosen, nbytes, remarks)
    control = [segment.control_seconds for history in every for segment in history.of(SegmentDone)]
    return Calibration(
        sample_seconds, fixed_seconds, contention, spread, _phase_shares(groups), stragglers, times,
        usual_seconds(np.concatenate([g.updating(contention).ravel() for g in groups])),
        usual_seconds(np.array(control)) if control else 0.0,
        nbytes, start.batch_size, start.cores, start.threads_per_worker,
        any(group.divided for group in groups), chosen, network, simulated,
        tuple(remarks),
    )  # fmt: skip


def _algorithm(way: str, remarks: list[str]) -> str:
    """By which algorithm a run exchanges, by what its groups say of themselves."""
    if way not in EXCHANGE_WAYS:
        return way or "ring"
    if way == "tasks":
        remarks.append("Gradients travelled as tasks, which no formula here is made for: they are priced as a ring.")
    if way == "hierarchical":
        remarks.append(
            "Gradients were added up within hosts before they travelled: they are priced as a ring of all workers, and "
            "an update that those of a host divided as each made its part. workers_per_node=... prices hosts."
        )
    return "shared memory" if way == "shared memory" else "ring"


def _start(history: Any) -> RunStart:
    if not isinstance(history, History):
        raise InputError(
            f"A cost model is calibrated from the history of a run, not from {type(history).__name__}.",
            remedy="CostModel.from_history(run.history)",
        )
    start = history.latest(RunStart)
    if start is None:
        raise InputError("This history has no start of a run.", cause="the run has not begun, or failed at once")
    return start


def _computing(groups: Sequence[Group], remarks: list[str]) -> tuple[float, float, float]:
    """Seconds a sample, seconds a step, and what every other busy core adds to both, as a share of it."""
    points = np.array([point for group in groups for point in _points(group)])
    rows, others, usual, counts = points.T
    if rows.max() < 1.25 * rows.min():
        remarks.append(
            f"All shares have about {np.median(rows):.0f} samples, so the fixed cost of a step cannot be told from "
            "that of its samples: it is taken to be nothing."
        )
        return float(np.average(usual / rows, weights=counts)), 0.0, 0.0
    columns = np.stack([rows, np.ones_like(rows), rows * others], axis=1)
    weights, told_apart = np.sqrt(counts) / usual, True
    if others.max() == others.min() or np.linalg.cond(columns / np.linalg.norm(columns, axis=0)) > _TELLS_APART:
        # With a batch of one size, samples times workers is the same everywhere, and so these two costs look alike.
        if others.max() > others.min():
            remarks.append("What busy cores cost each other cannot be told from the fixed cost of a step.")
        told_apart = False
    contention = _contention(columns[:, :2], others, usual, weights) if told_apart else 0.0
    slope, fixed = _nonnegative(columns[:, :2] * (1 + contention * others)[:, None], usual, weights)[0]
    return slope, fixed, contention


def _contention(columns: Floats, others: Floats, usual: Floats, weights: Floats) -> float:
    """What every other busy core adds to samples and fixed cost alike, as a share: the best by least squares."""
    from scipy.optimize import minimize_scalar

    def off(contention: float) -> float:
        return _nonnegative(columns * (1 + contention * others)[:, None], usual, weights)[1]

    return float(minimize_scalar(off, bounds=(0.0, _MOST_CONTENTION), method="bounded", options={"xatol": 1e-5}).x)


def _points(group: Group) -> list[tuple[float, float, float, float]]:
    """Samples, other busy threads, usual seconds and how often, for every size of share."""
    sizes, times = np.unique(group.samples[group.samples > 0], return_counts=True)
    computing = group.computing
    usual = [usual_seconds(computing[group.samples == size]) for size in sizes]
    return [
        (float(size), group.others, seconds, float(count))
        for size, seconds, count in zip(sizes, usual, times, strict=True)
        if seconds > 0
    ]


def _nonnegative(columns: Floats, values: Floats, weights: Floats) -> tuple[list[float], float]:
    """The best weights of some columns, none of them negative, and how far off they leave the values."""
    from scipy.optimize import nnls

    scale = np.abs(columns * weights[:, None]).max(axis=0)
    found, off = nnls(columns * weights[:, None] / scale, values * weights)
    return [float(value) for value in found / scale], float(off)


def _variation(groups: Sequence[Group], remarks: list[str]) -> tuple[float, float, float]:
    """Relative spread, how often workers straggle, and how many times as long that takes."""
    several = [group for group in groups if group.samples.shape[1] > 1]
    if not several:
        remarks.append(
            "One worker only: the spread between workers is taken to be that from one of its steps to the next."
        )
    ratios = [_relative(group) for group in several or groups]
    every = np.concatenate([ratio.ravel() for ratio in ratios])
    every = every[np.isfinite(every)]
    slow = every > _STRAGGLES
    variances = [_variance(ratio) for ratio in ratios]
    times = float(np.median(every[slow])) if slow.any() else 3.0
    return float(np.sqrt(np.mean(variances))), float(slow.mean()), times


def _relative(group: Group) -> Floats:
    """Computing, relative to what is usual for shares of that size in this group; NaN where there was no share."""
    relative: Floats = np.full_like(group.samples, np.nan)
    for size in np.unique(group.samples[group.samples > 0]):
        same = group.samples == size
        relative[same] = group.computing[same] / usual_seconds(group.computing[same])
    return relative


def usual_seconds(seconds: Floats) -> float:
    """The mean of all that took at most twice the median."""
    return float(seconds[seconds <= _STRAGGLES * np.median(seconds)].mean())


def _variance(relative: Floats) -> float:
    """Between the workers of a step, where there are several; what slows all of them at once is no spread."""
    kept = np.where(np.isfinite(relative) & (relative <= _STRAGGLES), relative, np.nan)
    if kept.shape[1] == 1:
        usual = kept[np.isfinite(kept)]
        # From one step to the next (von Neumann 1941): what makes many in a row slow would slow other workers too.
        return float(np.mean(np.diff(usual) ** 2) / 2) if len(usual) > 1 else 0.0
    counts = np.isfinite(kept).sum(axis=1)
    rows = kept[counts > 1]
    if not len(rows):
        return 0.0
    return float(np.nanvar(rows, axis=1, ddof=1).mean())


def _phase_shares(groups: Sequence[Group]) -> tuple[float, float, float]:
    totals = np.sum([np.median(group.phases, axis=(0, 1)) for group in groups], axis=0)
    whole = totals.sum()
    data, forward, backward = totals / whole if whole > 0 else (0.0, 1 / 3, 2 / 3)
    return float(data), float(forward), float(backward)


def _network(groups: Sequence[Group], algorithm: str, nbytes: int, remarks: list[str]) -> Network:
    """Latency and bandwidth from the exchange at several worker counts; what cannot be told is assumed."""
    assumed = NETWORKS["shared memory" if algorithm == "shared memory" else "loopback"]
    exchanging = [group for group in groups if group.travels]
    alone = [group for group in exchanging if group.crowding == 1.0]
    if exchanging and not alone:
        remarks.append("Workers shared cores in every exchange, so its time holds waiting for a core too.")
    exchanging = alone or exchanging
    if not exchanging:
        remarks.append(f"No exchange between processes was seen: that of {assumed} is assumed.")
        return assumed
    counts = np.array([group.workers for group in exchanging], np.float64)
    seconds = np.array([usual_seconds(group.exchange) for group in exchanging])
    per_latency = np.asarray(all_reduce_seconds(algorithm, counts, 0.0, Link(1.0, 0.0)))
    per_byte_time = np.asarray(all_reduce_seconds(algorithm, counts, float(nbytes), Link(0.0, 1.0)))
    if len(np.unique(counts)) < 2:
        return _bandwidth_only(assumed, float(counts[0]), per_latency[0], per_byte_time[0], seconds[0], remarks)
    return _fitted(assumed, per_latency, per_byte_time, seconds, remarks)


def _bandwidth_only(
    assumed: Network, count: float, per_latency: float, per_byte_time: float, seconds: float, remarks: list[str]
) -> Network:
    """One worker count gives one number: the latency is assumed, as far as it leaves room for the bytes."""
    latency = min(assumed.latency_seconds, 0.5 * seconds / per_latency)
    pace = (seconds - latency * per_latency) / per_byte_time
    remarks.append(
        f"The exchange was seen at {count:.0f} workers only: a latency of {1e6 * latency:.3g} µs is assumed, and the "
        "rest of its time taken for bandwidth."
    )
    return Network("calibrated", latency, 1 / max(pace, 1e-15), "measured at one worker count")


def _fitted(
    assumed: Network, per_latency: Floats, per_byte_time: Floats, seconds: Floats, remarks: list[str]
) -> Network:
    columns = np.stack([per_latency, per_byte_time], axis=1)
    (latency, pace), _ = _nonnegative(columns, seconds, 1 / np.maximum(seconds, 1e-9))
    if latency == 0:
        remarks.append("The exchange grows with workers as bandwidth alone explains: its latency comes out as nothing.")
    if pace == 0:
        remarks.append(f"The exchange costs latency alone; the bandwidth is taken to be that of {assumed}.")
        pace = 1 / assumed.bytes_per_second
    return Network("calibrated", float(latency), float(1 / pace), "measured at several worker counts")
