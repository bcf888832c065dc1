"""RMSNorm in one native call (Zhang and Sennrich 2019, eq. 4): y = x / √(mean(x²) + ε) · w, in fp32 on the CPU.

torch's is six operations; of a single row their dispatch costs ten times the arithmetic. Sums are those of the decoder
(native/cpu/math_kernel.hpp).
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, tier: str) -> torch.Tensor:
    """The norm of each row. No gradient flows through it.

    Args:
        x: float32 [..., channels], on the CPU.
        weight: float32 [channels], contiguous, on the CPU.
        epsilon: added to the mean square.
        tier: instruction-set tier of the native core.

    Returns:
        float32 [..., channels], contiguous.
    """
    from halfbyte import _native

    flat = x.contiguous()
    y = torch.empty_like(flat)
    _native.rms_norm(flat.data_ptr(), weight.data_ptr(), y.data_ptr(), flat.numel(), weight.numel(), epsilon, tier)
    return y
