from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.quantization.grid import MIN_SCALE, Grid


def weights(seed: int, shift: float, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 32, generator=generator) * spread + shift


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shift=st.floats(-3, 3),
    spread=st.floats(1e-3, 10),
    zero_point=st.booleans(),
    group_size=st.sampled_from([8, 16, 32, -1]),
)
def test_no_weight_lands_further_than_half_a_step_away(
    seed: int, shift: float, spread: float, zero_point: bool, group_size: int
) -> None:
    weight = weights(seed, shift, spread)
    tensor = Grid(4, group_size, zero_point).quantize(weight)
    step = tensor.scales.repeat_interleave(tensor.group_size, dim=1)
    # Half a step by rounding; the scale and the zero point are themselves rounded, which may cost the ends of the
    # range half a step more.
    assert ((tensor.dequantize() - weight).abs() <= 1.02 * step).all()
    assert int(tensor.codes.max()) <= 15


@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_a_group_on_one_side_of_zero_does_not_saturate(shift: float) -> None:
    weight = weights(0, shift, 0.5)
    tensor = Grid(4, 32, True).quantize(weight)
    assert ((tensor.dequantize() - weight).abs() <= 0.51 * tensor.scales).all()


def test_scales_are_what_fp16_stores() -> None:
    scales = Grid(4, 8, True).quantize(weights(0, 0, 1)).scales
    assert torch.equal(scales, scales.half().float())


def test_symmetric_zero_is_exact_and_every_code_is_in_use() -> None:
    weight = torch.tensor([[-8.0, 7.0, 0.0, 1.0, -1.0, 3.0, -4.0, 2.0]])
    tensor = Grid(4, 8, False).quantize(weight)
    assert torch.equal(tensor.zeros, torch.full_like(tensor.zeros, 8))
    assert torch.equal(tensor.dequantize(), weight)
    assert int(tensor.codes.min()) == 0
    assert int(tensor.codes.max()) == 15


def test_an_all_zero_group_stays_zero() -> None:
    for zero_point in (True, False):
        tensor = Grid(4, 8, zero_point).quantize(torch.zeros(2, 16))
        assert torch.equal(tensor.dequantize(), torch.zeros(2, 16))
        assert float(tensor.scales.min()) == MIN_SCALE


def test_fake_quantize_is_quantize_then_dequantize() -> None:
    weight = weights(3, 0.1, 1)
    for zero_point in (True, False):
        grid = Grid(4, 8, zero_point)
        torch.testing.assert_close(grid.fake_quantize(weight), grid.quantize(weight).dequantize(), rtol=0, atol=0)


def test_a_short_last_group_has_a_grid_of_its_own() -> None:
    weight = torch.cat([torch.linspace(-8, 7, 16).repeat(3, 1), torch.linspace(0, 0.15, 6).repeat(3, 1)], dim=1)
    tensor = Grid(4, 16, True).quantize(weight)
    assert tensor.scales.shape == (3, 2)
    torch.testing.assert_close(tensor.dequantize()[:, 16:], weight[:, 16:], rtol=0, atol=0.006)
    torch.testing.assert_close(Grid(4, 16, True).fake_quantize(weight), tensor.dequantize(), rtol=0, atol=0)
