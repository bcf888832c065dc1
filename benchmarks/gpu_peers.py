"""Other packages' 4-bit linears, as peers of halfbyte's own on a GPU: of the same weight, or of one as large.

Each function makes what multiplies from a weight on a GPU, and raises what its package raises where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.kernels.w4a16 import prepare
from halfbyte.tensor import QuantizedTensor

Linear = Callable[[torch.Tensor], torch.Tensor]


def marlin(weight: QuantizedTensor, dtype: torch.dtype) -> Linear:
    """GPTQModel's Marlin: the very codes, scales and zero points of the weight. It takes either dtype."""
    del dtype
    return prepare(weight, backend="marlin", device=weight.codes.device)[1]


def nf4(weight: QuantizedTensor, dtype: torch.dtype) -> Linear:
    """bitsandbytes' NF4 of the weight the codes stand for: as many bits, on a grid of its own."""
    import bitsandbytes

    values = weight.dequantize().to(dtype)
    linear = bitsandbytes.nn.Linear4bit(
        weight.in_features, weight.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    linear.weight = bitsandbytes.nn.Params4bit(values.cpu(), requires_grad=False, quant_type="nf4")
    return linear.to(values.device)  # type: ignore[no-any-return]


PEERS = {"marlin": marlin, "nf4": nf4}
