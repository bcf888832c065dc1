"""Clip search: give up a group's extreme weights to round the others more finely.

Each group's range [low, high] may shrink by a factor p in (MIN_SHRINK, 1]. The error of a group is scored by its own
diagonal block of the Gram matrix, δ · G_gg · δᵀ with δ the change of that group's weights, which is the published
objective (partial dot products per group) without its subsample of tokens. Both ends of an asymmetric range shrink
together: AutoAWQ clamps symmetrically, which leaves the shorter end unsearched.
"""

from __future__ import annotations

import torch

from halfbyte.quantization.grid import Grid

STEPS = 20
MIN_SHRINK = 0.5


def search_clip(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The best range factor of every group.

    Args:
        weight: float32 [out, in], after scaling.
        gram: float32 [in, in] of the input that meets this weight.
        grid: what the weight will be rounded to.

    Returns:
        float32 [out, groups], factors in (MIN_SHRINK, 1].
    """
    groups = grid.split(weight).transpose(0, 1)  # [groups, out, size]: one batched product per candidate
    count, _, size = groups.shape
    blocks = torch.stack([gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    low, high = groups.aminmax(dim=-1)
    best = torch.ones_like(low)
    best_error = torch.full_like(low, float("inf"))
    for step in range(STEPS):
        factor = 1 - step * (1 - MIN_SHRINK) / STEPS
        scales, zeros = grid.parameters(low * factor, high * factor)
        delta = grid.codes(groups, scales, zeros).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(groups)
        error = (torch.bmm(delta, blocks) * delta).sum(dim=-1)
        better = error < best_error
        best = torch.where(better, factor, best)
        best_error = torch.where(better, error, best_error)
    return best.T.contiguous()
