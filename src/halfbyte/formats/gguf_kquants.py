"""GGUF's K-quants: blocks of 256 inputs whose sub-blocks share an fp16 scale, times an integer of their own.

Each is read as codes on a grid, without loss: fp16 times an integer of at most 8 bits is exact in fp32. W of one row,
sub-block j of G inputs, all little-endian:

    Q2_K    84 bytes   16 scales: sc | mn << 4     64 qs        fp16 d   fp16 dmin          G = 16
    Q3_K   110 bytes   32 hmask   64 qs   12 scales (6 bits each, less 32)   fp16 d         G = 16
    Q4_K   144 bytes   fp16 d   fp16 dmin   12 scales and minima (6 bits)   128 qs          G = 32
    Q5_K   176 bytes   fp16 d   fp16 dmin   12 scales and minima   32 qh   128 qs           G = 32
    Q6_K   210 bytes   128 ql   64 qh   16 int8 scales   fp16 d                             G = 16

    Q2_K, Q4_K, Q5_K   W = d · sc[j] · code - dmin · mn[j]
    Q3_K               W = d · sc[j] · (code - 4)
    Q6_K               W = d · sc[j] · (code - 32)

Of the 12 bytes S of Q4_K and Q5_K, j < 4: sc = S[j] & 63, mn = S[j+4] & 63; j ≥ 4: sc = S[j+4] & 15 | S[j-4] >> 6 << 4,
mn = S[j+4] >> 4 | S[j] >> 6 << 4. Source: ggml's dequantize_row_q*_K; checked against the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.tensor import QuantizedTensor

BLOCK = 256
# Codes [rows, blocks, 256] and, per sub-block, scales and zeros (integer points or float minima) [rows, blocks, n].
_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _half(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2] → float32 [..., 1]."""
    return raw.contiguous().view(torch.float16).float()


def _planes(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, blocks, n] → [rows, blocks, 8 / bits, n]: the lowest bits of all bytes, then the next."""
    return torch.stack([raw >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=2)


def _flat(codes: torch.Tensor) -> torch.Tensor:
    return codes.reshape(*codes.shape[:2], BLOCK)


def _q2(blocks: torch.Tensor) -> _Parts:
    scales, quants, d, least = torch.split(blocks, [16, 64, 2, 2], dim=2)
    # Each half of 32 bytes is four runs of 32 codes.
    codes = torch.cat([_planes(half, 2) for half in torch.split(quants, 32, dim=2)], dim=2)
    return _flat(codes), _half(d) * (scales & 15), -(_half(least) * (scales >> 4))


def _q3(blocks: torch.Tensor) -> _Parts:
    mask, quants, packed, d = torch.split(blocks, [32, 64, 12, 2], dim=2)
    low = torch.cat([_planes(half, 2) for half in torch.split(quants, 32, dim=2)], dim=2)
    codes = low | _planes(mask, 1) << 2
    scales = _flat_nibbles(packed[:, :, :8]) | _planes(packed[:, :, 8:], 2).flatten(2) << 4
    sizes = _half(d) * (scales.float() - 32)
    return _flat(codes), sizes, torch.full(sizes.shape, 4, dtype=torch.uint8)


def _flat_nibbles(raw: torch.Tensor) -> torch.Tensor:
    """All low nibbles, then all high ones."""
    return _planes(raw, 4).flatten(2)


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 bytes of Q4_K and Q5_K → eight scales and eight minima."""
    first, second, third = torch.split(packed, 4, dim=2)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=2)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=2)
    return scales, minima


def _q4(blocks: torch.Tensor) -> _Parts:
    d, least, packed, quants = torch.split(blocks, [2, 2, 12, 128], dim=2)
    scales, minima = _six_bits(packed)
    codes = torch.cat([_planes(run, 4) for run in torch.split(quants, 32, dim=2)], dim=2)
    return _flat(codes), _half(d) * scales, -(_half(least) * minima)


def _q5(blocks: torch.Tensor) -> _Parts:
    d, least, packed, high, quants = torch.split(blocks, [2, 2, 12, 32, 128], dim=2)
    scales, minima = _six_bits(packed)
    low = torch.cat([_planes(run, 4) for run in torch.split(quants, 32, dim=2)], dim=2)
    return _flat(low | _planes(high, 1) << 4), _half(d) * scales, -(_half(least) * minima)


def _q6(blocks: torch.Tensor) -> _Parts:
    low, high, scales, d = torch.split(blocks, [128, 64, 16, 2], dim=2)
    # A half of 64 + 32 bytes is four runs of 32: low nibbles of 64 bytes, then their high ones.
    halves = [
        _flat_nibbles(lows).reshape(*lows.shape[:2], 4, 32) | _planes(highs, 2) << 4
        for lows, highs in zip(torch.split(low, 64, dim=2), torch.split(high, 32, dim=2), strict=True)
    ]
    sizes = _half(d) * scales.view(torch.int8).float()
    return _flat(torch.cat(halves, dim=2)), sizes, torch.full(sizes.shape, 32, dtype=torch.uint8)


# Kind → bytes of a block, bits of a code, and how to take it apart.
K_QUANTS: dict[str, tuple[int, int, Callable[[torch.Tensor], _Parts]]] = {
    "Q2_K": (84, 2, _q2),
    "Q3_K": (110, 3, _q3),
    "Q4_K": (144, 4, _q4),
    "Q5_K": (176, 5, _q5),
    "Q6_K": (210, 6, _q6),
}


def unpack(blocks: torch.Tensor, kind: str) -> QuantizedTensor:
    """Rows of K-quant blocks as codes, exactly.

    Args:
        blocks: uint8 [out, in/256, bytes of a block].
        kind: a key of `K_QUANTS`.

    Returns:
        2 to 6 bits, groups of 16 or 32, floating minima for Q2_K, Q4_K and Q5_K.
    """
    _, bits, split = K_QUANTS[kind]
    codes, scales, zeros = split(blocks)
    rows, size = blocks.shape[0], BLOCK // scales.shape[2]
    return QuantizedTensor(
        codes=codes.reshape(rows, -1),
        scales=scales.reshape(rows, -1),
        zeros=zeros.reshape(rows, -1),
        bits=bits,
        group_size=size,
    )
