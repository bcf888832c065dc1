"""GGUF's blocks of codes: 32 neighbouring inputs of one output share a scale. Q4_0 and Q4_1 are written, all are read.

For a linear with weight [N, K] (N outputs, K inputs), row by row, K/32 blocks a row, little-endian:

    Q4_0   18 bytes   fp16 d             16 bytes qs      W = d · (code - 8)       4.5 bits a weight
    Q4_1   20 bytes   fp16 d   fp16 m    16 bytes qs      W = d · code + m         5   bits a weight

    byte j of qs: the low nibble is the code of input j of the block, the high nibble that of input j + 16.

Read as well: Q5_0 (22 bytes) and Q5_1 (24), with 4 bytes of fifth bits before qs, bit j for input j, zero point 16;
Q8_0 (34), fp16 d and 32 int8, here codes of 8 bits with a zero point of 128; the K-quants (`gguf_kquants`).

A group of 64 or 128 inputs becomes two or four blocks that say the same. Q4_0 has no zero points: it holds exactly the
weights whose zero points are all 8. Q4_1 has m = -scale · zero, rounded to fp16, by up to 2^-11 of it; codes and scales
stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.errors import CheckpointError
from halfbyte.formats import gguf_kquants
from halfbyte.formats.checks import BITS, no_half, no_place, refuse
from halfbyte.tensor import QuantizedTensor

BLOCK = 32
Q4_0, Q4_1 = "Q4_0", "Q4_1"
_ZERO = 8
# Kinds that are codes on a grid → bytes of a block.
CODED = {
    Q4_0: 18, Q4_1: 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34,
    **{kind: size for kind, (size, _, _) in gguf_kquants.K_QUANTS.items()},
}  # fmt: skip


def cannot_hold(tensor: QuantizedTensor, kind: str) -> str | None:
    """Why blocks of this kind cannot hold a quantized weight's codes and scales, in words; None if they can.

    Args:
        tensor: any.
        kind: `Q4_0` or `Q4_1`.
    """
    layout = f"GGUF {kind}"
    if tensor.zeros.is_floating_point() and kind == Q4_1:
        tensor = _without_minima(tensor)
    reason = no_place(tensor, layout)
    if reason is not None:
        return reason
    if tensor.in_features % BLOCK or (tensor.group_size % BLOCK and tensor.group_size < tensor.in_features):
        return (
            f"has {tensor.in_features} inputs in groups of {tensor.group_size}; {layout} has blocks of {BLOCK} inputs, "
            "which must not lie across the end of a group or of a row"
        )
    if kind == Q4_0 and (tensor.zeros != _ZERO).any():
        return f"has zero points other than {_ZERO}; {layout} is for symmetric weights and stores none; use {Q4_1}"
    return no_half(tensor, layout)


def _without_minima(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same codes and scales with integer zero points, for checks of those alone."""
    zeros = torch.zeros(tensor.zeros.shape, dtype=torch.uint8)
    return QuantizedTensor(**{**vars(tensor), "zeros": zeros})


