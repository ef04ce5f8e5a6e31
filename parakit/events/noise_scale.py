"""The gradient noise scale: up to which batch size more samples a step are worth having.

A pure estimator: it is given squared norms, and knows neither runs nor tensors. The norm of a gradient over few
samples is longer than that over many, by noise that averages out; from the two lengths come the true gradient's
squared length and the trace of the noise, step by step, and the two are averaged apart, because a mean of their
ratios would be wrong.

References
----------
McCandlish, Kaplan, Amodei, OpenAI Dota Team: "An empirical model of large-batch training", arXiv:1812.06162 (2018),
section 2.2 and appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parakit.errors import InputError

__all__ = ["NoiseEstimator", "NoiseScale", "statistical_efficiency", "time_to_target_speedup"]

_FEWEST_STEPS = 20  # before that, an average is mostly its first values
_CERTAIN = 2.0  # standard errors by which a squared length must exceed nothing


@dataclass(frozen=True)
class NoiseScale:
    """What is known of the noise of gradients after some steps.

    Attributes
    ----------
    step : int
        The last one that was taken in.
    steps : int
        How many were.
    gradient_squared : float
        Estimate of the squared length of the true gradient; may come out negative where noise prevails.
    trace : float
        Estimate of the trace of the covariance of one sample's gradient.
    gradient_squared_error, trace_error : float
        Standard errors of these.
    """

    step: int
    steps: int
    gradient_squared: float
    trace: float
    gradient_squared_error: float
    trace_error: float

    @property
    def settled(self) -> bool:
        """Whether the ratio of the two is worth a number."""
        certain = self.gradient_squared > _CERTAIN * self.gradient_squared_error
        return self.steps >= _FEWEST_STEPS and certain and self.trace > _CERTAIN * self.trace_error

    @property
    def noise_scale(self) -> float | None:
        """The trace over the squared gradient, in samples; None unless it is settled."""
        return self.trace / self.gradient_squared if self.settled else None

    @property
    def critical_batch_size(self) -> float | None:
        """The batch at which a sample teaches half of what it does in a tiny batch; the noise scale itself."""
        return self.noise_scale

    @property
    def relative_error(self) -> float | None:
        """Relative standard error of the noise scale; None unless it is settled."""
        if not self.settled:
            return None
        return math.hypot(self.trace_error / self.trace, self.gradient_squared_error / self.gradient_squared)

    @property
    def words(self) -> str:
        """What can be said, in one sentence."""
        if self.steps < _FEWEST_STEPS:
            missing = _FEWEST_STEPS - self.steps
            return f"The noise scale is not known yet: {missing} more steps with at least two workers are needed."
        if self.trace <= _CERTAIN * self.trace_error:
            return "The workers' gradients hardly differ: no noise is seen, so the batch is larger than need be."
        if not self.settled:
            return (
                "Noise drowns the gradient: the noise scale is far above the present batch, so larger batches pay, "
                "but how much larger cannot be told yet."
            )
        scale, error = self.noise_scale, self.relative_error
        assert scale is not None
        assert error is not None
        return f"The noise scale is about {scale:.2g} samples (give or take {100 * error:.0f} %)."

    def __str__(self) -> str:
        return self.words


class NoiseEstimator:
    """Estimates the gradient noise scale from squared norms, step by step.

    For a worker's mean gradient over b samples, E|g|^2 = |G|^2 + tr(S) / b; the same holds for the global one over B.
    With workers of any shares, the sum of b |g|^2 over N workers less B |g_B|^2 has the expectation (N - 1) tr(S), as
    in an analysis of variance; for equal shares this is the estimator of McCandlish et al., eqs. A.2 and A.3.

    Parameters
    ----------
    decay : float
        Of the running averages, a step; 0.95 looks back some twenty steps.
    """

    def __init__(self, decay: float = 0.95) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise InputError(f"decay is {decay!r}; it must be a number from 0 to below 1.")
        self._gradient = _RunningMean(decay)
        self._trace = _RunningMean(decay)
        self._step = -1

    def update(
        self, step: int, norms_squared: Sequence[float], counts: Sequence[float], global_norm_squared: float
    ) -> NoiseScale:
        """Take in a step.

        Parameters
        ----------
        step : int
        norms_squared : sequence of float, (workers,)
            Squared 2-norm of each worker's mean gradient over its own samples.
        counts : sequence of float, (workers,)
            Samples of each; workers without any are left out.
        global_norm_squared : float
            Squared 2-norm of the mean gradient over all of them, before clipping.

        Returns
        -------
        NoiseScale
            What is known now. A step with fewer than two workers that had samples, or with a norm that is not finite,
            teaches nothing.

        Raises
        ------
        InputError
            If there are not as many counts as norms, or one is negative.
        """
        norms, rows = np.asarray(norms_squared, np.float64), np.asarray(counts, np.float64)
        if norms.shape != rows.shape or norms.ndim != 1:
            raise InputError(f"There are {norms.size} squared norms and {rows.size} counts; one of each a worker.")
        if np.any(rows < 0) or np.any(norms < 0) or global_norm_squared < 0:
            raise InputError("A squared norm or a count of samples is negative.")
        norms, rows = norms[rows > 0], rows[rows > 0]
        if len(rows) >= 2 and np.all(np.isfinite(norms)) and math.isfinite(global_norm_squared):
            total = rows.sum()
            trace = float((rows @ norms - total * global_norm_squared) / (len(rows) - 1))
            self._trace.add(trace)
            self._gradient.add(global_norm_squared - trace / total)
            self._step = step
        return self.latest

    @property
    def latest(self) -> NoiseScale:
        """What is known now."""
        gradient, trace = self._gradient, self._trace
        return NoiseScale(self._step, gradient.steps, gradient.mean, trace.mean, gradient.error, trace.error)


class _RunningMean:
    """An exponentially weighted mean, unbiased from the first value on, with its standard error."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._weight = self._sum = self._squares = self._weight_squared = 0.0
        self.steps = 0

    def add(self, value: float) -> None:
        keep, take = self._decay, 1 - self._decay
        self._weight = keep * self._weight + take
        self._weight_squared = keep**2 * self._weight_squared + take**2
        self._sum = keep * self._sum + take * value
        self._squares = keep * self._squares + take * value**2
        self.steps += 1

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else math.nan

    @property
    def error(self) -> float:
        """Of the mean, if the values are independent; infinite for fewer than two."""
        if self.steps < 2:
            return math.inf
        share = self._weight_squared / self._weight**2  # one over how many values count
        variance = max(0.0, self._squares / self._weight - self.mean**2)
        return math.sqrt(variance * share / max(1e-12, 1 - share))


