from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.errors import ConfigError
from halfbyte.quantization.gram import gram_error
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.keeping import absorb, keep_columns
from halfbyte.quantization.stages import choose_codes
from tests.conftest import TEXT

GRID = Grid(4, 32, True)


def problem(width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, width, generator=generator)
    x = torch.randn(600, width, generator=generator) @ (
        torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    )
    x[:, 5] *= 20
    x[:, 70] *= 30
    return weight, x.T @ x / len(x)


def stored_error(weight: torch.Tensor, gram: torch.Tensor, config: QuantConfig) -> float:
    tensor, _ = choose_codes(weight, gram, GRID, config).tensors(slice(None), weight, GRID)
    return float(gram_error(tensor.dequantize() - weight, gram))


def test_the_channels_kept_are_those_that_rounding_hurts() -> None:
    weight, gram = problem()
    assert {5, 70} <= set(keep_columns(weight, gram, GRID, 0.05).columns.tolist())
    assert len(keep_columns(weight, gram, GRID, 1e-6).columns) == 1


@pytest.mark.parametrize("method", ["awq", "best"])
def test_more_kept_channels_mean_less_error(method: str) -> None:
    weight, gram = problem()
    errors = [
        stored_error(weight, gram, QuantConfig(method, group_size=32, keep_ratio=r)) for r in (0.0, 0.01, 0.3, 0.7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]


def test_kept_columns_are_exact_where_nothing_is_compensated() -> None:
    weight, gram = problem()
    config = QuantConfig(group_size=32, keep_ratio=0.1)
    tensor, _ = choose_codes(weight, gram, GRID, config).tensors(slice(None), weight, GRID)
    assert tensor.kept_columns is not None
    kept = tensor.kept_columns.long()
    torch.testing.assert_close(tensor.dequantize()[:, kept], weight[:, kept].half().float(), rtol=0, atol=0)


def test_absorbing_is_the_least_squares_solution() -> None:
    """No other kept weights do better for the same codes: the gradient with respect to them is zero."""
    weight, gram = problem()
    config = QuantConfig("best", group_size=32, keep_ratio=0.1)
    tensor, _ = choose_codes(weight, gram, GRID, config).tensors(slice(None), weight, GRID)
    assert tensor.kept_columns is not None
    delta = tensor.dequantize() - weight
    gradient = (delta @ gram)[:, tensor.kept_columns.long()]
    without = choose_codes(weight, gram, GRID, QuantConfig("awq", group_size=32, keep_ratio=0.1))
    plain = without.tensors(slice(None), weight, GRID)[0].dequantize() - weight
    assert gradient.norm() < 0.1 * (plain @ gram)[:, tensor.kept_columns.long()].norm()


def test_the_schur_complement_is_what_free_columns_leave_of_the_error() -> None:
    weight, gram = problem()
    kept, rest = absorb(keep_columns(weight, gram, GRID, 0.1), gram)
    delta = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    delta[:, kept.columns] = 0
    assert kept.absorbing is not None
    best = delta.clone()
    best[:, kept.columns] = -delta @ kept.absorbing.T
    assert float(gram_error(best, gram)) == pytest.approx(float(gram_error(delta, rest)), rel=1e-2)


@pytest.mark.parametrize("method", ["rtn", "best"])
def test_a_mixed_checkpoint_is_native_and_runs(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    config = QuantConfig(method, group_size=32, bits=3, keep_ratio=0.3)
    report = halfbyte.quantize(
        tiny_llama, tmp_path / "out", config, calibration=[TEXT], max_calib_samples=4, max_calib_seq_len=64
    )
    assert report.config.format == "native"
    assert "keeps channels in 16 bit" in report.warnings[0]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "halfbyte"
    mixed, original = halfbyte.load(tmp_path / "out"), halfbyte.load(tiny_llama)
    ids = original.encode(TEXT[:200])
    expected, found = original.logits(ids), mixed.logits(ids)
    coarse = halfbyte.quantize(tiny_llama, tmp_path / "coarse", QuantConfig("rtn", group_size=32, bits=2))
    worse = halfbyte.load(coarse.output_dir).logits(ids)
    assert (found - expected).norm() < 0.7 * (worse - expected).norm()


def test_a_layout_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^keep_ratio: the AWQ GEMM layout"):
        QuantConfig(keep_ratio=0.1, format="gemm")
    with pytest.raises(ConfigError, match="^keep_ratio: expected"):
        QuantConfig(keep_ratio=1.0)
