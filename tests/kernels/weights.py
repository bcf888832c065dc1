"""Random quantized weights and the fp64 truth about them."""

from typing import Any

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
    kept: int = 0,
    kept_dtype: torch.dtype = torch.bfloat16,
    group_index: bool = False,
    input_scale: bool = False,
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    scales = (0.005 + 0.01 * torch.rand(rows, groups, generator=generator)) * 2.0 ** (4 - bits)
    if float_zeros:
        zeros = -scales * 2 ** (bits - 1) * torch.rand(rows, groups, generator=generator)
    else:
        zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    fields: dict[str, Any] = {}
    if kept:
        fields["kept_columns"] = torch.randperm(columns, generator=generator)[:kept].sort().values.int()
        fields["kept_weight"] = (0.1 * torch.randn(rows, kept, generator=generator)).to(kept_dtype)
    if group_index:
        index = torch.arange(columns, dtype=torch.int32) // group_size
        fields["group_index"] = index[torch.randperm(columns, generator=generator)]
    if input_scale:
        fields["input_scale"] = torch.exp(torch.randn(columns, generator=generator))
    return QuantizedTensor(
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        scales,
        zeros,
        bits,
        group_size,
        torch.randn(rows, generator=generator) if bias else None,
        **fields,
    )


def truth(weight: QuantizedTensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x · Ŵᵀ + bias in fp64, and Σ|x| · (scale · code + |offset|) + |bias|, which rounding errors are held against."""
    index = torch.arange(weight.in_features) // weight.group_size if weight.group_index is None else weight.group_index
    scales, offsets = weight.scales.double()[:, index], weight.offsets.double()[:, index]
    bias = torch.zeros(weight.out_features) if weight.bias is None else weight.bias
    codes, wide = weight.codes.double(), x.double()
    matrix, size = scales * codes + offsets, scales * codes + offsets.abs()
    if weight.kept_columns is not None and weight.kept_weight is not None:
        matrix[:, weight.kept_columns.long()] = weight.kept_weight.double()
        size[:, weight.kept_columns.long()] = weight.kept_weight.double().abs()
    if weight.input_scale is not None:
        wide = wide * weight.input_scale.double()
    return wide @ matrix.T + bias.double(), wide.abs() @ size.T + bias.double().abs()