def pack(tensor: QuantizedTensor, kind: str, name: str = "tensor") -> torch.Tensor:
    """The bytes of all blocks.

    Args:
        tensor: 4 bits, groups that are whole blocks, scales that fp16 holds exactly; for `Q4_0` zero points of 8, for
            `Q4_1` any, or floating minima.
        kind: `Q4_0` or `Q4_1`.
        name: for error messages.

    Returns:
        uint8 [out, in/32 · 18] or [out, in/32 · 20].

    Raises:
        UnsupportedError: the blocks cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    reason = cannot_hold(tensor, kind)
    refuse(reason, _without_minima(tensor) if tensor.zeros.is_floating_point() else tensor, name)
    rows = tensor.out_features
    first = torch.arange(0, tensor.in_features, BLOCK)
    group = tensor.column_groups[first]
    blocks = tensor.codes.reshape(rows, -1, 2, BLOCK // 2)
    parts = [_bytes(tensor.scales[:, group]), blocks[:, :, 0] | blocks[:, :, 1] << 4]
    if kind == Q4_1:
        parts.insert(1, _bytes(tensor.offsets[:, group]))
    return torch.cat(parts, dim=2).reshape(rows, -1)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """float32 [out, blocks] → uint8 [out, blocks, 2]: fp16."""
    return values.half().contiguous().unsqueeze(-1).view(torch.uint8)


def unpack(blocks: torch.Tensor, kind: str, name: str = "tensor") -> QuantizedTensor:
    """Blocks of any kind that are codes on a grid, exactly; of `Q4_0` and `Q4_1` the inverse of `pack`.

    Args:
        blocks: uint8 [out, bytes], whole blocks.
        kind: a key of `CODED`.
        name: for error messages.

    Returns:
        2 to 8 bits, groups of 32 or 16; of Q4_1, Q5_1, Q2_K, Q4_K and Q5_K with floating minima.

    Raises:
        CheckpointError: a row is not whole blocks, or holds numbers that are not finite.
    """
    size = CODED[kind]
    if blocks.ndim != 2 or blocks.dtype != torch.uint8 or not blocks.shape[1] or blocks.shape[1] % size:
        raise CheckpointError(
            f"tensor {name}: expected uint8 rows of {size}-byte {kind} blocks, found "
            f"{str(blocks.dtype).removeprefix('torch.')} {list(blocks.shape)}"
        )
    split = blocks.reshape(blocks.shape[0], -1, size)
    tensor = gguf_kquants.unpack(split, kind) if kind in gguf_kquants.K_QUANTS else _unpack(split, kind)
    for values in (tensor.scales, tensor.zeros):
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise CheckpointError(f"tensor {name}: holds scales that are not finite; the file is damaged")
    return tensor


def _unpack(split: torch.Tensor, kind: str) -> QuantizedTensor:
    """uint8 [out, blocks, bytes] of a kind that is no K-quant."""
    bits = int(kind[1])
    scales, rest = _floats(split[:, :, :2]), split[:, :, 2:]
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    if kind.endswith("_1"):
        zeros, rest = _floats(rest[:, :, :2]), rest[:, :, 2:]
    if bits == 8:
        codes = rest ^ 0x80  # int8 plus 128
    else:
        nibbles = rest[:, :, -BLOCK // 2 :]
        codes = torch.cat((nibbles & 15, nibbles >> 4), dim=2)
    if bits == 5:
        high = rest[:, :, :4].unsqueeze(3) >> torch.arange(8, dtype=torch.uint8) & 1
        codes = codes | high.flatten(2) << 4
    codes = codes.reshape(split.shape[0], -1)
    return QuantizedTensor(codes=codes, scales=scales, zeros=zeros, bits=bits, group_size=BLOCK)


def with_integer_zeros(tensor: QuantizedTensor) -> QuantizedTensor:
    """What `pack` made Q4_1 of: the integer zero points, if each minimum is the fp16 rounding of -scale · zero.

    The minima come back unrounded then, and all else as it is. No other quantizer's minima are such multiples.

    Args:
        tensor: 4 bits, any minima.
    """
    if not tensor.zeros.is_floating_point() or tensor.bits != BITS:
        return tensor
    zeros = torch.where(tensor.scales == 0, 0, -tensor.zeros / tensor.scales).round()
    if (
        (zeros < 0).any()
        or (zeros > 15).any()
        or not torch.equal((-tensor.scales * zeros).half().float(), tensor.zeros)
    ):
        return tensor
    return replace(tensor, zeros=zeros.to(torch.uint8))


def with_joined_groups(tensor: QuantizedTensor, limit: int = 128) -> QuantizedTensor:
    """The same weight in groups of 64 or 128 where neighbouring groups say the same, as `pack` repeats them.

    Args:
        tensor: groups of neighbours, all of one size.
        limit: largest group.
    """
    while tensor.group_size * 2 <= limit and tensor.in_features % (tensor.group_size * 2) == 0:
        pairs = [values.reshape(tensor.out_features, -1, 2) for values in (tensor.scales, tensor.zeros)]
        if not all(torch.equal(pair[:, :, 0], pair[:, :, 1]) for pair in pairs):
            break
        scales, zeros = (pair[:, :, 0].contiguous() for pair in pairs)
        tensor = replace(tensor, scales=scales, zeros=zeros, group_size=tensor.group_size * 2)
    return tensor


def _floats(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, blocks, 2] → float32 [out, blocks]."""
    return values.contiguous().view(torch.float16).squeeze(-1).float()


def rounding_error(tensor: QuantizedTensor) -> float:
    """‖W' - W‖ / ‖W‖, W' being what Q4_1 holds of W: the price of rounding the minima to fp16."""
    offsets = tensor.offsets
    lost = (offsets.half().float() - offsets)[:, tensor.column_groups]
    size = tensor.dequantize().norm()
    return float(lost.norm() / size) if size else 0.0
