"""The Marlin layout as a file: AutoAWQ's (`quant_method: awq`, `version: marlin`) and IST-DASLab's own.

Not for new checkpoints: few engines open it, and those that compute with Marlin make it from other layouts themselves.

For a linear with weight [N, K] (N outputs, K inputs) and group size G, which is 128 or K:

    qweight  int32 [K/16, 2N]   tiles of 16 inputs × 64 outputs, 128 words each; IST calls it B
    scales   fp16  [K/G, N]     permuted along N; IST calls it s
    bias     fp16  [N]          plain, if the linear has one

Word [kt, 128·nt + 4t + j] belongs to thread t (0 to 31) of a warp and to the 16 outputs j (0 to 3) of tile (kt, nt).
Its nibble i holds element e = ORDER[i], with ORDER = 0 2 4 6 1 3 5 7:

    k = 16·kt + 2·(t % 4) + (e % 2) + 8·(e // 2 % 2);    n = 64·nt + 16·j + t // 4 + 8·(e // 4)

so that a thread of a tensor core finds its own fragment in one word. Scales of several groups: each run of 64 is an
8 × 8 matrix, transposed. Scales of one group (G = K): in each run of 32, place 8i + 2a + b holds output 8a + 2i + b.

    W[n, k] = scales[k // G, n] · (code[n, k] - 8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import CheckpointError
from halfbyte.formats import awq
from halfbyte.formats.bits import NIBBLES, as_lanes
from halfbyte.formats.checks import (
    BITS,
    check_others,
    matrix,
    no_half,
    no_multiple,
    no_place,
    no_whole_groups,
    refuse,
    whole_groups,
)
from halfbyte.tensor import FLOATS, QuantizedTensor

VERSION = "marlin"
LAYOUT = "Marlin"
# All a linear may have, by AutoAWQ's names and by IST's; it is quantized if it has the first.
KEYS = ("qweight", "scales", "bias")
IST_KEYS = ("B", "s", "bias")
_ZERO = 8


def cannot_hold(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can."""
    reason = (
        no_place(tensor, LAYOUT)
        or no_multiple(tensor.out_features, 256, "outputs", LAYOUT)
        or no_multiple(tensor.in_features, 128, "inputs", LAYOUT)
    )
    if reason is not None:
        return reason
    if tensor.group_size not in (128, tensor.in_features):
        return f"the {LAYOUT} layout knows groups of 128 and whole rows, not groups of {tensor.group_size}"
    if (tensor.zeros != _ZERO).any():
        return f"has zero points other than {_ZERO}; the {LAYOUT} layout is for symmetric weights and stores none"
    return no_whole_groups(tensor, LAYOUT) or no_half(tensor, LAYOUT)


def pack(tensor: QuantizedTensor, name: str = "tensor") -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name, by AutoAWQ's names.

    Args:
        tensor: 4 bits, zero points of 8, groups of 128 or whole rows, scales that fp16 holds exactly, N a multiple of
            256 and K of 128.
        name: for error messages.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes of 16 or more.
    """
    refuse(cannot_hold(tensor), tensor, name)
    outputs, inputs = tensor.codes.shape
    # Axes of n: tile, j, e // 4, t // 4; of k: tile, e // 2 % 2, and a lane of eight bytes, t % 4 and e % 2.
    tiles = as_lanes(tensor.codes, torch.int64).view(outputs // 64, 4, 2, 8, inputs // 16, 2)
    # ORDER puts e // 2 % 2 into the lowest bit of a nibble's number, e // 4 into the next and e % 2 into the highest.
    halves = tiles[..., 0] | (tiles[..., 1] << 4)
    words = torch.stack([halves[:, :, half, ..., None].view(torch.uint8) for half in (0, 1)], -1)
    words = words.view(outputs // 64, 4, 8, inputs // 16, 16).view(torch.int32)
    scales = tensor.scales.half().T.reshape(tensor.groups, -1, *_scale_runs(tensor.groups))
    packed = {
        "qweight": words.permute(3, 0, 2, 4, 1).reshape(inputs // 16, 2 * outputs),
        "scales": scales.transpose(2, 3).reshape(tensor.groups, outputs),
    }
    if tensor.bias is not None:
        packed["bias"] = tensor.bias.half()
    return packed


def _scale_runs(groups: int) -> tuple[int, int, int]:
    """The axes of a run of scales in the order of the outputs; the file has the first two the other way round."""
    return (8, 8, 1) if groups > 1 else (4, 4, 2)


def unpack(tensors: Mapping[str, torch.Tensor], *, group_size: int, name: str = "tensor") -> QuantizedTensor:
    """The inverse of `pack`, under either names.

    Args:
        tensors: qweight, scales and perhaps bias; or B, s and perhaps bias.
        group_size: from the checkpoint's config; -1 for one group per row.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the others imply, or holds scales that
            are not finite.
    """
    keys = IST_KEYS if IST_KEYS[0] in tensors else KEYS
    codes = matrix(tensors, keys[:2], "int32 [in/16, 2·out]", LAYOUT, name)
    inputs, outputs = 16 * codes.shape[0], codes.shape[1] // 2
    if not codes.numel() or codes.shape[1] % 128:
        raise CheckpointError(
            f"tensor {name}.{keys[0]}: expected whole tiles of 64 outputs in int32 [in/16, 2·out], found "
            f"{list(codes.shape)}"
        )
    size = inputs if group_size >= inputs else whole_groups(inputs, group_size, f"{name}.{keys[0]}")
    groups = inputs // size
    check_others(tensors, {keys[1]: (FLOATS, (groups, outputs)), "bias": (FLOATS, (outputs,))}, name)
    words = codes.reshape(inputs // 16, outputs // 64, 8, 4, 4).permute(1, 4, 2, 0, 3).contiguous()
    halves = words.view(torch.uint8).view(*words.shape[:-1], 8, 2)
    # [2, tiles of n, j, t // 4, tiles of k]: a lane of eight bytes for each e // 4.
    lanes = torch.stack([as_lanes(halves[..., half], torch.int64).squeeze(-1) for half in (0, 1)], 2)
    tiles = torch.stack([lanes & NIBBLES, (lanes >> 4) & NIBBLES], -1)
    scales = tensors[keys[1]].float().reshape(groups, -1, *_scale_runs(groups)).transpose(2, 3)
    return QuantizedTensor(
        codes=tiles.view(torch.uint8).reshape(outputs, inputs),
        scales=scales.reshape(groups, outputs).T.contiguous(),
        zeros=torch.full((outputs, groups), _ZERO, dtype=torch.uint8),
        bits=BITS,
        group_size=size,
        bias=tensors.get("bias"),
    )


def quantization_config(*, group_size: int, modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `awq.read_quantization_config` reads it."""
    return awq.quantization_config(
        VERSION, group_size=group_size, modules_to_not_convert=modules_to_not_convert, zero_point=False
    )
