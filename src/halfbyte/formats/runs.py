"""Runs of eight codes and the four bytes they share: what a packed word is, free of torch.

The lessons show these lines; `bits` packs whole matrices and gives the same bytes. Only indices and |, <<, >> and & are
used, so that tensors and numpy arrays go through them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NATURAL = (0, 1, 2, 3, 4, 5, 6, 7)
# Of AutoAWQ's GEMM layout: nibble i of a word holds element AWQ_ORDER[i] of its run.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def word_bytes(runs: Any, order: Sequence[int] = NATURAL) -> Any:
    """The bytes of 32-bit words, lowest first.

    Args:
        runs: uint8 [..., 8] codes below 16, a tensor or an array.
        order: nibble i (bits 4i to 4i+3) of a word holds element order[i] of its run.

    Returns:
        uint8 [..., 4], of the same kind.
    """
    packed = runs[..., :4] & 0
    for byte in range(4):
        packed[..., byte] = (runs[..., order[2 * byte + 1]] << 4) | runs[..., order[2 * byte]]
    return packed


def split_bytes(packed: Any, runs: Any, order: Sequence[int] = NATURAL) -> None:
    """The inverse of `word_bytes`: uint8 [..., 4] `packed` → uint8 [..., 8] `runs`, which is written."""
    for byte in range(4):
        runs[..., order[2 * byte]] = packed[..., byte] & 15
        runs[..., order[2 * byte + 1]] = packed[..., byte] >> 4
