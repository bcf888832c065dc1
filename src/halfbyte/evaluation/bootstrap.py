"""How far a mean over windows of text can be trusted: the symmetric bootstrap-t.

Windows are drawn with replacement, the same ones for all that is compared: of a difference the paired one is taken
window by window, so that what makes a window hard for every model cancels. Studentized (Efron and Tibshirani 1993, An
Introduction to the Bootstrap, 12.5; symmetric: Hall 1988, JRSS B 50), because percentiles promise too much of some
tens of windows. Windows count as independent; neighbours in one document are not quite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Of fewer, a resample is often one window several times, which has no spread to studentize by.
MIN_WINDOWS = 5
# Drawn at a time: the indices of some windows for each are in memory.
CHUNK = 500
# Standard errors this small, to the values, are rounding of windows that are all alike.
ROUNDING = 1e-12
# A resample with this little of the standard error drew windows that are alike, and says nothing about the scale.
NO_SPREAD = 1e-3

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it can be trusted.

    Attributes:
        value: over all windows, each counted by its tokens.
        low: lower end of the 95 % confidence interval; None of fewer than `MIN_WINDOWS` windows.
        high: its upper end.
        p_value: two-sided, of the hypothesis that a difference is 0 (a ratio is 1); None of what is no difference,
            and likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    def exp(self) -> Estimate:
        """Of the exponential: perplexity from a loss, a ratio of perplexities from a difference of losses."""
        low, high = (None if end is None else math.exp(end) for end in (self.low, self.high))
        return Estimate(math.exp(self.value), low, high, self.p_value)


def bootstrap_mean(
    means: Sequence[float],
    tokens: Sequence[int],
    *,
    test: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of what was measured in windows.

    Args:
        means: of each window, over its tokens; for a paired difference, the differences.
        tokens: of each window.
        test: whether to test that it is 0.
        resamples: bootstrap samples to draw.
        seed: of the draws.
    """
    x, weights = np.asarray(means, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    mean, error = (float(part[0]) for part in _mean_and_error(x[None], weights[None]))
    if len(x) < MIN_WINDOWS:
        return Estimate(mean)
    if error <= ROUNDING * float(np.abs(x).max()):
        return Estimate(mean, mean, mean, (1.0 if mean == 0 else 1 / (1 + resamples)) if test else None)
    generator = np.random.default_rng(seed)
    distances = []
    for start in range(0, resamples, CHUNK):
        drawn = generator.integers(len(x), size=(min(CHUNK, resamples - start), len(x)))
        means_drawn, errors_drawn = _mean_and_error(x[drawn], weights[drawn])
        spread = errors_drawn > NO_SPREAD * error
        distances.append(np.abs(means_drawn - mean)[spread] / errors_drawn[spread])
    far = np.concatenate(distances)
    reach = error * float(np.quantile(far, CONFIDENCE, method="higher"))
    p_value = (1 + int((far >= abs(mean) / error).sum())) / (1 + len(far)) if test else None
    return Estimate(mean, mean - reach, mean + reach, p_value)


def _mean_and_error(x: Array, weights: Array) -> tuple[Array, Array]:
    """Of each row [rows, windows]: the weighted mean, and its standard error as that of a ratio estimator."""
    total, windows = weights.sum(axis=1), x.shape[1]
    means = (weights * x).sum(axis=1) / total
    spread = ((weights * (x - means[:, None])) ** 2).sum(axis=1)
    return means, np.sqrt(spread * windows / max(windows - 1, 1)) / total
