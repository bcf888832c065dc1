"""Which kernel runs which linears of a checkpoint: what `load` then really picks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli import app
from halfbyte.errors import ConfigError
from halfbyte.kernels.w4a16 import KERNELS
from halfbyte.runtime.kernel_choice import kernel_choices
from tests.conftest import TEXT, make_llama


def test_every_kind_of_linear_is_there_once(quantized_llama: Path) -> None:
    choices = kernel_choices(quantized_llama, "cpu")
    shapes = {(s.out_features, s.in_features, s.bits, s.group_size): (s.count, s.names) for s in choices.shapes}
    assert shapes == {
        (64, 64, 4, 32): (4, ("o_proj", "q_proj")),
        (32, 64, 4, 32): (4, ("k_proj", "v_proj")),
        (96, 64, 4, 32): (4, ("gate_proj", "up_proj")),
        (64, 96, 4, 32): (2, ("down_proj",)),
    }
    assert choices.not_fused is None


@pytest.mark.parametrize("bits", [3, 8])
def test_the_kernel_that_is_picked_is_the_one_that_runs(tiny_llama: Path, tmp_path: Path, bits: int) -> None:
    config = halfbyte.QuantConfig(method="rtn", bits=bits)
    halfbyte.quantize(tiny_llama, tmp_path / "q", config, calibration=[TEXT], max_calib_samples=2, max_calib_seq_len=32)
    picked: Counter[str] = Counter()
    for shape in kernel_choices(tmp_path / "q", "cpu").shapes:
        assert shape.bits == bits
        assert len({verdict.kernel.name for verdict in shape.verdicts}) == len(KERNELS)
        picked.update({verdict.kernel.name: shape.count for verdict in shape.verdicts if verdict.picked})
    assert picked == halfbyte.load(tmp_path / "q", backend="transformers", device="cpu").kernels


def test_it_says_where_the_decoder_is_not_used(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "odd", num_attention_heads=8, num_key_value_heads=8)
    config = halfbyte.QuantConfig(method="rtn")
    halfbyte.quantize(model, tmp_path / "q", config, calibration=[TEXT], max_calib_samples=2, max_calib_seq_len=32)
    assert kernel_choices(tmp_path / "q", "cpu").not_fused == "heads of 8 numbers; the decoder takes multiples of 16"


def test_what_is_not_quantized_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="is not quantized, so no linear needs a kernel"):
        kernel_choices(tiny_llama)


def test_the_verb_shows_the_table_and_the_document(quantized_llama: Path) -> None:
    shown = CliRunner().invoke(app, ["backends", str(quantized_llama), "--device", "cpu"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    (row,) = [line.split() for line in lines if "down_proj" in line]
    assert row[:6] == ["down_proj", "2", "64", "×", "96", "4"]
    picked = [line for line in lines if " native " in line and " yes " in line]
    assert len(picked) == 4
    document = json.loads(CliRunner().invoke(app, ["backends", str(quantized_llama), "--json"]).stdout)
    assert sum(shape["count"] for shape in document["shapes"]) == 14
    assert {"cpu", "tier", "threads", "model", "device", "not_fused"} < set(document)


def test_without_a_model_it_is_about_one_shape() -> None:
    document = json.loads(CliRunner().invoke(app, ["backends", "--json", "--device", "cpu"]).stdout)
    assert [kernel["kernel"] for kernel in document["kernels"] if kernel["picked"]] == ["native"]
    assert "shapes" not in document
