"""The 16-bit head against fp64, on every tier."""

from __future__ import annotations

import pytest
import torch

from halfbyte import _native
from halfbyte.errors import UnsupportedError
from halfbyte.kernels.half_linear import NATIVE_ROWS, half_linear


@pytest.mark.parametrize("tier", _native.available_tiers())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (17, 31), (64, 64), (100, 577), (300, 1536)])
def test_every_number_of_rows_is_close_to_fp64_and_a_row_keeps_its_bits(
    tier: str, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    x = torch.randn(NATIVE_ROWS + 3, in_features, generator=generator)
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    expected = x.double() @ weight.double().T + bias.double()
    alone = half_linear(x[:1], weight, bias, tier)
    for rows in (1, 2, 3, 4, 5, 9, NATIVE_ROWS, NATIVE_ROWS + 3):
        found = half_linear(x[:rows], weight, bias, tier)
        assert ((found - expected[:rows]).abs() <= 1e-6 * size[:rows]).all()
        if rows <= NATIVE_ROWS:
            assert torch.equal(found[:1], alone)


def test_leading_dimensions_strides_and_no_rows_at_all() -> None:
    weight = torch.randn(8, 16).bfloat16()
    tier = _native.available_tiers()[0]
    x = torch.randn(16, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(half_linear(x, weight, None, tier), x @ weight.float().T)
    assert half_linear(torch.zeros(0, 16), weight, None, tier).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(1, 15), torch.zeros(8, 16).bfloat16()),
        (torch.zeros(1, 16).bfloat16(), torch.zeros(8, 16).bfloat16()),
        (torch.zeros(1, 16), torch.zeros(8, 16)),
    ],
)
def test_what_it_cannot_multiply_is_refused(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match="16-bit linear: expected fp32"):
        half_linear(x, weight, None, "portable")


@pytest.mark.parametrize("rows", [1, 5, NATIVE_ROWS + 3])
def test_a_gradient_flows_to_the_activations(rows: int) -> None:
    weight = torch.randn(8, 16).bfloat16()
    x = torch.randn(rows, 16, requires_grad=True)
    half_linear(x, weight, None, _native.available_tiers()[0]).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(rows, -1))
