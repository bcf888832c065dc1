"""AutoAWQ's GEMV layout (`quant_method: awq`, `version: gemv`).

For a linear with weight [N, K] (N outputs, K inputs) and group size G:

    qweight  int32 [N, K/8]   nibble i of word [n, c]  =  code of output n, input 8c + i
    qzeros   int32 [N, Z]     nibble i of word [n, c]  =  zero point of output n, group 8c + i
    scales   fp16  [N, 8Z]    scales of output n, group by group
    bias     fp16  [N]        plain, if the linear has one

    Z = m · ceil((K/G) / 8 / m), with m = 1 for G of 128 and more, 2 for 64, 4 for 32; entries of groups that do not
    exist are 0. K = 576 and G = 64 make 9 groups and Z = 2: sixteen scales a row, seven of them 0.

    W[n, k] = scales[n, k // G] · (code[n, k] - zero[n, k // G])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import CheckpointError
from halfbyte.formats import awq
from halfbyte.formats.bits import pack_nibbles, unpack_nibbles
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

VERSION = "gemv"
LAYOUT = "AWQ GEMV"
# All a linear may have; it is quantized if it has the first.
KEYS = ("qweight", "qzeros", "scales", "bias")
# Group sizes with their m of the width rule; from 128 on it is 1.
_MULTIPLES = {32: 4, 64: 2}


def padded_groups(in_features: int, group_size: int) -> int | None:
    """Groups a row has in the file, 8Z; None for a group size that the layout does not know."""
    multiple = 1 if group_size >= 128 else _MULTIPLES.get(group_size)
    if multiple is None:
        return None
    return 8 * multiple * -(-in_features // group_size // (8 * multiple))


def misfit(tensor: QuantizedTensor, layout: str, inputs_of: int) -> str | None:
    """What GEMV and GEMV_FAST ask of the shape alike; None if it fits.

    Args:
        tensor: any.
        layout: its name, for the words.
        inputs_of: K must be a multiple of this.
    """
    if padded_groups(tensor.in_features, tensor.group_size) is None:
        return f"the {layout} layout knows groups of 32, 64, and 128 or more, not of {tensor.group_size}"
    return (
        no_multiple(tensor.out_features, 8, "outputs", layout)
        or no_multiple(tensor.in_features, inputs_of, "inputs", layout)
        or no_whole_groups(tensor, layout)
    )


def cannot_hold(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can."""
    return no_place(tensor, LAYOUT) or misfit(tensor, LAYOUT, 32) or no_half(tensor, LAYOUT)


def pack(tensor: QuantizedTensor, name: str = "tensor") -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: 4 bits, integer zero points, whole groups of 32, 64, or 128 and more, scales that fp16 holds exactly,
            N a multiple of 8 and K of 32.
        name: for error messages.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    refuse(cannot_hold(tensor), tensor, name)
    missing = (padded_groups(tensor.in_features, tensor.group_size) or 0) - tensor.groups
    packed = {
        "qweight": pack_nibbles(tensor.codes),
        "qzeros": pack_nibbles(torch.nn.functional.pad(tensor.zeros, (0, missing))),
        "scales": torch.nn.functional.pad(tensor.scales.half(), (0, missing)),
    }
    if tensor.bias is not None:
        packed["bias"] = tensor.bias.half()
    return packed


def unpack(tensors: Mapping[str, torch.Tensor], *, group_size: int, name: str = "tensor") -> QuantizedTensor:
    """The inverse of `pack`.

    Args:
        tensors: qweight, qzeros, scales and perhaps bias.
        group_size: from the checkpoint's config; -1 for one group per row.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the others imply, or holds scales that
            are not finite.
    """
    qweight = matrix(tensors, KEYS[:3], "int32 [out, in/8]", LAYOUT, name)
    outputs, inputs = qweight.shape[0], 8 * qweight.shape[1]
    size, padded = stored_groups(inputs, group_size, LAYOUT, f"{name}.qweight")
    check_others(
        tensors,
        {
            "qzeros": ((torch.int32,), (outputs, padded // 8)),
            "scales": (FLOATS, (outputs, padded)),
            "bias": (FLOATS, (outputs,)),
        },
        name,
    )
    groups = inputs // size
    return QuantizedTensor(
        codes=unpack_nibbles(qweight),
        scales=tensors["scales"][:, :groups].float().contiguous(),
        zeros=unpack_nibbles(tensors["qzeros"])[:, :groups].contiguous(),
        bits=BITS,
        group_size=size,
        bias=tensors.get("bias"),
    )


def stored_groups(inputs: int, group_size: int, layout: str, key: str) -> tuple[int, int]:
    """Inputs of a group, with -1 resolved, and groups a row has in the file.

    Args:
        inputs: of the linear.
        group_size: from config.json.
        layout: for messages.
        key: full name of its codes.

    Raises:
        CheckpointError: the inputs are not whole groups, or a group size that the layout does not know.
    """
    size = whole_groups(inputs, group_size, key)
    padded = padded_groups(inputs, size)
    if padded is None:
        raise CheckpointError(
            f"config.json: group_size {group_size}: the {layout} layout knows groups of 32, 64, and 128 or more"
        )
    return size, padded


def quantization_config(*, group_size: int, modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `awq.read_quantization_config` reads it."""
    return awq.quantization_config(VERSION, group_size=group_size, modules_to_not_convert=modules_to_not_convert)
