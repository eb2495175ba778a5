"""Means over seeds and requests, with intervals that hold for other seeds and other requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vstar_ops.train.report import student_t


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval."""

    mean: float
    half: float

    def text(self, digits: int = 4, *, signed: bool = False) -> str:
        """``mean ± half``, the mean alone where there is no interval."""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"

    @property
    def verdict(self) -> str:
        """Whether the mean is a gain: ``yes``, ``no`` (a loss), or ``not shown``."""
        if not abs(self.mean) > self.half:
            return "not shown"
        return "yes" if self.mean > 0 else "no"


def interval(scores: Sequence[np.ndarray] | np.ndarray) -> Interval:
    r"""The mean of ``scores[S, R]`` of the same ``R`` requests under ``S`` seeds.

    The model is :math:`x_{sr} = \mu + a_s + b_r + e_{sr}` with random effects of the seed, which all requests
    share, and of the request, which all seeds share. An interval over seeds alone would be about these
    requests, one over requests alone about these policies. The variance of the mean is estimated by the
    mean squares of the two-way layout, :math:`(MS_a + MS_b - MS_e) / (S R)`, and at least by the larger of
    the first two alone; degrees of freedom are Satterthwaite's. With one seed it is the interval over
    requests.
    """
    x = np.asarray(scores, dtype=np.float64)
    seeds, requests = x.shape
    mean = float(x.mean())
    if requests < 2:
        return Interval(mean, math.nan)
    of_seed, of_request = x.mean(1), x.mean(0)
    by_request = seeds * of_request.var(ddof=1)
    if seeds == 1:
        return Interval(mean, _half(by_request / requests, requests - 1))
    by_seed = requests * of_seed.var(ddof=1)
    rest = x - of_seed[:, None] - of_request + mean
    error = float((rest**2).sum() / ((seeds - 1) * (requests - 1)))
    freedom = np.array([seeds - 1, requests - 1, (seeds - 1) * (requests - 1)])
    squares = np.array([by_seed, by_request, -error])
    if squares.sum() < max(by_seed, by_request):  # an effect's variance would come out negative
        squares[2] = 0.0
        squares[int(by_seed > by_request)] = 0.0
    total = float(squares.sum())
    spread = float((squares**2 / freedom).sum())
    return Interval(mean, _half(total / (seeds * requests), total**2 / spread) if spread else 0.0)


def _half(variance: float, freedom: float) -> float:
    return student_t(freedom) * math.sqrt(variance)
