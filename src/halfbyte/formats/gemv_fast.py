"""AutoAWQ's GEMV_FAST layout (`quant_method: awq`, `version: gemv_fast`) and llm-awq's second one (`llm-awq`).

For a linear with weight [N, K] (N outputs, K inputs) and group size G, and 8Z as in `gemv`:

    qweight  int16 [N/4, K]   four codes a word; rows and columns interleaved, see below
    scales   fp16  [8Z, N]    transposed; rows of groups that do not exist are 0
    qzeros   fp16  [8Z, N]    -(scale · zero), multiplied and rounded to fp16; llm-awq calls it scaled_zeros
    bias     fp16  [N]        plain, if the linear has one

Four rows share a row of words. In each run of 64 columns come 16 words of row 0, 16 of row 1, 2 and 3; the 16 words of
a row are two runs of 32 columns, and in each of those a word takes every eighth column:

    word   0            1            2             …   7
    k      0 8 16 24    1 9 17 25    2 10 18 26    …   7 15 23 31      lowest nibble first, columns of the run

with the words in the order 0 1 2 3 …: column 8a + 2b + c of the run is nibble a of word 2b + c.

    W[n, k] = scales[k // G, n] · code[n, k] + qzeros[k // G, n]

The zero point comes back as -qzeros / scales, rounded: the rounding of qzeros moves it by 0.01 at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from halfbyte.errors import CheckpointError
from halfbyte.formats import awq
from halfbyte.formats.bits import NIBBLES, as_lanes
from halfbyte.formats.checks import BITS, check_others, matrix, no_half, no_place, refuse
from halfbyte.formats.gemv import misfit, padded_groups, stored_groups
from halfbyte.tensor import FLOATS, QuantizedTensor

VERSION = "gemv_fast"
LLM_AWQ = "llm-awq"
LAYOUT = "AWQ GEMV_FAST"
# All a linear may have, by AutoAWQ's names and by llm-awq's; it is quantized if it has the first.
KEYS = ("qweight", "qzeros", "scales", "bias")
LLM_AWQ_KEYS = ("qweight", "scaled_zeros", "scales", "bias")


def cannot_hold(tensor: QuantizedTensor) -> str | None:
    """Why the layout cannot hold a quantized weight without changing it, in words; None if it can."""
    reason = no_place(tensor, LAYOUT) or misfit(tensor, LAYOUT, 64) or no_half(tensor, LAYOUT)
    if reason is not None:
        return reason
    if not torch.isfinite((tensor.scales * tensor.zeros).half()).all():
        return (
            f"has scales whose product with the zero point is above 65504, fp16's largest; the {LAYOUT} layout "
            "stores that product"
        )
    if ((tensor.scales == 0) & (tensor.zeros != 0)).any():
        return f"has a scale of 0, beside which the {LAYOUT} layout cannot hold a zero point"
    return None


def pack(tensor: QuantizedTensor, name: str = "tensor", *, llm_awq: bool = False) -> dict[str, torch.Tensor]:
    """The tensors to store under the linear's name.

    Args:
        tensor: 4 bits, integer zero points, whole groups of 32, 64, or 128 and more, scales that fp16 holds exactly,
            N a multiple of 8 and K of 64.
        name: for error messages.
        llm_awq: under llm-awq's names.

    Raises:
        UnsupportedError: the layout cannot hold the tensor (`cannot_hold`).
        ConfigError: codes or zero points of 16 or more.
    """
    refuse(cannot_hold(tensor), tensor, name)
    missing = (padded_groups(tensor.in_features, tensor.group_size) or 0) - tensor.groups
    outputs, inputs = tensor.codes.shape
    # Four rows, runs of 64, halves of 32, a, and a lane of eight bytes, 2b + c.
    runs = as_lanes(tensor.codes, torch.int64).view(outputs // 4, 4, inputs // 64, 2, 4)
    low, high = (runs[..., a] | (runs[..., a + 1] << 4) for a in (0, 2))
    words = torch.stack([low[..., None].view(torch.uint8), high[..., None].view(torch.uint8)], -1).view(torch.int16)
    zeros = LLM_AWQ_KEYS[1] if llm_awq else KEYS[1]
    packed = {
        "qweight": words.squeeze(-1).transpose(1, 2).reshape(outputs // 4, inputs),
        "scales": _padded(tensor.scales, missing),
        zeros: _padded(-(tensor.scales * tensor.zeros), missing),
    }
    if tensor.bias is not None:
        packed["bias"] = tensor.bias.half()
    return packed


def _padded(values: torch.Tensor, missing: int) -> torch.Tensor:
    """fp32 [out, groups] → fp16 [groups + missing, out]."""
    return torch.nn.functional.pad(values.half(), (0, missing)).T.contiguous()


def unpack(tensors: Mapping[str, torch.Tensor], *, group_size: int, name: str = "tensor") -> QuantizedTensor:
    """The inverse of `pack`, under either names.

    Args:
        tensors: qweight, qzeros or scaled_zeros, scales and perhaps bias.
        group_size: from the checkpoint's config; -1 for one group per row.
        name: of the linear, for error messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype than the others imply, or holds numbers that
            are not finite or that no zero point explains.
    """
    keys = LLM_AWQ_KEYS if LLM_AWQ_KEYS[1] in tensors else KEYS
    qweight = matrix(tensors, keys[:3], "int16 [out/4, in]", LAYOUT, name)
    outputs, inputs = 4 * qweight.shape[0], qweight.shape[1]
    if inputs % 64:
        raise CheckpointError(f"tensor {name}.qweight: expected a multiple of 64 inputs, found {inputs}")
    size, padded = stored_groups(inputs, group_size, LAYOUT, f"{name}.qweight")
    stored = (FLOATS, (padded, outputs))
    check_others(tensors, {keys[1]: stored, "scales": stored, "bias": (FLOATS, (outputs,))}, name)
    groups = inputs // size
    scales = tensors["scales"][:groups].float().T.contiguous()
    words = qweight.reshape(outputs // 4, inputs // 64, 4, 2, 8).transpose(1, 2).contiguous().unsqueeze(-1)
    pairs = [as_lanes(words.view(torch.uint8)[..., half], torch.int64) for half in (0, 1)]
    runs = torch.cat([(pair >> shift) & NIBBLES for pair in pairs for shift in (0, 4)], -1)
    return QuantizedTensor(
        codes=runs.view(torch.uint8).reshape(outputs, inputs),
        scales=scales,
        zeros=_zero_points(scales, tensors[keys[1]][:groups].float().T, f"{name}.{keys[1]}"),
        bits=BITS,
        group_size=size,
        bias=tensors.get("bias"),
    )


def _zero_points(scales: torch.Tensor, products: torch.Tensor, key: str) -> torch.Tensor:
    """uint8 [out, groups] from -(scale · zero)."""
    exact = torch.where(products == 0, 0.0, -products / scales)
    zeros = exact.round()
    # 15 rounded to bf16, the coarsest of the dtypes, would be off by 0.03.
    wrong = ~((zeros >= 0) & (zeros < 1 << BITS) & ((exact - zeros).abs() < 0.125))
    if wrong.any():
        scale, product = float(scales[wrong][0]), float(products[wrong][0])
        raise CheckpointError(
            f"tensor {key}: expected a scale times a zero point of 0 to 15, negated; found {product:.6g} where the "
            f"scale is {scale:.6g}"
        )
    return zeros.to(torch.uint8)


def quantization_config(
    *, group_size: int, modules_to_not_convert: Sequence[str], llm_awq: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of config.json; `awq.read_quantization_config` reads it."""
    version = LLM_AWQ if llm_awq else VERSION
    return awq.quantization_config(version, group_size=group_size, modules_to_not_convert=modules_to_not_convert)
