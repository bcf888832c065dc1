"""How well one candidate grid fits each group of a weight, in view of the input it meets.

The inner loop of the range search (`quantization/clipping.py`): the reference in torch, and the native one, which finds
codes and error of a group while both stay in the first-level cache (native/cpu/range_kernel.hpp).
"""

from __future__ import annotations

import torch

from halfbyte.device.cpu import pick_tier

# Weights in a group that the native kernel takes at most.
MAX_SIZE = 256


def try_range(
    weights: torch.Tensor,
    grams: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_code: int,
    projections: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The quadratic form of a group's Gram matrix at its rounding error, or at its codes.

    Args:
        weights: float32 [groups, size, rows].
        grams: float32 [groups, size, size], symmetric.
        scales: float32 [groups, rows], positive.
        zeros: float32 [groups, rows], integers.
        max_code: the largest code.
        projections: float32 [groups, size, rows], grams @ weights; None for the error.

    Returns:
        (x G x, x G w), float32 [groups, rows] each, with codes c in [0, max_code] nearest to w / scale + zero.
        Without projections x = scale (c - zero) - w and the second is None; with them x = c - zero.
    """
    tensors = (weights, grams, scales, zeros, *(() if projections is None else (projections,)))
    native = weights.shape[1] <= MAX_SIZE and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)
    return (_try_natively if native else try_by_torch)(weights, grams, scales, zeros, max_code, projections)


def try_by_torch(
    weights: torch.Tensor,
    grams: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_code: int,
    projections: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference, on any device; arguments as for `try_range`."""
    scales, zeros = scales.unsqueeze(1), zeros.unsqueeze(1)
    x = (weights / scales).round_().add_(zeros).clamp_(0, max_code).sub_(zeros)
    if projections is None:
        x.mul_(scales).sub_(weights)
    linear = None if projections is None else (x * projections).sum(dim=1)
    return torch.bmm(grams, x).mul_(x).sum(dim=1), linear


def _try_natively(
    weights: torch.Tensor,
    grams: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    max_code: int,
    projections: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from halfbyte import _native

    weights, grams, scales, zeros = (tensor.contiguous() for tensor in (weights, grams, scales, zeros))
    projections = None if projections is None else projections.contiguous()
    quadratic = torch.empty_like(scales)
    linear = None if projections is None else torch.empty_like(scales)
    groups, size, rows = weights.shape
    _native.try_range(
        weights.data_ptr(),
        grams.data_ptr(),
        0 if projections is None else projections.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        quadratic.data_ptr(),
        0 if linear is None else linear.data_ptr(),
        groups,
        rows,
        size,
        max_code,
        pick_tier(),
    )
    return quadratic, linear
