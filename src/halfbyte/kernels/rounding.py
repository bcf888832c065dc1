"""Rounding a few columns of a weight one after the other, each in view of what the earlier ones lost or moved.

The inner loop of GPTQ and of coordinate descent (`quantization/rounding.py`): the reference in torch, and the native
one, which keeps the columns of a few output rows in the first-level cache (native/cpu/rounding_kernel.hpp; 576 × 576:
three sweeps over 960 × 576 take 30 ms, by torch alone 180).
"""

from __future__ import annotations

import torch

from halfbyte.device.cpu import pick_tier

# Columns the native kernel takes at most.
MAX_COLUMNS = 64


def round_block(
    work: torch.Tensor,
    couplings: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
    *,
    revisit: bool,
) -> torch.Tensor:
    """Choose the codes of `columns` columns in order; everything is transposed, a row is a column of W.

    Args:
        work: float32 [columns, rows]. First time: what is left of the weights. Revisiting: the slope of half the error
            with respect to each weight.
        couplings: float32 [columns, columns], its upper triangle used. First time: the factor U of the inverse Gram
            matrix. Revisiting: the Gram matrix.
        scales: float32 [columns, rows], positive.
        zeros: float32 [columns, rows], integers.
        codes: float32 [columns, rows], written; when revisiting, what was chosen before.
        max_code: the largest code.
        revisit: improve on the codes there are.

    Returns:
        float32 [columns, rows]. First time: what each column lost, relative to its pivot U[i, i]. Revisiting: by how
        much each weight moved.
    """
    matrices = (work, scales, zeros, codes)
    native = (
        len(work) <= MAX_COLUMNS
        and all(matrix.is_cpu and matrix.dtype == torch.float32 and matrix.is_contiguous() for matrix in matrices)
        and couplings.dtype == torch.float32
    )
    chosen = _round_natively if native else round_by_torch
    return chosen(work, couplings, scales, zeros, codes, max_code, revisit)


def round_by_torch(
    work: torch.Tensor,
    couplings: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
    revisit: bool,
) -> torch.Tensor:
    """The reference, on any device; arguments as for `round_block`."""
    work = work.clone()
    moved = torch.empty_like(work)
    for i, row in enumerate(work):
        pivot = couplings[i, i]
        before = (codes[i] - zeros[i]) * scales[i]
        target = before - row / pivot if revisit else row
        codes[i] = (target / scales[i]).round_().add_(zeros[i]).clamp_(0, max_code)
        value = (codes[i] - zeros[i]) * scales[i]
        moved[i] = value - before if revisit else (row - value) / pivot
        work[i + 1 :].addr_(couplings[i, i + 1 :], moved[i], alpha=1 if revisit else -1)
    return moved


def _round_natively(
    work: torch.Tensor,
    couplings: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
    revisit: bool,
) -> torch.Tensor:
    from halfbyte import _native

    moved = torch.empty_like(work)
    pivots = couplings.diagonal().reciprocal()
    signed = (couplings if revisit else -couplings).contiguous()
    columns, rows = work.shape
    _native.round_block(
        work.data_ptr(),
        signed.data_ptr(),
        pivots.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        codes.data_ptr(),
        moved.data_ptr(),
        rows,
        rows,
        columns,
        max_code,
        revisit,
        pick_tier(),
    )
    return moved
