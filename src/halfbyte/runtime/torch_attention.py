"""Attention of a decoder's step over a static cache, by torch's scaled_dot_product_attention.

Query heads that share a key-value head stand in the place of further tokens: keys and values are never repeated. Where
a row may look is a mask, made on the device from the positions: a captured graph serves any of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def attention_mask(
    positions: torch.Tensor, sequences: int, window: int, reach: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to the scores: 0 where a row may look, else -∞.

    Args:
        positions: int32 [rows], the rows of a sequence neighbours, as many for each; a row of position -1 looks at 0.
        sequences: how many.
        window: positions a row sees, itself included; 0 for all.
        reach: positions there are to look at.
        group: query heads of a key-value head.
        dtype: of the scores' operands.

    Returns:
        [sequences, 1, group · rows of a sequence, reach].
    """
    at = positions.view(sequences, 1, 1, -1, 1).clamp(min=0)
    key = torch.arange(reach, device=positions.device, dtype=positions.dtype)
    seen = key <= at
    if window:
        seen &= key > at - window
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device).masked_fill(~seen, float("-inf"))
    rows = positions.shape[0] // sequences
    return mask.expand(-1, 1, group, rows, reach).reshape(sequences, 1, group * rows, reach)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q · kᵀ · scale + mask) · v (Vaswani et al. 2017, eq. 1), heads in groups (Ainslie et al. 2023).

    Args:
        q: [sequences, rows, heads, head_dim].
        keys: [sequences, kv_heads, reach, head_dim].
        values: likewise.
        mask: from `attention_mask`.
        scale: of the scores.

    Returns:
        [sequences · rows, heads · head_dim].
    """
    sequences, rows, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.view(sequences, rows, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    folded = grouped.reshape(sequences, kv_heads, -1, head_dim)
    y = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    y = y.view(sequences, kv_heads, -1, rows, head_dim).permute(0, 3, 1, 2, 4)
    return y.reshape(sequences * rows, heads * head_dim)


def attend_from_start(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """The same for rows at positions 0, 1, …, each looking at all up to its own: no mask in memory.

    Args:
        q: [sequences, rows, heads, head_dim].
        keys: [sequences, kv_heads, rows, head_dim].
        values: likewise.
        scale: of the scores.
    """
    sequences, rows, heads, head_dim = q.shape
    y = functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, is_causal=True, scale=scale, enable_gqa=heads != keys.shape[1]
    )
    return y.transpose(1, 2).reshape(sequences * rows, heads * head_dim)
