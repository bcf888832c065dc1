"""A matrix of the fused decoder, in the native form that fits its weights.

a8 (native/cpu/a8.hpp): integer codes times activations in 8 bits; groups of a multiple of 32 inputs that lie side by
side, integer zero points, scales exact in fp16. a16 (native/cpu/w4_kernel.hpp): integer codes times activations in
fp32; everything `QuantizedTensor` holds. half: a bf16 or fp16 weight, read in place.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.kernels.w4a16 import pack_native
from halfbyte.tensor import QuantizedTensor

COMPUTE_MODES = ("a8", "a16")
# Widths a8 stores codes in; narrower codes take the next.
A8_BITS = (4, 6, 8)

_HALVES = {torch.bfloat16: 1, torch.float16: 2}


def quantized_linear(weight: QuantizedTensor, compute: str, tier: str) -> Any:
    """A native `Linear`.

    Args:
        weight: on the CPU; not kept.
        compute: "a8" where the weight allows it, or "a16".
        tier: instruction-set tier.
    """
    from halfbyte import _native

    if compute not in COMPUTE_MODES:
        raise ConfigError(f"compute: expected {' or '.join(COMPUTE_MODES)}, got {compute!r}")
    if compute == "a16" or why_not_a8(weight) is not None:
        return _native.a16_linear(pack_native(weight, tier))
    return _native.a8_linear(
        weight.codes.contiguous().numpy(),
        weight.scales.contiguous().numpy(),
        weight.zeros.contiguous().numpy(),
        None if weight.bias is None else weight.bias.detach().float().contiguous().numpy(),
        tier,
        next(width for width in A8_BITS if weight.bits <= width),
    )


def why_not_a8(weight: QuantizedTensor) -> str | None:
    """What keeps a weight from being multiplied by 8-bit activations; None if nothing does."""
    for name in ("group_index", "input_scale", "kept_columns"):
        if getattr(weight, name) is not None:
            return f"it has {name}"
    if weight.zeros.is_floating_point():
        return "its zero points are not integers"
    size = min(weight.group_size, weight.in_features)
    if size % 32 or weight.in_features % size:
        return f"{weight.in_features} inputs in groups of {size}: expected whole groups of a multiple of 32"
    if not torch.equal(weight.scales.half().float(), weight.scales):
        return "its scales are not exact in fp16"
    return None


def half_linear(weight: torch.Tensor, bias: torch.Tensor | None, tier: str, *, in_place: bool = False) -> Any:
    """A native `Linear` over a bf16 or fp16 weight [out, in].

    Args:
        weight: contiguous, on the CPU.
        bias: [out], or None.
        tier: instruction-set tier.
        in_place: read the weight where it is, and the caller keeps it alive; else it is copied to the huge pages that
            weights are read from faster.
    """
    from halfbyte import _native

    if weight.dtype not in _HALVES or not weight.is_contiguous() or not weight.is_cpu:
        raise UnsupportedError(f"decoder: expected a contiguous bf16 or fp16 weight on the CPU, got {weight.dtype}")
    wide = None if bias is None else bias.detach().float().contiguous().numpy()
    rows, columns = weight.shape
    return _native.half_linear(weight.data_ptr(), _HALVES[weight.dtype], rows, columns, wide, tier, in_place)
