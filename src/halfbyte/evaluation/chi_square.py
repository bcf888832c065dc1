"""Whether draws follow a distribution that is known exactly."""

from __future__ import annotations

import torch


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Pearson's statistic of counts [V] against probabilities [V], and a limit for it.

    An honest sampler exceeds the limit about once in 10^7 runs, or more rarely: it is the quantile of Wilson and
    Hilferty (1931), which errs to the high side where outcomes are few. Outcomes expected fewer than 5 times are thrown
    together (Cochran 1954). An outcome of probability 0 that was seen all the same makes the statistic infinite.
    """
    mass = expected.double() / expected.double().sum() * float(counts.sum())
    if int(counts[mass == 0].sum()):
        return float("inf"), 0.0
    rare = mass < 5
    seen, wanted = counts[~rare].double(), mass[~rare]
    if float(mass[rare].sum()) >= 5:
        seen = torch.cat([seen, counts[rare].sum().double()[None]])
        wanted = torch.cat([wanted, mass[rare].sum()[None]])
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = max(len(wanted) - 1, 1)
    part = 2 / (9 * freedom)
    return statistic, freedom * (1 - part + 5.2 * part**0.5) ** 3
