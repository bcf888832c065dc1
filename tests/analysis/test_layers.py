"""Errors of a checkpoint against its reference, where they can be worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.analysis.layers import LayerError, layer_errors, measure_layer
from halfbyte.analysis.pair import Pair
from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CheckpointError, ConfigError, ModelNotFoundError
from halfbyte.quantization.calibration import build_calibration_set
from halfbyte.quantization.grid import Grid
from tests.conftest import TEXT, make_llama, make_tokenizer
from tests.quantization.zoo import save

# What `quantized_llama` was calibrated on, but for the length of its blocks.
TOKENS: dict[str, Any] = {"calibration": [TEXT], "progress": False}
QUICK: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 4, "max_calib_seq_len": 512, "progress": False}


@pytest.fixture(scope="module")
def rounded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, rounded to nearest with groups of 32."""
    output = tmp_path_factory.mktemp("models") / "rtn"
    halfbyte.quantize(tiny_llama, output, QuantConfig(method="rtn"), progress=False)
    return output


def by_name(layers: tuple[LayerError, ...]) -> dict[str, LayerError]:
    return {layer.name: layer for layer in layers}


def test_plain_rounding_is_measured_to_the_last_bit(tiny_llama: Path, rounded: Path) -> None:
    found = layer_errors(rounded, activations=False, progress=False)
    assert (found.model, found.reference, found.calibration) == (str(rounded), str(tiny_llama), None)
    assert len(found.layers) == 14
    checkpoint = Checkpoint.open(tiny_llama)
    for layer in found.layers:
        weight = checkpoint.read(f"{layer.name}.weight").float()
        lost = (Grid(4, 32, zero_point=True).fake_quantize(weight) - weight).double().square()
        assert layer.mse == pytest.approx(float(lost.mean()), rel=1e-6)
        assert layer.weight_error == pytest.approx(float(lost.sum() / weight.double().square().sum()), rel=1e-6)
        assert layer.output_error is None
        symmetric = (Grid(4, 32, zero_point=False).fake_quantize(weight) - weight).double().square()
        assert layer.zero_point_gain == pytest.approx(float(symmetric.sum() / lost.sum()), rel=1e-5)
        assert (layer.bits, layer.group_size) == (4, 32)


def test_nothing_is_estimated_where_the_manifest_says_that_nothing_was_scaled(rounded: Path, tmp_path: Path) -> None:
    shutil.copytree(rounded, tmp_path / "copy")
    path = tmp_path / "copy" / "halfbyte_manifest.json"
    manifest = json.loads(path.read_text())
    for linear in manifest["linears"]:
        linear["scale"] = "x^0.5" if linear["name"].endswith("q_proj") else "identity"
    path.write_text(json.dumps(manifest))
    pair = Pair.open(tmp_path / "copy")
    for matrix in pair.matrices(progress=False):
        assert torch.equal(matrix.scaling.columns, torch.ones_like(matrix.scaling.columns)), matrix.name
        assert torch.equal(matrix.scaling.rows, torch.ones_like(matrix.scaling.rows)), matrix.name


def test_what_quantize_measured_is_found_again(tiny_llama: Path, tmp_path: Path) -> None:
    """The manifest's error of each linear, from the finished files alone: exact behind norms, near between matrices.

    Rows of v and up were scaled, too, and the manifest counts them so; their errors differ by more.
    """
    halfbyte.quantize(tiny_llama, tmp_path / "awq", **QUICK)
    found = layer_errors(tmp_path / "awq", n_samples=4, **TOKENS)
    scales = {layer.name: layer.scale for layer in found.layers}
    assert any(scale not in ("identity", "none") for name, scale in scales.items() if name.endswith("down_proj"))
    for layer in found.layers:
        kind = layer.name.rpartition(".")[2]
        tolerance = {"o_proj": 0.04, "down_proj": 0.04, "v_proj": 0.4, "up_proj": 0.4}.get(kind, 1e-3)
        assert layer.recorded_stored is not None
        assert layer.output_error == pytest.approx(layer.recorded_stored, rel=tolerance), layer.name
        assert layer.output_snr_db == pytest.approx(-10 * torch.tensor(layer.output_error).log10().item(), abs=1e-4)


def test_the_error_of_a_linear_is_that_of_its_output(tiny_llama: Path, quantized_llama: Path) -> None:
    """tr(ΔW G ΔWᵀ) against the outputs for the very tokens, row by row."""
    pair = Pair.open(quantized_llama)
    tokens = pair.calibration([TEXT], 2)
    name = "model.layers.0.mlp.gate_proj"
    (matrix,) = pair.matrices(layer=name, calibration=tokens, progress=False)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama).float().eval()
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1])))
    with torch.no_grad():
        for block in tokens.blocks:
            model(block.unsqueeze(0))
    x = torch.cat(seen)
    lost, whole = (x @ matrix.delta.T).square().sum(1).mean(), (x @ matrix.reference.T).square().sum(1).mean()
    layer = layer_errors(quantized_llama, layer="0.mlp.gate_proj", n_samples=2, **TOKENS).layers[0]
    assert layer.output_mse == pytest.approx(float(lost) / 96, rel=1e-4)
    assert layer.output_error == pytest.approx(float(lost / whole), rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [QuantConfig(bits=3), QuantConfig(method="best", keep_ratio=0.05), QuantConfig(zero_point=False)],
    ids=["3-bits", "kept-columns", "symmetric"],
)
def test_halfbytes_own_layout_and_other_grids(tiny_llama: Path, tmp_path: Path, config: QuantConfig) -> None:
    halfbyte.quantize(tiny_llama, tmp_path / "out", config, **QUICK)
    found = layer_errors(tmp_path / "out", n_samples=4, **TOKENS)
    for layer in found.layers:
        assert layer.bits == config.bits
        if layer.name.endswith(("q_proj", "k_proj", "gate_proj")):
            assert layer.output_error == pytest.approx(layer.recorded_stored, rel=1e-3), layer.name


