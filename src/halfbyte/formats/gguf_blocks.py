"""GGUF's blocks of 4-bit codes, Q4_0 and Q4_1: 32 neighbouring inputs of one output share a scale.

For a linear with weight [N, K] (N outputs, K inputs), row by row, K/32 blocks a row, little-endian:

    Q4_0   18 bytes   fp16 d             16 bytes qs      W = d · (code - 8)       4.5 bits a weight
    Q4_1   20 bytes   fp16 d   fp16 m    16 bytes qs      W = d · code + m         5   bits a weight

    byte j of qs: the low nibble is the code of input j of the block, the high nibble that of input j + 16.

A group of 64 or 128 inputs becomes two or four blocks that say the same. Q4_0 has no zero points: it holds exactly the
weights whose zero points are all 8. Q4_1 has m = -scale · zero, rounded to fp16, by up to 2^-11 of it; codes and scales
stay as they are.
"""

from __future__ import annotations

import torch

from halfbyte.errors import CheckpointError
from halfbyte.formats.checks import BITS, no_half, no_place, refuse
from halfbyte.tensor import QuantizedTensor

BLOCK = 32
Q4_0, Q4_1 = "Q4_0", "Q4_1"
_ZERO = 8


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
    """The inverse of `pack`, in groups of 32; of Q4_1 with floating minima.

    Args:
        blocks: uint8 [out, bytes] as `pack` gives them.
        kind: `Q4_0` or `Q4_1`.
        name: for error messages.

    Raises:
        CheckpointError: a row is not whole blocks, or holds numbers that are not finite.
    """
    size = 18 if kind == Q4_0 else 20
    if blocks.ndim != 2 or blocks.dtype != torch.uint8 or not blocks.shape[1] or blocks.shape[1] % size:
        raise CheckpointError(
            f"tensor {name}: expected uint8 rows of {size}-byte {kind} blocks, found "
            f"{str(blocks.dtype).removeprefix('torch.')} {list(blocks.shape)}"
        )
    rows = blocks.shape[0]
    split = blocks.reshape(rows, -1, size)
    scales, rest = _floats(split[:, :, :2]), split[:, :, 2:]
    zeros = torch.full(scales.shape, _ZERO, dtype=torch.uint8)
    if kind == Q4_1:
        zeros, rest = _floats(rest[:, :, :2]), rest[:, :, 2:]
    for values in (scales, zeros):
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise CheckpointError(f"tensor {name}: holds scales that are not finite; the file is damaged")
    codes = torch.stack((rest & 15, rest >> 4), dim=2).reshape(rows, -1)
    return QuantizedTensor(codes=codes, scales=scales, zeros=zeros, bits=BITS, group_size=BLOCK)


def _floats(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, blocks, 2] → float32 [out, blocks]."""
    return values.contiguous().view(torch.float16).squeeze(-1).float()


def rounding_error(tensor: QuantizedTensor) -> float:
    """‖W' - W‖ / ‖W‖, W' being what Q4_1 holds of W: the price of rounding the minima to fp16."""
    offsets = tensor.offsets
    lost = (offsets.half().float() - offsets)[:, tensor.column_groups]
    size = tensor.dequantize().norm()
    return float(lost.norm() / size) if size else 0.0
