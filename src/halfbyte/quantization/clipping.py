"""Range search: give up a group's extreme weights to round the others more finely.

Each end of a group's range [low, high] is moved on its own: first both ends shrink together, then one after the other
is refined around the best, then the scale is refitted to the codes in closed form (least squares), for this zero point
and its neighbours. The error of a candidate is δ · G_gg · δᵀ, δ the change of the group's weights and G_gg its
diagonal block of the Gram matrix: the published objective (partial dot products per group; Lin et al. 2023, section
3.3 of AutoAWQ's implementation) without its subsample of tokens. AutoAWQ clamps both ends to one absolute value, which
leaves the shorter end unsearched; that costs more perplexity than anything else here (docs/design/quantization.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.kernels.ranges import try_range
from halfbyte.quantization.grid import MIN_SCALE, Grid

# 25 candidates and 4 refits come within 2 % of the best of 576 pairs of ends.
JOINT_FACTORS = (1.0, 0.93, 0.86, 0.80, 0.74)
# Around the best so far, for one end at a time; twice, because the best place of one end depends on the other's.
END_FACTORS = (0.80, 0.88, 0.94, 1.06)
END_PASSES = 2
REFITTED_ZEROS = (0, 1, -1, 0)
# Weights looked at in one go: they stay in the second-level cache of two cores.
CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class GroupRanges:
    """The grid of every group.

    Attributes:
        scales: float32 [out, groups], exactly representable in fp16.
        zeros: float32 [out, groups], integers.
        clipped: bool [out, groups]: whether the range is narrower than what the group's weights span.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    clipped: torch.Tensor


def full_range(weight: torch.Tensor, grid: Grid) -> GroupRanges:
    """The range every group spans, without a search: weight float32 [out, in]."""
    scales, zeros = grid.parameters(*grid.range(grid.split(weight)))
    return GroupRanges(scales, zeros, torch.zeros_like(scales, dtype=torch.bool))


def search_range(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> GroupRanges:
    """The best range of every group.

    Args:
        weight: float32 [out, in], after scaling.
        gram: float32 [in, in] of the input that meets this weight.
        grid: what the weight will be rounded to.
    """
    blocks = grid.diagonal_blocks(gram)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    parts = [_search(grid.split(chunk).permute(1, 2, 0), blocks, grid) for chunk in torch.split(weight, rows)]
    return GroupRanges(*(torch.cat(column, dim=1).T.contiguous() for column in zip(*parts, strict=True)))


def _search(groups: torch.Tensor, blocks: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, zeros and `clipped` [groups, rows] for `groups` [groups, size, rows]."""
    groups = groups.contiguous()
    low, high = groups.aminmax(dim=1)
    best = _Best(groups, blocks, grid)
    for factor in JOINT_FACTORS:
        best.offer(low * factor, high * factor)
    for _ in range(END_PASSES):
        for lower, upper in ((True, False), (False, True)):
            from_low, from_high = best.low, best.high
            for factor in END_FACTORS:
                best.offer(from_low * (factor if lower else 1), from_high * (factor if upper else 1))
    for step in REFITTED_ZEROS if grid.zero_point else (0,):
        best.refit(step)
    narrower = grid.max_code * best.scales < (high.clamp(min=0) - low.clamp(max=0)) * (1 - 1e-3)
    return best.scales, best.zeros, narrower


class _Best:
    """The best grid so far for each group, [groups, rows]."""

    def __init__(self, groups: torch.Tensor, blocks: torch.Tensor, grid: Grid):
        self._groups, self._blocks, self._grid = groups, blocks, grid
        self._projections: torch.Tensor | None = None
        self._error = torch.full_like(groups[:, 0], float("inf"))
        self.low = self.high = self.scales = self.zeros = torch.zeros_like(self._error)

    def offer(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take the range [low, high] where it is better."""
        better = self._offer(*self._grid.parameters(low, high))
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)

    def refit(self, step: int) -> None:
        """With the zero point moved by `step`, take the scale that fits the codes c best: c·G·w / c·G·c."""
        if self._projections is None:
            self._projections = self._blocks @ self._groups
        zeros = (self.zeros + step).clamp(0, self._grid.max_code)
        curvature, slope = try_range(
            self._groups, self._blocks, self.scales, zeros, self._grid.max_code, self._projections
        )
        assert slope is not None
        fitted = slope / curvature
        usable = (fitted > 0.5 * self.scales) & (fitted < 2 * self.scales)
        scales = torch.where(usable, fitted, self.scales).clamp(min=MIN_SCALE).half().float()
        self._offer(scales, zeros)

    def _offer(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        error, _ = try_range(self._groups, self._blocks, scales, zeros, self._grid.max_code)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scales, self.zeros = torch.where(better, scales, self.scales), torch.where(better, zeros, self.zeros)
        return better
