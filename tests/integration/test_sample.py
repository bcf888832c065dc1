"""The sample model through the public API: a real model, in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig

pytestmark = pytest.mark.sample

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def rounded(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> halfbyte.QuantizationReport:
    output = tmp_path_factory.mktemp("sample") / "rtn"
    return halfbyte.quantize(sample_folder, output, QuantConfig(method="rtn"))


def test_group_size_auto_is_64_for_its_widths(rounded: halfbyte.QuantizationReport) -> None:
    assert rounded.config.group_size == 64
    assert len(rounded.linears) == 210


def test_blocks_shrink_to_27_percent(rounded: halfbyte.QuantizationReport) -> None:
    assert rounded.block_bytes_after <= 0.27 * rounded.block_bytes_before
    assert rounded.total_bytes_before == 269_030_016
    assert rounded.bits_per_weight < 4.33


def test_it_still_knows_the_answer(rounded: halfbyte.QuantizationReport) -> None:
    assert "Paris" in halfbyte.load(rounded.output_dir).generate(QUESTION, max_new_tokens=16)


def test_every_tier_gives_the_logits_of_the_dequantized_weights(
    rounded: halfbyte.QuantizationReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte import _native

    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    ids = torch.randint(49152, (48,), generator=torch.Generator().manual_seed(0))
    expected = halfbyte.load(rounded.output_dir, backend="torch").logits(ids)
    for tier in _native.available_tiers():
        monkeypatch.setenv("HALFBYTE_ISA", tier)
        for settings, tolerance in (
            ({"backend": "native"}, 1e-2),
            ({"compute": "a16", "head_bits": 16}, 1e-2),
            # The last bit of a norm decides which way an activation is rounded to 8 bits: tiers gave 1.9e-2 to 2.1e-2.
            ({}, 4e-2),
        ):
            found = halfbyte.load(rounded.output_dir, **settings).logits(ids)
            assert float((found - expected).norm() / expected.norm()) < tolerance, (tier, settings)
