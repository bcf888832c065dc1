"""y = x · Wᵀ + bias with W in bf16 or fp16 and x, y in fp32, on the CPU: the output head of a quantized model.

A few rows are multiplied natively, the weight read in place (native/cpu/half_kernel.hpp: bound by reading it). Many
rows are bound by arithmetic, which torch does well once the weight is widened; so are those a gradient is wanted of.
"""

from __future__ import annotations

import torch

from halfbyte.errors import UnsupportedError

# Widening a whole head for torch takes as long as about this many rows do natively.
NATIVE_ROWS = 64

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def half_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tier: str) -> torch.Tensor:
    """The product, in fp32 throughout.

    Args:
        x: float32 [..., in], on the CPU.
        weight: [out, in] bf16 or fp16, contiguous, on the CPU.
        bias: [out] or None.
        tier: instruction-set tier of the native core.

    Returns:
        float32 [..., out].

    Raises:
        UnsupportedError: another dtype, device or shape.
    """
    from halfbyte import _native

    out_features, in_features = weight.shape
    if x.dtype != torch.float32 or x.shape[-1] != in_features or weight.dtype not in _DTYPES or not weight.is_cpu:
        raise UnsupportedError(
            f"16-bit linear: expected fp32 [..., {in_features}] and a bf16 or fp16 weight on the CPU, "
            f"got {x.dtype} {list(x.shape)} and {weight.dtype} on {weight.device}"
        )
    rows = x.numel() // in_features
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    tracked = torch.is_grad_enabled() and x.requires_grad
    if tracked or rows == 0 or rows > NATIVE_ROWS or not weight.is_contiguous():
        return torch.nn.functional.linear(x, weight.float(), wide_bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    flat = x.contiguous()
    _native.half_multiply(
        weight.data_ptr(),
        _DTYPES[weight.dtype],
        out_features,
        in_features,
        0 if wide_bias is None else wide_bias.data_ptr(),
        flat.data_ptr(),
        y.data_ptr(),
        rows,
        tier,
    )
    return y
