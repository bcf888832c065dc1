"""Eight 4-bit codes in one 32-bit word: the core every layout shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NATURAL = (0, 1, 2, 3, 4, 5, 6, 7)


def pack_nibbles(codes: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """Pack runs of eight neighbours along the last axis.

    Args:
        codes: uint8 [..., 8·words], each below 16.
        order: nibble i (bits 4i to 4i+3) of a word holds element order[i] of its run.

    Returns:
        int32 [..., words]. A word whose top nibble is 8 or more is negative.
    """
    runs = codes.reshape(*codes.shape[:-1], -1, 8)
    # Two nibbles make a byte and four bytes a word: no arithmetic wider than the data, and none on Python integers.
    low, high = runs[..., list(order[0::2])], runs[..., list(order[1::2])]
    packed = (high << 4).bitwise_or_(low).contiguous()
    return packed.view(torch.int32).squeeze(-1)


def unpack_nibbles(words: torch.Tensor, order: Sequence[int] = NATURAL) -> torch.Tensor:
    """The inverse of `pack_nibbles`: int32 [..., words] → uint8 [..., 8·words]."""
    packed = words.contiguous().unsqueeze(-1).view(torch.uint8)
    runs = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    runs[..., list(order[0::2])] = packed & 15
    runs[..., list(order[1::2])] = packed >> 4
    return runs.reshape(*words.shape[:-1], -1)
