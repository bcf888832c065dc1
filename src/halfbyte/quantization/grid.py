"""The integer grid: where a group of weights may land.

A group of G neighbouring weights of one output row shares a scale s and a zero point z; a weight w becomes the code
q = clamp(round(w / s) + z, 0, 2^bits - 1) and stands for ŵ = s · (q - z).

Four choices differ from AutoAWQ's, each because the other way loses accuracy without saying so: the range of a group
is widened to contain 0 (else z is clamped and the far end of an all-positive group saturates); the scale is rounded to
fp16 *before* codes are chosen (the file stores fp16, so codes fit the scale that is read back); the arithmetic is
fp32; a symmetric grid uses its lowest code too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.tensor import QuantizedTensor

# The smallest scale fp16 holds without losing precision; below it a group is all but zero.
MIN_SCALE = 2.0**-14


@dataclass(frozen=True)
class Grid:
    """Bits, group size and symmetry: everything about the grid but the weights.

    Attributes:
        bits: width of a code.
        group_size: weights that share a scale, or -1 for a whole row.
        zero_point: asymmetric if true; else the zero point is 2^(bits-1) for every group.
    """

    bits: int
    group_size: int
    zero_point: bool

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def size(self, width: int) -> int:
        """Columns in a group of a row `width` wide; the last group may be shorter."""
        return width if self.group_size == -1 else self.group_size

    def split(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] as [out, groups, group_size]; a short last group gets zeros, which every range holds."""
        size = self.size(weight.shape[1])
        if missing := -weight.shape[1] % size:
            weight = torch.nn.functional.pad(weight, (0, missing))
        return weight.reshape(weight.shape[0], -1, size)

    def join(self, groups: torch.Tensor, width: int) -> torch.Tensor:
        """The inverse of `split`: [out, groups, group_size] → [out, width]."""
        return groups.reshape(groups.shape[0], -1)[:, :width]

    def diagonal_blocks(self, gram: torch.Tensor) -> torch.Tensor:
        """[in, in] → [groups, group_size, group_size], a short last group filled up with zeros."""
        size = self.size(gram.shape[0])
        if missing := -gram.shape[0] % size:
            gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
        return torch.stack([gram[i : i + size, i : i + size] for i in range(0, gram.shape[0], size)])

    def parameters(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for groups whose weights span [low, high].

        Args:
            low: float32, any shape.
            high: float32, same shape, high >= low.

        Returns:
            scales (float32, each exactly representable in fp16) and zeros (float32 holding integers), same shape.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if not self.zero_point:
            # There is one code more below zero than above it, so a group that reaches further down gets finer steps.
            half = 2 ** (self.bits - 1)
            scales = torch.maximum(-low / half, high / (half - 1)).clamp(min=MIN_SCALE).half().float()
            return scales, torch.full_like(scales, half)
        scales = ((high - low) / self.max_code).clamp(min=MIN_SCALE).half().float()
        return scales, (-low / scales).round().clamp(0, self.max_code)

    def codes(self, groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Codes as float32 [..., group_size] of `groups` [..., group_size] for scales and zeros [...]."""
        return (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, self.max_code)

    def fake_quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Ŵ, float32: `weight` float32 [out, in] after a round trip through the grid, each group's whole range."""
        groups = self.split(weight)
        scales, zeros = self.parameters(*self.range(groups))
        codes = self.codes(groups, scales, zeros)
        return self.join(codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)), weight.shape[1])

    def range(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest weight of each group [..., group_size]."""
        low, high = groups.aminmax(dim=-1)
        return low, high

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Codes, float32 [out, in], of `weight` for the scales and zeros [out, groups]."""
        return self.join(self.codes(self.split(weight), scales, zeros), weight.shape[1])

    def tensor(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> QuantizedTensor:
        """Codes [out, in] and the grid of their groups [out, groups] as one value."""
        return QuantizedTensor(
            codes.to(torch.uint8), scales, zeros.to(torch.uint8), self.bits, self.size(codes.shape[1])
        )

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Round to nearest on this grid, each group's whole range: weight [out, in], floating."""
        weight = weight.float()
        scales, zeros = self.parameters(*self.range(self.split(weight)))
        return self.tensor(self.nearest(weight, scales, zeros), scales, zeros)
