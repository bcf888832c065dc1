"""From a folder to a checkpoint, on a tiny random Llama."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte import QuantConfig
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CalibrationError, CheckpointError, ConfigError, HalfbyteError, OutputError, UnsupportedError
from halfbyte.formats import gemm
from halfbyte.quantization.inspection import inspect_folds
from tests.conftest import TEXT, make_llama

QUICK: dict[str, Any] = {"calibration": [TEXT], "max_calib_samples": 4, "max_calib_seq_len": 64}


def test_the_checkpoint_is_autoawq_gemm(quantized_llama: Path) -> None:
    checkpoint = Checkpoint.open(quantized_llama)
    assert checkpoint.config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    names = [name for name in checkpoint.names() if name.startswith("model.layers.0.mlp.down_proj")]
    assert names == [f"model.layers.0.mlp.down_proj.{part}" for part in ("qweight", "qzeros", "scales")]
    assert checkpoint.info(names[0]).shape == (96, 8)
    assert checkpoint.info("model.embed_tokens.weight").dtype == torch.bfloat16
    assert (quantized_llama / "tokenizer.json").is_file()


def test_what_is_loaded_is_what_was_chosen(quantized_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels on the packed file give the logits of the dequantized weights in fp32."""
    monkeypatch.setattr("halfbyte.runtime.compute_dtype.has_bf16_arithmetic", lambda: False)
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = Checkpoint.open(quantized_llama)
    reference = LlamaForCausalLM(LlamaConfig.from_pretrained(quantized_llama)).float().eval()
    state = {}
    for name in checkpoint.names():
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            packed = {key: checkpoint.read(f"{stem}.{key}") for key in ("qweight", "qzeros", "scales")}
            state[f"{stem}.weight"] = gemm.unpack(packed, group_size=32).dequantize()
        elif leaf == "weight":
            state[name] = checkpoint.read(name).float()
    assert reference.load_state_dict(state, strict=False).missing_keys in ([], ["lm_head.weight"])
    reference.tie_weights()
    ids = torch.randint(320, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids.unsqueeze(0)).logits[0]
    for settings, tolerance in (({"compute": "a16", "head_bits": 16}, 1e-2), ({"backend": "native"}, 1e-2), ({}, 6e-2)):
        found = halfbyte.load(quantized_llama, **settings).logits(ids)
        assert float((found - expected).norm() / expected.norm()) < tolerance, settings


def test_folds_are_looked_for_in_the_original_alone(quantized_llama: Path) -> None:
    with pytest.raises(ConfigError, match="is quantized already; folds are looked for in the original"):
        inspect_folds(quantized_llama, progress=False)


def test_awq_is_closer_to_the_original_than_rounding(tiny_llama: Path, quantized_llama: Path, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_llama, tmp_path / "rtn", QuantConfig(method="rtn"))
    ids = torch.randint(320, (200,), generator=torch.Generator().manual_seed(1))
    original, awq, rtn = (halfbyte.load(p).logits(ids) for p in (tiny_llama, quantized_llama, tmp_path / "rtn"))
    assert (awq - original).norm() < 0.95 * (rtn - original).norm()


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(zero_point=False),
        QuantConfig(group_size=-1, clip=False, duo_scaling=False),
        QuantConfig(group_size=16, n_grid=3),
        QuantConfig(method="rtn"),
        QuantConfig(modules_to_not_convert=("self_attn.v_proj", "mlp")),
    ],
    ids=["default", "symmetric", "rows", "small-groups", "rtn", "skip"],
)
def test_every_variant_loads_and_generates(tiny_llama: Path, tmp_path: Path, config: QuantConfig) -> None:
    report = halfbyte.quantize(tiny_llama, tmp_path / "out", config, **QUICK)
    model = halfbyte.load(report.output_dir)
    assert model.quantized
    quantized = sum(count for name, count in model.kernels.items() if name != "half")
    assert quantized == len(report.linears) == (14 if not config.modules_to_not_convert else 6)
    assert torch.isfinite(model.logits([1, 2, 3])).all()
    assert isinstance(model.generate("The", max_new_tokens=3), str)


def test_the_same_seed_gives_the_same_codes_and_another_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "max_calib_samples": 2}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        halfbyte.quantize(tiny_llama, tmp_path / name, seed=seed, **settings)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_report_says_what_happened_and_is_kept_as_the_manifest(tiny_llama: Path, tmp_path: Path) -> None:
    report = halfbyte.quantize(tiny_llama, tmp_path / "out", **QUICK)
    assert report.calibration is not None
    assert report.calibration["tokens"] == 256
    assert report.config.group_size == 32
    assert not report.warnings
    assert report.block_bytes_after < 0.35 * report.block_bytes_before
    for linear in report.linears:
        assert linear.relative_error is not None
        assert linear.relative_error_rtn is not None
        assert 0 < linear.relative_error <= linear.relative_error_rtn * 1.02
    manifest = json.loads((tmp_path / "out" / "halfbyte_manifest.json").read_text())
    assert manifest["calibration"]["sha256"] == report.calibration["sha256"]
    assert QuantConfig.from_dict(manifest["config"]) == report.config
    assert len(manifest["linears"]) == 14


def test_norms_that_multiply_by_1_plus_w_are_folded(tmp_path: Path) -> None:
    """Gemma's norms have Llama's names, but another function. The experiment tells them apart."""
    from transformers import GemmaConfig, GemmaForCausalLM

    from tests.conftest import make_tokenizer

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GemmaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "gemma")
    make_tokenizer(tmp_path / "gemma")
    report = halfbyte.quantize(tmp_path / "gemma", tmp_path / "out", **QUICK)
    assert not report.warnings
    assert "none" not in {linear.scale for linear in report.linears}
    ids = torch.randint(320, (50,), generator=torch.Generator().manual_seed(1))
    original, found = halfbyte.load(tmp_path / "gemma").logits(ids), halfbyte.load(tmp_path / "out").logits(ids)
    assert float((found - original).norm() / original.norm()) < 0.4