def statistical_efficiency(batch: Any, critical: float) -> Any:
    """How much a sample teaches in a batch, compared with one in a tiny batch: 1 / (1 + B / B_crit).

    Parameters
    ----------
    batch : float or array
        Samples in a batch.
    critical : float
        The critical batch size, above 0.

    Returns
    -------
    float or array
        From 1 (perfect) towards 0; a half at the critical batch (McCandlish et al. 2018, eq. 2.11).
    """
    if not critical > 0:
        raise InputError(f"The critical batch size is {critical!r}; it must be above 0.")
    return 1 / (1 + np.asarray(batch, np.float64) / critical)[()]


def time_to_target_speedup(rate_n: Any, rate_1: float, batch_n: Any, batch_1: float, critical: float) -> Any:
    """How many times sooner a target is reached, when more samples a second also come in larger batches.

    X(N) / X(1) (1 + B_1 / B_crit) / (1 + B_N / B_crit): the speedup in samples a second, less what larger batches
    waste. It is the plain speedup where the batch stays the same.

    Parameters
    ----------
    rate_n, rate_1 : float or array
        Samples a second, then and with one worker.
    batch_n, batch_1 : float or array
        Samples in a batch, then and with one worker.
    critical : float
        The critical batch size.
    """
    if not rate_1 > 0:
        raise InputError(f"The rate with one worker is {rate_1!r} samples a second; it must be above 0.")
    gained = np.asarray(rate_n, np.float64) / rate_1
    return (gained * statistical_efficiency(batch_n, critical) / statistical_efficiency(batch_1, critical))[()]
