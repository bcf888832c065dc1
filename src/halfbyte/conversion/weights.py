"""One weight on its way to another layout: whether it comes back as it was, and what `requantize` may change."""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.conversion.result import REQUANTIZED, UNCHANGED, LinearConversion
from halfbyte.errors import UnsupportedError
from halfbyte.formats.checks import BITS, inexact
from halfbyte.quantization.grid import Grid
from halfbyte.tensor import QuantizedTensor


def rounded(tensor: QuantizedTensor) -> QuantizedTensor | None:
    """The weight on a grid of fp16 scales and integer zero points, each code the nearest one there.

    Scales are rounded where zero points are integers already; beside floating minima each group of a 4-bit weight gets
    the grid that rounding to nearest would give its whole range.

    Returns:
        None where nothing would change, or where fp16 has no such numbers.
    """
    if tensor.zeros.is_floating_point():
        plain = tensor.group_index is None and tensor.input_scale is None and tensor.kept_columns is None
        if tensor.bits != BITS or not plain:
            return None
        found = Grid(BITS, tensor.group_size, zero_point=True).quantize(tensor.dequantize())
        return replace(found, bias=tensor.bias) if torch.isfinite(found.scales).all() else None
    if inexact(tensor.scales) is None:
        return None
    scales = tensor.scales.half().float()
    if not torch.isfinite(scales).all() or ((scales == 0) & (tensor.scales != 0)).any():
        return None
    groups = tensor.column_groups
    zeros = tensor.zeros.float()[:, groups]
    # The old code again wherever the ratio of the scales is near 1, as it is but for subnormal ones.
    ratio = torch.where(scales == 0, 1.0, tensor.scales / scales)[:, groups]
    codes = ((tensor.codes.float() - zeros) * ratio + zeros).round().clamp(0, (1 << tensor.bits) - 1)
    return replace(tensor, codes=codes.to(torch.uint8), scales=scales)


def compare(name: str, before: QuantizedTensor, after: QuantizedTensor) -> LinearConversion:
    """What became of a weight, as both layouts are read.

    Args:
        name: of the linear.
        before: from the old one.
        after: from the new one.
    """
    outcome, error = UNCHANGED, 0.0
    if not same_weight(before, after):
        weight = before.dequantize()
        error = float((after.dequantize() - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))
        outcome = REQUANTIZED
    bias = None
    if before.bias is not None and after.bias is not None:
        bias = float((after.bias.double() - before.bias.double()).abs().max())
    return LinearConversion(name, outcome, error, bias)


def same_weight(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether codes, scales, zero points, the order of groups and what stands beside them are equal."""
    if (a.bits, a.codes.shape) != (b.bits, b.codes.shape) or not torch.equal(a.column_groups, b.column_groups):
        return False
    for part in ("scales", "zeros", "input_scale", "kept_columns", "kept_weight"):
        one, other = getattr(a, part), getattr(b, part)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    coded = torch.ones(a.in_features, dtype=torch.bool)
    if a.kept_columns is not None:
        coded[a.kept_columns.long()] = False  # codes of kept columns mean nothing
    return torch.equal(a.codes[:, coded], b.codes[:, coded])


def check_outcome(found: LinearConversion, requantized: bool, target: str) -> LinearConversion:
    """Refuse a weight that the new layout gives back otherwise although nothing was to change.

    Args:
        found: from `compare`.
        requantized: whether it was meant to change.
        target: the format, for the message.

    Raises:
        UnsupportedError: it is another one.
    """
    if found.outcome != UNCHANGED and not requantized:
        raise UnsupportedError(
            f"{found.name}: comes back from the {target} layout as another weight (relative error "
            f"{found.relative_error:.1e}); this is a bug of halfbyte, nothing was written"
        )
    return found
