"""AutoAWQ's GEMM layout (`quant_method: awq`, `version: gemm`).

For a linear with weight [N, K] (N outputs, K inputs) and group size G:

    qweight  int32 [K, N/8]     nibble i of word [k, c]  =  code of output 8c + ORDER[i], input k
    qzeros   int32 [K/G, N/8]   the zero points, packed the same way
    scales   fp16  [K/G, N]     plain
    bias     fp16  [N]          plain, if the linear has one

    ORDER = 0 2 4 6 1 3 5 7: outputs 0…7 holding the codes 0…7 make the word 0x75316420.

    W[n, k] = scales[k // G, n] · (code[n, k] - zero[k // G, n])

A symmetric weight is stored with all zero points 8 and `zero_point: true`, which every loader understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.formats import awq
from halfbyte.formats.bits import pack_nibbles_transposed, unpack_nibbles_transposed
from halfbyte.formats.checks import BITS, check_others, matrix, no_half, no_place, refuse, whole_groups
from halfbyte.formats.runs import AWQ_ORDER as ORDER
from halfbyte.tensor import FLOATS, QuantizedTensor

VERSION = "gemm"
LAYOUT = "AWQ GEMM"
# All a linear may have; it is quantized if it has the first.
KEYS = ("qweight", "qzeros", "scales", "bias")


def check(out_features: int, in_features: int, group_size: int, bits: int, name: str) -> None:
    """Whether the layout can hold a linear of this shape.

    Raises:
        UnsupportedError: it cannot; names the linear and the reason.
    """
    reason = _misfit(out_features, in_features, group_size, bits)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")


def cannot_hold(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can."""
    reason = _misfit(tensor.out_features, tensor.in_features, tensor.group_size, tensor.bits)
    if reason is not None:
        return reason
    return no_place(tensor, LAYOUT) or no_half(tensor, LAYOUT)


def _misfit(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    if bits != BITS:
        return f"the AWQ GEMM layout holds {BITS}-bit codes, not {bits}-bit ones"
    if out_features % 8:
        return (
            f"has {out_features} outputs; the AWQ GEMM layout packs eight to a word, so their number must be "
            f"a multiple of 8; add it to modules_to_not_convert"
        )
    if group_size != -1 and in_features % group_size:
        return f"the AWQ GEMM layout needs {in_features} inputs to be whole groups of {group_size}"
    return None


def pack(tensor: QuantizedTensor, name: str = "tensor") -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: 4 bits, integer zero points, whole groups of neighbours, scales that fp16 holds exactly.
        name: for error messages.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    refuse(cannot_hold(tensor), tensor, name)
    packed = {
        "qweight": pack_nibbles_transposed(tensor.codes, ORDER),
        "qzeros": pack_nibbles_transposed(tensor.zeros, ORDER),
        "scales": tensor.scales.T.contiguous().half(),
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
        CheckpointError: a tensor is missing or has another shape or dtype than the others imply.
    """
    qweight = matrix(tensors, KEYS[:3], "int32 [in, out/8]", LAYOUT, name)
    inputs, outputs = qweight.shape[0], 8 * qweight.shape[1]
    size = whole_groups(inputs, group_size, f"{name}.qweight")
    groups = inputs // size
    check_others(
        tensors,
        {
            "qzeros": ((torch.int32,), (groups, outputs // 8)),
            "scales": (FLOATS, (groups, outputs)),
            "bias": (FLOATS, (outputs,)),
        },
        name,
    )
    return QuantizedTensor(
        codes=unpack_nibbles_transposed(qweight, ORDER),
        scales=tensors["scales"].float().T.contiguous(),
        zeros=unpack_nibbles_transposed(tensors["qzeros"], ORDER),
        bits=BITS,
        group_size=size,
        bias=tensors.get("bias"),
    )


def quantization_config(*, group_size: int, modules_to_not_convert: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json; `awq.read_quantization_config` reads it."""
    return awq.quantization_config(VERSION, group_size=group_size, modules_to_not_convert=modules_to_not_convert)
