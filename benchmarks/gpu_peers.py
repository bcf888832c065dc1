"""Other packages' 4-bit linears, as peers of halfbyte's own on a GPU: of the same weight, or of one as large.

Each function makes what multiplies from a weight on a GPU, and raises what its package raises where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.formats import gemm
from halfbyte.tensor import QuantizedTensor

Linear = Callable[[torch.Tensor], torch.Tensor]


def marlin(weight: QuantizedTensor, dtype: torch.dtype) -> Linear:
    """GPTQModel's Marlin on AutoAWQ's tensors: the very codes, scales and zero points of the weight."""
    from gptqmodel.nn_modules.qlinear.marlin_awq import AwqMarlinLinear

    device = weight.codes.device
    packed = gemm.pack(weight.to("cpu"))
    module = AwqMarlinLinear(
        bits=4,
        group_size=weight.group_size,
        desc_act=False,
        sym=False,
        in_features=weight.in_features,
        out_features=weight.out_features,
        bias=False,
        register_buffers=True,
        dtype=dtype,
    )
    for key in ("qweight", "qzeros", "scales"):
        getattr(module, key).data.copy_(packed[key])
    module = module.to(device)
    module.post_init()
    return module  # type: ignore[no-any-return]


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
