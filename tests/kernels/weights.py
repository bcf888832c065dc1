"""Random quantized weights and the fp64 truth about them."""

import torch

from halfbyte.tensor import QuantizedTensor


def random_weight(
    rows: int,
    columns: int,
    group_size: int,
    *,
    bits: int = 4,
    float_zeros: bool = False,
    bias: bool = True,
    seed: int = 0,
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    scales = 0.005 + 0.01 * torch.rand(rows, groups, generator=generator)
    if float_zeros:
        zeros = -scales * 2 ** (bits - 1) * torch.rand(rows, groups, generator=generator)
    else:
        zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedTensor(
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        scales,
        zeros,
        bits,
        group_size,
        torch.randn(rows, generator=generator) if bias else None,
    )


def truth(weight: QuantizedTensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x · Ŵᵀ + bias in fp64, and Σ|x| · (scale · code + |offset|) + |bias|, which rounding errors are held against."""
    index = torch.arange(weight.in_features) // weight.group_size
    scales, offsets = weight.scales.double()[:, index], weight.offsets.double()[:, index]
    bias = torch.zeros(weight.out_features) if weight.bias is None else weight.bias
    codes, wide = weight.codes.double(), x.double()
    y = wide @ (scales * codes + offsets).T + bias.double()
    return y, wide.abs() @ (scales * codes + offsets.abs()).T + bias.double().abs()
