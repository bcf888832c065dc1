"""The AWQ scale search, scored by the Gram matrix.

For one fold (a producer and the linears that consume its output) find per-channel scales s that minimise
    Σ_linears tr(ΔW · G · ΔWᵀ),   ΔW = Q(W · diag(s)) · diag(s)⁻¹ - W,   G = E[x xᵀ].
Candidates: identity (always), s = x^r, and with duo scaling s = x^r / w^(1-r), where x = E|x_c| per channel (or E[x_c²]
with importance "l2") and w is the mean of |W| relative to the largest weight of its group (AutoAWQ's definition);
r = 0, 1/n_grid, …, 1. Every candidate is centred to √(max·min) = 1. Source: Lin et al. 2023 (arXiv 2306.00978),
equations 4 and 5; the Gram form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.gram import gram_error
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.statistics import InputStatistics

# Rows scored per linear: the ranking of candidates needs a few hundred, the rest only costs time.
SAMPLED_ROWS = 256
# Steps of the exponent between the candidates tried first.
COARSE_STEPS = 4


@dataclass(frozen=True)
class ScaleChoice:
    """What the search found for one fold.

    Attributes:
        scales: float32 [channels] of the fold, all ones for the identity.
        label: "identity", "x^0.55" or "x^0.55/w^0.45".
        error: Σ tr(ΔW G ΔWᵀ) of the choice over the scored rows.
        identity_error: the same without scaling.
        tried: (label, error) of every candidate; a non-finite error means it was dropped.
    """

    scales: torch.Tensor
    label: str
    error: float
    identity_error: float
    tried: tuple[tuple[str, float], ...]


def search_scales(
    fold: Fold, weights: Sequence[torch.Tensor], statistics: InputStatistics, grid: Grid, config: QuantConfig
) -> ScaleChoice:
    """Try every candidate on copies; nothing is modified.

    Args:
        fold: whose channels are scaled.
        weights: float32 [out, in] of each consumer.
        statistics: of the consumers' shared input.
        grid: what the scaled weights will be rounded to.
        config: `n_grid` and `duo_scaling`.
    """
    rows = torch.cat([sample_rows(weight) for weight in weights])
    importance = statistics.gram.diagonal() if config.importance == "l2" else statistics.mean_abs
    salience = fold.per_channel(importance)
    magnitude = fold.per_channel(_relative_magnitude(weights, grid))
    identity = torch.ones_like(salience)
    best = ScaleChoice(identity, "identity", math.inf, math.inf, ())
    tried: list[tuple[str, float]] = []

    def score(label: str, scales: torch.Tensor) -> float:
        nonlocal best
        columns = fold.per_column(scales)
        error = float(gram_error(grid.fake_quantize(rows * columns) / columns - rows, statistics.gram))
        tried.append((label, error))
        if error < best.error:
            best = replace(best, scales=scales, label=label, error=error)
        return error if math.isfinite(error) else math.inf

    identity_error = score("identity", identity)
    for family in _families(salience, magnitude, config):
        _refine(family, score)
    return replace(best, identity_error=identity_error, tried=tuple(tried))


@dataclass(frozen=True)
class _Family:
    """Candidates along one exponent r = step / n_grid; steps from `first` to `last`."""

    first: int
    last: int
    candidate: Callable[[int], tuple[str, torch.Tensor]]


def _families(salience: torch.Tensor, magnitude: torch.Tensor, config: QuantConfig) -> Iterator[_Family]:
    """Those asked for; what both would try, and the identity, once. Channels without a usable statistic keep 1."""

    def alone(step: int) -> tuple[str, torch.Tensor]:
        r = step / config.n_grid
        return f"x^{r:.3g}", _centred(salience**r)

    def over_weight(step: int) -> tuple[str, torch.Tensor]:
        r = step / config.n_grid
        return f"x^{r:.3g}/w^{1 - r:.3g}", _centred(salience**r / (magnitude ** (1 - r) + 1e-4))

    if config.duo_scaling in (False, "both"):
        yield _Family(1, config.n_grid, alone)
    if config.duo_scaling in (True, "both"):
        yield _Family(0, config.n_grid - 1, over_weight)


def _refine(family: _Family, score: Callable[[str, torch.Tensor], float]) -> None:
    """Every `COARSE_STEPS`-th step, then halfway around the best so far, down to single steps.

    The error is a smooth bowl in r with ripples of rounding. This finds what the whole grid would find but for 0.06 %
    of the error (docs/design/quantization.md), in half the time.
    """
    stride = COARSE_STEPS
    coarse = sorted({*range(family.first, family.last, stride), family.last})
    found = {step: score(*family.candidate(step)) for step in coarse}
    while stride > 1:
        stride //= 2
        best = min(found, key=lambda step: found[step])
        for step in (best - stride, best + stride):
            if family.first <= step <= family.last and step not in found:
                found[step] = score(*family.candidate(step))


def _centred(scales: torch.Tensor) -> torch.Tensor:
    usable = torch.isfinite(scales) & (scales > 0)
    if not usable.any():
        return torch.ones_like(scales)
    scales = scales.clamp(min=1e-4)
    centre = (scales[usable].max() * scales[usable].min()).sqrt()
    return torch.where(usable, scales / centre, torch.ones_like(scales))


def _relative_magnitude(weights: Sequence[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Mean over output rows of |W| / max|W| of its group: [in]."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        groups = grid.split(weight).abs()
        relative = groups / (groups.amax(dim=-1, keepdim=True) + 1e-6)
        total += grid.join(relative, weight.shape[1]).sum(dim=0)
    return total / sum(weight.shape[0] for weight in weights)


def sample_rows(weight: torch.Tensor) -> torch.Tensor:
    """Evenly spaced rows, `SAMPLED_ROWS` at most."""
    step = -(-weight.shape[0] // SAMPLED_ROWS)
    return weight[::step]