def test_three_bits_lose_more_than_four(tiny_llama: Path, rounded: Path, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(method="rtn", bits=3), progress=False)
    four, three = (layer_errors(folder, activations=False, progress=False) for folder in (rounded, tmp_path / "out"))
    for better, worse in zip(four.layers, three.layers, strict=True):
        assert worse.weight_snr_db is not None
        assert better.weight_snr_db is not None
        assert 3 < better.weight_snr_db - worse.weight_snr_db < 9


def test_mixtures_of_experts(tmp_path: Path) -> None:
    """Experts that are one tensor in the reference and parted in the checkpoint, behind a router."""
    save("qwen3_moe", tmp_path / "model", make_tokenizer)
    halfbyte.quantize(tmp_path / "model", tmp_path / "out", **QUICK)
    found = by_name(layer_errors(tmp_path / "out", n_samples=4, **TOKENS).layers)
    experts = [layer for name, layer in found.items() if ".experts." in name and name.endswith("gate_proj")]
    assert len(experts) == 8
    assert not any(name.endswith("mlp.gate") for name in found)
    for layer in experts:
        if layer.output_error is not None:  # a token reached it
            assert layer.output_error == pytest.approx(layer.recorded_stored, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "exact", "near"),
    [
        ("gemma", ("q_proj", "k_proj", "gate_proj"), ("o_proj", "down_proj")),  # norms of 1 + w
        ("gpt2", ("mlp.c_fc",), ("attn.c_proj",)),  # weights lie transposed, v is part of a larger matrix
        ("opt", ("q_proj", "k_proj"), ("out_proj", "fc2")),  # a fold through a ReLU
    ],
)
def test_other_architectures(tmp_path: Path, name: str, exact: tuple[str, ...], near: tuple[str, ...]) -> None:
    """Estimates are as good as there are weights in a row; of 64 their noise is seen where inputs hardly differ."""
    save(name, tmp_path / "model", make_tokenizer)
    halfbyte.quantize(tmp_path / "model", tmp_path / "out", **{**QUICK, "max_calib_seq_len": 128})
    pair = Pair.open(tmp_path / "out")
    tokens = build_calibration_set(
        load_tokenizer(tmp_path / "model"), [TEXT], max_calib_samples=4, max_calib_seq_len=128, seed=0
    )
    assert tokens.sha256 == pair.manifest["calibration"]["sha256"]
    found = [measure_layer(matrix) for matrix in pair.matrices(calibration=tokens, progress=False)]
    for tolerance, kinds in ((1e-3, exact), (0.2, near)):
        layers = [layer for layer in found if layer.name.endswith(kinds)]
        assert len(layers) == 2 * len(kinds)
        for layer in layers:
            assert layer.output_error == pytest.approx(layer.recorded_stored, rel=tolerance), layer.name


def test_a_checkpoint_made_by_others_is_read_without_a_manifest(
    tiny_llama: Path, quantized_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(quantized_llama, tmp_path / "foreign")
    (tmp_path / "foreign" / "halfbyte_manifest.json").unlink()
    with pytest.raises(ConfigError, match="no halfbyte_manifest.json that names the model it came from.*--reference"):
        layer_errors(tmp_path / "foreign", activations=False)
    found = layer_errors(tmp_path / "foreign", tiny_llama, activations=False, progress=False)
    known = layer_errors(quantized_llama, activations=False, progress=False)
    for ours, theirs in zip(known.layers, found.layers, strict=True):
        assert theirs.weight_error == pytest.approx(ours.weight_error, rel=0.05)
        assert (theirs.scale, theirs.recorded_stored) == (None, None)


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, quantized_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not quantized; expected a quantized checkpoint"):
        layer_errors(tiny_llama)
    with pytest.raises(ConfigError, match="is quantized; expected the 16-bit model"):
        layer_errors(quantized_llama, quantized_llama)
    with pytest.raises(ConfigError, match="n_samples: expected at least 1, got 0"):
        layer_errors(quantized_llama, n_samples=0)
    other = make_llama(tmp_path / "other", intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.down_proj: is \[64, 96\].*\[64, 128\].*--reference"):
        layer_errors(quantized_llama, other, activations=False, progress=False)
    shutil.copytree(quantized_llama, tmp_path / "moved")
    path = tmp_path / "moved" / "halfbyte_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": "no/such/folder"}))
    with pytest.raises(ModelNotFoundError, match="its manifest names no/such/folder.*--reference MODEL"):
        layer_errors(tmp_path / "moved")


def test_a_layer_is_found_by_the_end_of_its_name(quantized_llama: Path) -> None:
    pair = Pair.open(quantized_llama)
    assert pair.find("1.mlp.up_proj") == "model.layers.1.mlp.up_proj"
    assert pair.find("model.layers.1.mlp.up_proj") == "model.layers.1.mlp.up_proj"
    with pytest.raises(
        ConfigError, match=r"2 linears end so; write more of it, such as model\.layers\.0\.mlp\.up_proj"
    ):
        pair.find("up_proj")
    with pytest.raises(ConfigError, match=r"did you mean model\.layers\.1\.mlp\.up_proj\?"):
        pair.find("layers.1.mlp.upproj")
