"""A 4-bit weight in the order in which the CUDA kernel reads it: explained in native/cuda/w4a16_layout.cuh."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.tensor import QuantizedTensor

TILE = 64
SUBTILES, SUBTILE_ROWS, LANES, WORDS, NIBBLES = 4, 16, 32, 4, 8
# A tile has one group of columns or a pair, of 32 each.
PAIR, PAIR_GROUP = -1, 32
WHOLE_ROW = 30  # so many bits to the right, the number of any tile is 0
SYMMETRIC_ZERO = 8


@dataclass(frozen=True)
class CudaWeight:
    """W [N, K], padded to multiples of 64 with zeros.

    Attributes:
        weights: int32 [N/64, K/64, 4, 32, 4], eight codes each.
        scales: int32 [N/64, groups, 32], two fp16 each, divided by `row_scale`.
        zeros: int32 [N/64, groups, 8], eight zero points each; empty if all are 8.
        row_scale: float32 [N], powers of two.
        bias: float32 [N], or None.
        group_shift: 2^group_shift tiles of 64 columns share a scale; `PAIR` where a tile has two groups of 32.
        out_features: rows before padding.
        in_features: columns before padding.
    """

    weights: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    row_scale: torch.Tensor
    bias: torch.Tensor | None
    group_shift: int
    out_features: int
    in_features: int

    @property
    def rows(self) -> int:
        """N."""
        return TILE * self.weights.shape[0]

    @property
    def columns(self) -> int:
        """K."""
        return TILE * self.weights.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self.weights, self.scales, self.zeros, self.row_scale, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


def code_position(lane: int, word: int, nibble: int) -> tuple[int, int]:
    """Row and column, within a subtile [16, 64], of the code in a nibble of a word of a lane."""
    register, upper = nibble % 4, nibble // 4
    row = lane // 4 + 8 * (register % 2)
    column = 32 * (word // 2) + 8 * (lane % 4) + 4 * (word % 2) + 2 * (register // 2) + upper
    return row, column


def lay_out(weight: QuantizedTensor) -> CudaWeight:
    """The codes, scales, zero points and bias of a weight for the kernel; its other fields are the caller's.

    A row's scales are divided by the power of two above the largest, which is exact, and kept in fp16: those that come
    from fp16, as the AWQ format's do, lose nothing, and none is out of range.

    Args:
        weight: codes of at most 4 bits, integer zero points, one group a row or a group size that is a multiple of 32,
            columns in the order of their groups.

    Raises:
        UnsupportedError: the weight is none of these.
    """
    refuse(weight)
    rows, columns = weight.codes.shape
    codes = torch.nn.functional.pad(weight.codes, (0, -columns % TILE, 0, -rows % TILE))
    strips, tiles = codes.shape[0] // TILE, codes.shape[1] // TILE
    subtiles = codes.view(strips, SUBTILES, SUBTILE_ROWS, tiles, TILE).permute(0, 3, 1, 2, 4)
    order = _order().to(codes.device)
    in_order = subtiles.reshape(strips, tiles, SUBTILES, SUBTILE_ROWS * TILE)[..., order]
    scales, zeros, group_shift = _groups(weight, tiles)
    scales = torch.nn.functional.pad(scales, (0, 0, 0, -rows % TILE))
    _, exponent = torch.frexp(scales.abs().amax(dim=1))
    row_scale = torch.ldexp(torch.ones_like(scales[:, 0]), exponent)
    symmetric = bool((zeros == SYMMETRIC_ZERO).all())
    zeros = torch.nn.functional.pad(zeros, (0, 0, 0, -rows % TILE))
    bias = None if weight.bias is None else torch.nn.functional.pad(weight.bias.float(), (0, -rows % TILE))
    return CudaWeight(
        weights=_nibbles(in_order).view(strips, tiles, SUBTILES, LANES, WORDS),
        scales=_by_lane(scales / row_scale[:, None]).to(torch.float16).contiguous().view(torch.int32).flatten(2),
        zeros=zeros.new_empty(0, dtype=torch.int32) if symmetric else _zero_words(zeros),
        row_scale=row_scale,
        bias=bias,
        group_shift=group_shift,
        out_features=rows,
        in_features=columns,
    )


def restore(weight: CudaWeight) -> torch.Tensor:
    """Ŵ as the kernel understands it: float32 [out, in], without the bias."""
    strips, tiles = weight.weights.shape[:2]
    in_order = _split(weight.weights).view(strips, tiles, SUBTILES, SUBTILE_ROWS * TILE)
    subtiles = torch.empty_like(in_order)
    subtiles[..., _order().to(subtiles.device)] = in_order
    codes = subtiles.view(strips, tiles, SUBTILES, SUBTILE_ROWS, TILE).permute(0, 2, 3, 1, 4)
    codes = codes.reshape(weight.rows, weight.columns)
    groups = weight.scales.shape[1]
    scales = weight.scales.view(torch.float16).view(strips, groups, SUBTILES, 8, 2).permute(0, 2, 4, 3, 1)
    scales = scales.reshape(weight.rows, groups).float() * weight.row_scale[:, None]
    if weight.zeros.numel():
        nibbles = _split(weight.zeros).view(strips, groups, 8, 2, SUBTILES).permute(0, 4, 3, 2, 1)
        zeros = nibbles.reshape(weight.rows, groups).float()
    else:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    size = PAIR_GROUP if weight.group_shift == PAIR else TILE << weight.group_shift
    index = torch.arange(weight.columns, device=codes.device) // size
    return ((codes.float() - zeros[:, index]) * scales[:, index])[: weight.out_features, : weight.in_features]


def refuse(weight: QuantizedTensor) -> None:
    """Raise what is wrong with a weight for this layout.

    Raises:
        UnsupportedError: it cannot be laid out.
    """
    if weight.bits > 4:
        raise UnsupportedError(f"cuda layout: expected codes of at most 4 bits, got {weight.bits}")
    if weight.zeros.is_floating_point():
        raise UnsupportedError("cuda layout: expected integer zero points, got floating minima")
    if weight.groups > 1 and weight.group_size % PAIR_GROUP:
        raise UnsupportedError(
            f"cuda layout: expected a group size that is a multiple of {PAIR_GROUP}, got {weight.group_size}"
        )


def _order() -> torch.Tensor:
    """Element of a subtile, row by row, that each lane, word and nibble holds: int64 [1024]."""
    places = [
        code_position(lane, word, nibble)
        for lane in range(LANES) for word in range(WORDS) for nibble in range(NIBBLES)
    ]  # fmt: skip
    return torch.tensor([row * TILE + column for row, column in places])


def _groups(weight: QuantizedTensor, tiles: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Scales float32 and zeros uint8 [out, groups] of groups that the kernel knows, and their `group_shift`.

    It knows 32, 64 · 2^s and whole rows; a group of any other size is cut into several that share what they have.
    """
    if weight.groups == 1:
        return weight.scales, weight.zeros, WHOLE_ROW
    size = weight.group_size & -weight.group_size  # the largest power of two in it
    repeats, columns = weight.group_size // size, tiles * TILE
    groups, used = -(-columns // size), -(-weight.in_features // size)
    parts = [part.repeat_interleave(repeats, dim=1)[:, :used] for part in (weight.scales, weight.zeros)]
    scales, zeros = (torch.nn.functional.pad(part, (0, groups - used)) for part in parts)
    zeros[:, used:] = SYMMETRIC_ZERO  # of columns that are not there
    return scales, zeros, PAIR if size == PAIR_GROUP else (size // TILE).bit_length() - 1


def _by_lane(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] → [strips, groups, subtile, g, half]: row 16·subtile + 8·half + g of the strip."""
    return values.view(-1, SUBTILES, 2, 8, values.shape[1]).permute(0, 4, 1, 3, 2)


def _zero_words(zeros: torch.Tensor) -> torch.Tensor:
    """uint8 [N, groups] → int32 [strips, groups, 8]: nibble 4·half + subtile of word g."""
    nibbles = zeros.view(-1, SUBTILES, 2, 8, zeros.shape[1]).permute(0, 4, 3, 2, 1)
    return _nibbles(nibbles.flatten(3))


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8·words], each below 16 → int32 [..., words], the first in the lowest bits."""
    return (values[..., 0::2] | values[..., 1::2] << 4).contiguous().view(torch.int32)


def _split(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_nibbles`."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