def refusals(tiny: Path, tmp: Path) -> dict[str, tuple[dict[str, Any], type[HalfbyteError], str]]:
    taken = tmp / "taken"
    taken.mkdir()
    (taken / "diary.txt").write_text("dear")
    bare = tmp / "bare"
    bare.mkdir()
    return {
        "unknown model": ({"model": "nowhere"}, HalfbyteError, "nowhere: no such folder"),
        "no config": ({"model": bare}, HalfbyteError, "has no config.json"),
        "group size": ({"config": QuantConfig(group_size=48)}, ConfigError, "48 does not divide model.layers.0"),
        "empty text": ({"calibration": [" "]}, CalibrationError, "empty"),
        "short text": ({"calibration": ["a"]}, CalibrationError, "too little"),
        "taken": ({"output_dir": taken}, OutputError, "--overwrite"),
        "not ours": ({"output_dir": taken, "overwrite": True}, OutputError, "is no model folder"),
        "itself": ({"output_dir": tiny, "overwrite": True}, OutputError, "is the folder the model is read from"),
        "nothing left": ({"config": QuantConfig(modules_to_not_convert=("layers",))}, ConfigError, "no linear"),
        "device": ({"device": "tpu"}, ConfigError, "device 'tpu'"),
        "budget": ({"memory_budget": "much"}, ConfigError, "memory_budget 'much': expected an amount"),
        "small budget": ({"memory_budget": "1MB"}, ConfigError, "the least is"),
        "no cluster": ({"ray": "127.0.0.1:1"}, HalfbyteError, "ray"),  # told so, or that Ray is not installed
    }


CASES = (
    "unknown model", "no config", "group size", "empty text", "short text", "taken", "not ours", "itself",
    "nothing left", "device", "budget", "small budget", "no cluster",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    cases = refusals(tiny_llama, tmp_path)
    assert set(cases) == set(CASES)
    arguments, kind, message = cases[case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message) as error:
        halfbyte.quantize(**{"model": tiny_llama, "output_dir": tmp_path / "out", **QUICK, **arguments})
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    kept = "1 of 2 blocks are finished and kept; run the same command again to go on"
    with pytest.raises(CheckpointError, match=rf"tensor model.layers.1.mlp.up_proj.weight: holds NaN.*{kept}"):
        halfbyte.quantize(tmp_path / "nan", tmp_path / "out", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "nan"]


def test_a_quantized_model_is_not_quantized_again(quantized_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="quantized already"):
        halfbyte.quantize(quantized_llama, tmp_path / "out", **QUICK)


def test_what_gemm_cannot_hold_is_stored_natively_and_said_so(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "odd", intermediate_size=100, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="gate_proj: has 100 outputs"):
        halfbyte.quantize(folder, tmp_path / "out", QuantConfig(group_size=-1, format="gemm"), **QUICK)
    for config in (QuantConfig(group_size=-1), QuantConfig(group_size=48, format="native")):
        report = halfbyte.quantize(folder, tmp_path / "out", config, overwrite=True, **QUICK)
        assert report.config.format == "native"
        assert ("gate_proj: has 100 outputs" in " ".join(report.warnings)) == (config.format == "auto")
        stored = Checkpoint.open(tmp_path / "out").config["quantization_config"]
        assert stored["quant_method"] == "halfbyte"
        original, model = halfbyte.load(folder), halfbyte.load(tmp_path / "out")
        expected, found = (m.logits(list(range(5, 25))) for m in (original, model))
        assert (found - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("method", ["gptq", "best", "awq-l2"])
def test_every_method_is_closer_than_rounding(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    report = halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(method, group_size=32), **QUICK)
    for linear in report.linears:
        assert linear.relative_error is not None
        assert linear.relative_error_rtn is not None
        assert linear.relative_error < linear.relative_error_rtn
    assert halfbyte.load(report.output_dir).quantized


def test_overwrite_replaces_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(method="rtn"))
    halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(method="rtn", group_size=16), overwrite=True)
    assert Checkpoint.open(tmp_path / "out").config["quantization_config"]["group_size"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_full_at_the_first_block_is_one_line_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from halfbyte.checkpoints import journal

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.ShardWriter, "finish", no_space)
    with pytest.raises(OutputError, match="the disk is full"):
        halfbyte.quantize(tiny_llama, tmp_path / "out", QuantConfig(method="rtn"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_is_one_line_code_2_and_keeps_what_is_finished(finished: int, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 50)
    command = [sys.executable, "-m", "halfbyte", "quantize", str(tiny_llama), "-o", str(tmp_path / "out")]
    command += ["--calibration", str(text), "--max-calib-samples", "20"]
    command += ["--n-grid", "2000000" if finished == 0 else "4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    awaited = ".out.partial/run.json" if finished == 0 else ".out.partial/blocks/0.json"
    deadline = time.monotonic() + 600
    while not (tmp_path / awaited).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    # On a slow machine lines of progress come before it.
    *progress, last = stderr.splitlines()
    assert all(line.startswith("halfbyte: Quantizing") for line in progress)
    if finished:
        kept = "1 of 2 blocks are finished and kept; run the same command again to go on"
        assert last == f"halfbyte: stopped by Ctrl-C; {kept}"
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "text.txt"]
    else:
        assert last == "halfbyte: stopped by Ctrl-C; nothing unfinished was kept"
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
