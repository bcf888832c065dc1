"""The native inner loop of the range search against the reference."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.ranges import MAX_SIZE, try_by_torch, try_range


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(
    ("groups", "size", "rows"), [(1, 1, 1), (3, 64, 40), (2, 30, 16), (1, MAX_SIZE, 97), (70, 16, 64)]
)
def test_it_measures_what_the_reference_measures(groups: int, size: int, rows: int, projected: bool) -> None:
    generator = torch.Generator().manual_seed(size * rows)
    x = torch.randn(groups, 2 * size + 5, size, generator=generator)
    grams = x.transpose(1, 2) @ x / x.shape[1]
    weights = torch.randn(groups, size, rows, generator=generator)
    scales = torch.rand(groups, rows, generator=generator) * 0.2 + 0.1  # some weights end at the ends
    zeros = torch.randint(0, 16, (groups, rows), generator=generator).float()
    projections = grams @ weights if projected else None
    expected = try_by_torch(weights, grams, scales, zeros, 15, projections)
    quadratic, linear = try_range(weights, grams, scales, zeros, 15, projections)
    torch.testing.assert_close(quadratic, expected[0], rtol=1e-4, atol=1e-5)
    if projected:
        torch.testing.assert_close(linear, expected[1], rtol=1e-4, atol=1e-3)
    else:
        assert linear is None


def test_strides_do_not_matter() -> None:
    weights = torch.randn(40, 2, 64).permute(1, 2, 0)
    grams = torch.eye(64).expand(2, 64, 64)
    scales, zeros = torch.full((2, 40), 0.3), torch.full((2, 40), 8.0)
    quadratic, _ = try_range(weights, grams, scales, zeros, 15)
    torch.testing.assert_close(quadratic, try_by_torch(weights, grams, scales, zeros, 15, None)[0])


def test_groups_too_wide_for_the_native_kernel_are_measured_all_the_same() -> None:
    weights, grams = torch.randn(1, MAX_SIZE + 1, 3), torch.eye(MAX_SIZE + 1)[None]
    quadratic, _ = try_range(weights, grams, torch.ones(1, 3), torch.full((1, 3), 8.0), 15)
    torch.testing.assert_close(quadratic, (weights.round() - weights).square().sum(dim=1))
