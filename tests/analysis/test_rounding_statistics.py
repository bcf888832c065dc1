"""Which way weights were rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.analysis.pair import PairedMatrix
from halfbyte.analysis.rounding import measure_rounding, rounding_statistics
from halfbyte.analysis.scales import Scaling
from halfbyte.tensor import QuantizedTensor
from tests.conftest import TEXT


def matrix(codes: list[int], weight: list[float], scale: float = 2.0, zero: int = 8) -> PairedMatrix:
    """One row of four-bit codes on a known grid."""
    stored = QuantizedTensor(
        torch.tensor([codes], dtype=torch.uint8), torch.tensor([[scale]]), torch.tensor([[zero]], dtype=torch.uint8),
        4, len(codes),
    )  # fmt: skip
    scaling = Scaling(torch.ones(1), torch.ones(len(codes)))
    return PairedMatrix("layer", torch.tensor([weight]), stored, scaling, None, {})


def test_shares_and_bias_of_a_row_worked_out_by_hand() -> None:
    # Codes 8, 9, 10, 15, 0, 11 stand for 0, 2, 4, 14, -16, 6: errors of 0, +0.25, -0.4, -2, +0.7 and -0.7 steps.
    found = measure_rounding(matrix([8, 9, 10, 15, 0, 11], [0.0, 1.5, 4.8, 18.0, -17.4, 7.4]))
    assert found.weights == 6
    assert (found.up, found.down, found.exact) == (2 / 6, 3 / 6, 1 / 6)
    errors = torch.tensor([0.0, 0.25, -0.4, -2.0, 0.7, -0.7])
    assert found.bias == pytest.approx(float(errors.mean()), abs=1e-6)
    assert found.rms == pytest.approx(float(errors.square().mean().sqrt()), abs=1e-6)
    assert (found.clipped, found.moved) == (2 / 6, 1 / 6)


def test_a_scale_is_taken_out_before_weights_are_compared() -> None:
    plain = measure_rounding(matrix([8, 9, 10, 11], [0.4, 1.5, 4.8, 7.4]))
    scaled = matrix([8, 9, 10, 11], [0.4 * 3, 1.5 * 3 / 2, 4.8 * 3 / 4, 7.4 * 3 / 8])
    scaled.scaling.rows[:] = 3
    scaled.scaling.columns[:] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert measure_rounding(scaled).bias == pytest.approx(plain.bias, abs=1e-6)


def test_columns_kept_in_16_bit_are_left_out() -> None:
    whole = matrix([8, 9, 10, 11], [0.4, 1.5, 4.8, 7.4])
    stored = whole.stored
    kept = QuantizedTensor(
        stored.codes, stored.scales, stored.zeros, 4, 4,
        kept_columns=torch.tensor([1], dtype=torch.int32), kept_weight=torch.tensor([[1.5]], dtype=torch.float16),
    )  # fmt: skip
    found = measure_rounding(PairedMatrix("layer", whole.reference, kept, whole.scaling, None, {}))
    assert found.weights == 3
    assert found.up == 0


def test_nearest_rounding_moves_nothing_and_compensated_rounding_does(tiny_llama: Path, tmp_path: Path) -> None:
    for method in ("rtn", "gptq"):
        halfbyte.quantize(
            tiny_llama, tmp_path / method, QuantConfig(method=method), calibration=[TEXT], max_calib_samples=4,
            max_calib_seq_len=64, progress=False,
        )  # fmt: skip
    nearest, compensated = (rounding_statistics(tmp_path / method, progress=False).layers for method in ("rtn", "gptq"))
    assert len(nearest) == len(compensated) == 14
    for layer in nearest:
        assert layer.up + layer.down + layer.exact == pytest.approx(1)
        assert layer.moved == 0
        assert layer.rms < 0.31
    assert all(layer.moved > 0.05 for layer in compensated)
    assert all(layer.rms > 0.31 for layer in compensated)


def test_scaled_codes_are_seen_as_they_were_rounded(quantized_llama: Path) -> None:
    """Behind a norm the scale is exact, so that not a single weight seems moved."""
    layers = {layer.name: layer for layer in rounding_statistics(quantized_llama, progress=False).layers}
    for name, layer in layers.items():
        assert 0.4 < layer.up < 0.6
        if name.endswith(("q_proj", "k_proj", "gate_proj")):
            assert layer.moved == 0, name
            assert layer.rms < 0.36
