"""The output head of the decoder, quantized while loading: a checkpoint keeps it in 16 bit, tied to the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.decoder_linear import half_linear, quantized_linear
from halfbyte.quantization.clipping import full_range, search_range
from halfbyte.quantization.grid import Grid
from halfbyte.tensor import QuantizedTensor

HEAD_BITS = (16, 8, 6, 4)
# The fewest bits within 0.2 % of the perplexity of 16, as measured (docs/design/decoder.md).
DEFAULT_HEAD_BITS = 8
# Inputs that share a scale.
HEAD_GROUP = 32
# At this width a group's range is searched; with more bits rounding its whole range to nearest is as good, and faster.
SEARCHED_BITS = 4
# Weights rounded in one go, so that no float copy of the head is made.
SLICE_WEIGHTS = 1 << 22


def head_linear(weight: torch.Tensor, norm: Sequence[float], bits: int, tier: str) -> Any:
    """A native `Linear` over an output head.

    Args:
        weight: [vocabulary, hidden] in bf16 or fp16; with 16 bits the caller must keep it alive.
        norm: [hidden], the weight of the norm before it.
        bits: one of `HEAD_BITS`.
        tier: instruction-set tier.

    Raises:
        UnsupportedError: groups do not divide its width.
    """
    if bits == 16:
        return half_linear(weight, None, tier, in_place=True)
    if weight.shape[1] % HEAD_GROUP:
        raise UnsupportedError(f"head_bits: groups of {HEAD_GROUP} do not divide a head of {weight.shape[1]} columns")
    return quantized_linear(quantize_head(weight, norm, bits), "a8", tier)


def quantize_head(weight: torch.Tensor, norm: Sequence[float], bits: int) -> QuantizedTensor:
    """Round a head to codes, asymmetric, in groups of `HEAD_GROUP`.

    With `SEARCHED_BITS` the range of a group is searched for the inputs that the norm makes of independent ones of
    equal size, whose Gram matrix is diag(norm²): no text is needed.

    Args:
        weight: [vocabulary, hidden], floating.
        norm: [hidden], the weight of the norm before it.
        bits: 8, 6 or 4.
    """
    grid = Grid(bits, HEAD_GROUP, zero_point=True)
    gram = torch.diag(torch.tensor(norm).square())
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // HEAD_GROUP)
    zeros = torch.empty(rows, columns // HEAD_GROUP, dtype=torch.uint8)
    for start in range(0, rows, step := max(1, SLICE_WEIGHTS // columns)):
        part = slice(start, start + step)
        floats = weight[part].float()
        ranges = search_range(floats, gram, grid) if bits == SEARCHED_BITS else full_range(floats, grid)
        codes[part] = grid.nearest(floats, ranges.scales, ranges.zeros).to(torch.uint8)
        scales[part], zeros[part] = ranges.scales, ranges.zeros.to(torch.uint8)
    return QuantizedTensor(codes, scales, zeros, bits, HEAD_GROUP)
