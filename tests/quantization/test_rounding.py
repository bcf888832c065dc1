from __future__ import annotations

import itertools

import pytest
import torch

from halfbyte.quantization.clipping import full_range
from halfbyte.quantization.gram import gram_error
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.rounding import compensate


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated, and of very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.exp(torch.randn(width, generator=generator))
    return torch.randn(tokens, width, generator=generator) @ mixing


def error(weight: torch.Tensor, codes: torch.Tensor, grid: Grid, gram: torch.Tensor) -> float:
    ranges = full_range(weight, grid)
    return float(gram_error(grid.tensor(codes, ranges.scales, ranges.zeros).dequantize() - weight, gram))


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("bits", "width", "group_size"), [(4, 96, 32), (3, 160, -1), (4, 100, 32), (2, 64, 16)])
def test_each_stage_lowers_the_error(bits: int, width: int, group_size: int, zero_point: bool) -> None:
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(1))
    x = inputs(400, width)
    gram, grid = x.T @ x / len(x), Grid(bits, group_size, zero_point)
    ranges = full_range(weight, grid)
    nearest = error(weight, grid.nearest(weight, ranges.scales, ranges.zeros), grid, gram)
    once = error(weight, compensate(weight, gram, ranges, grid, sweeps=0), grid, gram)
    descended = [error(weight, compensate(weight, gram, ranges, grid, sweeps=n), grid, gram) for n in (1, 2, 4)]
    assert once < 0.7 * nearest
    assert descended[0] < once
    assert descended[2] <= descended[1] * (1 + 1e-5) <= descended[0] * (1 + 2e-5)


def test_it_is_the_textbook_loop() -> None:
    """Column by column with an explicitly re-inverted matrix (GPTQ's equations 2 and 3), in fp64."""
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    x = inputs(300, 24)
    gram, grid = x.T @ x / len(x), Grid(4, 8, True)
    ranges = full_range(weight, grid)
    order = torch.argsort(gram.diagonal(), descending=True)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(24, dtype=torch.float64)
    rest, codes = weight.double().clone(), torch.zeros(5, 24)
    left = order.tolist()
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        j = left[0]
        scale, zero = ranges.scales[:, j // 8], ranges.zeros[:, j // 8]
        codes[:, j] = ((rest[:, j] / scale).round() + zero).clamp(0, 15)
        lost = (rest[:, j] - (codes[:, j] - zero) * scale) / inverse[0, 0]
        rest[:, left] -= lost.unsqueeze(1) * inverse[0].unsqueeze(0)
        left = left[1:]
    found = compensate(weight, gram, ranges, grid, sweeps=0)
    assert float((found == codes).float().mean()) > 0.97  # fp32 against fp64: a tie may fall the other way


def test_descent_ends_where_no_single_code_can_improve() -> None:
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    x = inputs(200, 12)
    gram, grid = x.T @ x / len(x), Grid(2, 12, True)
    ranges = full_range(weight, grid)
    codes = compensate(weight, gram, ranges, grid, sweeps=30)
    best = error(weight, codes, grid, gram)
    for row, column, code in itertools.product(range(3), range(12), range(4)):
        other = codes.clone()
        other[row, column] = code
        assert error(weight, other, grid, gram) >= best * (1 - 1e-4)


def test_inputs_that_say_nothing_leave_rounding_to_nearest() -> None:
    weight, grid = torch.randn(4, 32), Grid(4, 16, True)
    ranges = full_range(weight, grid)
    codes = compensate(weight, torch.zeros(32, 32), ranges, grid, sweeps=2)
    assert torch.equal(codes, grid.nearest(weight, ranges.scales, ranges.zeros))


def test_fewer_tokens_than_channels_are_enough() -> None:
    weight, x, grid = torch.randn(8, 64), inputs(5, 64), Grid(4, 32, True)
    gram = x.T @ x / len(x)
    codes = compensate(weight, gram, full_range(weight, grid), grid, sweeps=1)
    assert torch.isfinite(codes).all()
    assert error(weight, codes, grid, gram) < error(weight, grid.quantize(weight).codes, grid, gram)
