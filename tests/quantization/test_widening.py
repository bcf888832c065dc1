"""MLPs widened for tensor parallelism: the same codes, the same function, shapes that can be split."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.analysis.pair import Pair
from halfbyte.conversion.verify import verify
from halfbyte.errors import ConfigError, HalfbyteError, UnsupportedError
from halfbyte.quantization.widening import Widening, narrowed
from halfbyte.tensor import QuantizedTensor
from tests.conftest import TEXT, make_llama, make_tokenizer
from tests.quantization.zoo import save

DOWN, GATE = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLPs 200 wide, which no group size divides, with biases."""
    folder = tmp_path_factory.mktemp("widening") / "model"
    return make_llama(
        folder, hidden_size=256, intermediate_size=200, num_attention_heads=8, num_key_value_heads=4, mlp_bias=True
    )


@pytest.fixture(scope="module")
def pair(ragged: Path) -> tuple[Path, Path]:
    """Quantized as it is, in the layout that holds ragged groups, and widened."""
    common: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 4, "max_calib_seq_len": 64, "progress": False}
    config = QuantConfig(group_size=64, format="native")
    halfbyte.quantize(ragged, ragged.parent / "plain", config, **common)
    halfbyte.quantize(ragged, ragged.parent / "wide", QuantConfig(group_size=64, tp_align=2), **common)
    return ragged.parent / "plain", ragged.parent / "wide"


def logits(folder: Path) -> torch.Tensor:
    return halfbyte.load(folder, backend="torch").logits(range(24))


def linear(folder: Path, name: str) -> QuantizedTensor:
    from halfbyte.checkpoints.reader import Checkpoint
    from halfbyte.conversion.quantized import QuantizedCheckpoint
    from halfbyte.formats.layouts import read_layout

    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    assert layout is not None
    return QuantizedCheckpoint(checkpoint, layout).read(name)


@pytest.mark.parametrize("name", [DOWN, GATE, "model.layers.0.self_attn.o_proj"])
def test_codes_are_those_of_the_model_as_it_was(pair: tuple[Path, Path], name: str) -> None:
    before, after = (linear(folder, name) for folder in pair)
    cut = narrowed(after, before.out_features, before.in_features)
    assert torch.equal(cut.codes, before.codes)
    assert torch.equal(cut.scales, before.scales)
    assert torch.equal(cut.zeros, before.zeros)
    rest = after.dequantize()
    rest[: before.out_features, : before.in_features] = 0
    assert not rest.any()


def test_the_function_is_the_same_and_the_layout_gemm(pair: tuple[Path, Path]) -> None:
    before, after = map(logits, pair)
    assert float((after - before).norm() / before.norm()) < 1e-2  # bf16: sums in another order
    config = json.loads((pair[1] / "config.json").read_text())
    assert (config["intermediate_size"], config["quantization_config"]["version"]) == (256, "gemm")


def test_two_gpus_take_it_and_the_rest_of_the_checks_too(pair: tuple[Path, Path]) -> None:
    found = verify(pair[1], engines=["vllm"], tensor_parallel=2, progress=False)
    assert found.problems == []
    assert verify(pair[1], engines=["vllm"], tensor_parallel=8, progress=False).problems != []


def test_weights_are_compared_with_those_of_the_narrow_model(pair: tuple[Path, Path]) -> None:
    wide, plain = (Pair.open(str(folder), progress=False) for folder in reversed(pair))
    found = [{matrix.name: matrix.delta for matrix in one.matrices(progress=False)} for one in (wide, plain)]
    assert len(found[0]) == 14
    for name, delta in found[0].items():
        assert torch.equal(delta, found[1][name])


def test_linears_in_16_bit_are_widened_too(ragged: Path, tmp_path: Path) -> None:
    config = QuantConfig(method="rtn", group_size=64, tp_align=2, modules_to_not_convert=("0.mlp.down_proj",))
    halfbyte.quantize(ragged, tmp_path / "out", config, progress=False)
    assert verify(tmp_path / "out", progress=False).problems == []
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize("name", ["qwen2_moe", "gemma", "llava", "qwen3"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model", make_tokenizer)
    config = QuantConfig(method="rtn", group_size=32, tp_align=2)
    halfbyte.quantize(folder, tmp_path / "plain", QuantConfig(method="rtn", group_size=32), progress=False)
    halfbyte.quantize(folder, tmp_path / "wide", config, progress=False)
    before, after = logits(tmp_path / "plain"), logits(tmp_path / "wide")
    assert float((after - before).norm() / before.norm()) < 1e-2  # bf16: sums in another order


@pytest.mark.parametrize("name", ["phi3", "opt", "gpt_oss"])
def test_mlps_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model", make_tokenizer)
    with pytest.raises(UnsupportedError, match="tp_align 2: widens MLPs of gate_proj, up_proj and down_proj"):
        halfbyte.quantize(folder, tmp_path / "out", QuantConfig(method="rtn", tp_align=2), progress=False)
    assert not (tmp_path / "out").exists()


def test_attention_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", hidden_size=96, num_attention_heads=6, num_key_value_heads=6)
    for config, message in (
        (QuantConfig(method="rtn", tp_align=4), "6 attention heads cannot be split over 4 GPUs, and heads cannot be"),
        (
            QuantConfig(method="rtn", tp_align=2, group_size=32),
            "group_size 32 does not divide model.layers.0.self_attn.o_proj on each of 2 GPUs with 48 input channels",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            halfbyte.quantize(folder, tmp_path / "out", config, progress=False)


@pytest.mark.parametrize(("width", "gpus", "size", "expected"), [
    (11008, 4, 128, 11264), (11008, 1, 128, 11008), (29568, 8, 128, 29696), (200, 1, 64, 256), (96, 2, 96, 768),
    (200, 2, "auto", 256), (200, 2, -1, 256),
])  # fmt: skip
def test_widths(width: int, gpus: int, size: Any, expected: int) -> None:
    widening = Widening.of(QuantConfig(tp_align=gpus, group_size=size))
    assert widening is not None
    assert widening.width(width) == expected


def test_whole_rows_stay_one_group(ragged: Path, tmp_path: Path) -> None:
    halfbyte.quantize(ragged, tmp_path / "o", QuantConfig(method="rtn", group_size=-1, tp_align=2), progress=False)
    assert linear(tmp_path / "o", DOWN).scales.shape == (256, 1)
    assert torch.isfinite(logits(tmp_path / "o")).all()


def test_the_command_line(ragged: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "halfbyte",
        "quantize",
        str(ragged),
        "-o",
        str(tmp_path / "out"),
        "--method",
        "rtn",
    ]
    result = subprocess.run([*command, "--tp-align", "2"], check=True, capture_output=True, text=True)
    assert "MLPs are widened with zeros from 200 to 256 channels, so that 2 GPUs can share them" in result.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 256
    with pytest.raises(HalfbyteError, match="tp_align: expected a number of GPUs"):
        QuantConfig(tp_align=-1)
