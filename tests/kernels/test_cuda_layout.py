"""The layout of weights for the CUDA kernel: nothing lost, nothing twice, and refused where it cannot be."""

import pytest
import torch
from weights import random_weight

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda_layout import PAIR, WHOLE_ROW, code_position, lay_out, restore
from halfbyte.tensor import QuantizedTensor

# rows, columns, group size, and the kernel's name for it: one size a tile, two, several tiles, odd ones, ragged ends.
SHAPES = [
    (64, 64, 64, WHOLE_ROW), (64, 128, 64, 0), (192, 256, 32, PAIR), (128, 576, 128, 1), (64, 576, 576, WHOLE_ROW),
    (100, 200, 32, PAIR), (33, 172, 172, WHOLE_ROW), (70, 288, 96, PAIR), (64, 640, 192, 0), (65, 1000, 256, 2),
]  # fmt: skip


def test_each_code_has_one_place() -> None:
    places = {code_position(lane, word, nibble) for lane in range(32) for word in range(4) for nibble in range(8)}
    assert places == {(row, column) for row in range(16) for column in range(64)}


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group_size", "shift"), SHAPES)
def test_restores_the_weight(rows: int, columns: int, group_size: int, shift: int, zero_point: bool) -> None:
    weight = random_weight(rows, columns, group_size)
    if not zero_point:
        weight.zeros.fill_(8)
    weight.scales.copy_(weight.scales.half().float())
    laid_out = lay_out(weight)
    assert laid_out.group_shift == shift
    assert laid_out.rows % 64 == laid_out.columns % 64 == 0
    assert bool(laid_out.zeros.numel()) is zero_point
    assert torch.equal(restore(laid_out), weight.dequantize())


def test_scales_of_any_size_keep_eleven_bits() -> None:
    weight = random_weight(64, 128, 32)
    weight.scales.mul_(torch.logspace(-20, 20, 64)[:, None])
    error = (restore(lay_out(weight)) - weight.dequantize()).abs() / weight.dequantize().abs().clamp_min(1e-30)
    assert error.max() <= 2.0**-11


def test_rows_of_zeros_stay_zero() -> None:
    weight = random_weight(64, 64, 32)
    weight.scales[3] = 0
    laid_out = lay_out(weight)
    assert (restore(laid_out)[3] == 0).all()
    assert laid_out.row_scale.isfinite().all()


def test_bytes_of_a_weight() -> None:
    laid_out = lay_out(random_weight(128, 256, 128, bias=False))
    assert laid_out.nbytes == 128 * 256 // 2 + 128 * 2 * (2 + 0.5) + 128 * 4


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (random_weight(64, 64, 64, bits=5), "at most 4 bits, got 5"),
        (random_weight(64, 64, 64, float_zeros=True), "integer zero points"),
        (random_weight(64, 96, 48), "multiple of 32, got 48"),
    ],
)
def test_refuses_what_it_cannot_hold(weight: QuantizedTensor, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        lay_out(weight)
