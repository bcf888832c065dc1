"""A checkpoint as a GGUF file, read back by the package that llama.cpp's authors publish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import halfbyte
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.cli import app
from halfbyte.conversion.gguf_file import export_gguf
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.errors import CheckpointError, OutputError, UnsupportedError
from halfbyte.formats.layouts import read_layout
from halfbyte.quantization.config import QuantConfig
from tests.conftest import make_llama, make_tokenizer

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}  # fmt: skip
HEAD_DIM = 16


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields, and tensors by name."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def with_halves(rows: torch.Tensor) -> torch.Tensor:
    """Rows of q or k as transformers has them: row 2i + j of a head in the file is row i + j · d/2."""
    order = [2 * (row % (HEAD_DIM // 2)) + row // (HEAD_DIM // 2) for row in range(HEAD_DIM)]
    return torch.cat([head[order] for head in rows.split(HEAD_DIM)])


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Block and kind as GGUF has them → Ŵ."""
    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    assert layout is not None
    quantized = QuantizedCheckpoint(checkpoint, layout)
    found = {}
    for name in quantized.linears:
        _, _, block, kind = name.split(".", 3)
        found[f"blk.{block}.{NAMES[kind]}.weight"] = quantized.read(name).dequantize()
    return found


def test_every_weight_is_what_it_was(quantized_llama: Path, tmp_path: Path) -> None:
    export = export_gguf(quantized_llama, tmp_path / "model.gguf", progress=False)
    _, tensors = read(tmp_path / "model.gguf")
    expected = dequantized(quantized_llama)
    assert export.blocks == {"Q4_1": 14}
    assert len(expected) == 14
    worst = 0.0
    for name, weight in expected.items():
        found = values(tensors[name])
        found = with_halves(found) if "attn_q" in name or "attn_k" in name else found
        assert tensors[name].tensor_type.name == "Q4_1"
        worst = max(worst, float((found - weight).norm() / weight.norm()))
    assert worst == pytest.approx(export.largest_error, rel=1e-3)
    assert 0 < worst < 2e-3
    checkpoint = Checkpoint.open(quantized_llama)
    assert torch.equal(values(tensors["token_embd.weight"]), checkpoint.read("model.embed_tokens.weight").float())
    norm = checkpoint.read("model.layers.1.post_attention_layernorm.weight").float()
    assert torch.equal(values(tensors["blk.1.ffn_norm.weight"]), norm)
    assert "output.weight" not in tensors
    assert len(tensors) == 14 + 2 * 2 + 2


def test_symmetric_weights_are_exact(tiny_llama: Path, tmp_path: Path) -> None:
    config = QuantConfig(method="rtn", group_size=32, zero_point=False)
    halfbyte.quantize(tiny_llama, tmp_path / "symmetric", config, progress=False)
    export = export_gguf(tmp_path / "symmetric", tmp_path / "model.gguf", progress=False)
    assert (export.blocks, export.largest_error) == ({"Q4_0": 14}, 0.0)
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.file_type"] == 2
    for name, weight in dequantized(tmp_path / "symmetric").items():
        found = values(tensors[name])
        assert torch.equal(with_halves(found) if "attn_q" in name or "attn_k" in name else found, weight)


def test_the_model_and_its_tokenizer_are_described(quantized_llama: Path, tmp_path: Path) -> None:
    export_gguf(quantized_llama, tmp_path / "model.gguf", progress=False)
    fields, _ = read(tmp_path / "model.gguf")
    config = json.loads((quantized_llama / "config.json").read_text())
    assert fields["general.architecture"] == "llama"
    for name, value in (
        ("block_count", 2), ("embedding_length", 64), ("feed_forward_length", 96), ("attention.head_count", 4),
        ("attention.head_count_kv", 2), ("context_length", 512), ("rope.dimension_count", HEAD_DIM),
        ("attention.layer_norm_rms_epsilon", pytest.approx(config["rms_norm_eps"])), ("rope.freq_base", 10000.0),
    ):  # fmt: skip
        assert fields[f"llama.{name}"] == value, name
    tokenizer = halfbyte.load(quantized_llama).tokenizer
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(320))
    assert fields["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    merges = json.loads((quantized_llama / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_biases_and_an_untied_head_come_along(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=330, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.normal_()
    model.to(torch.float16).save_pretrained(tmp_path / "qwen")
    make_tokenizer(tmp_path / "qwen")
    halfbyte.quantize(tmp_path / "qwen", tmp_path / "small", QuantConfig(method="rtn", group_size=32), progress=False)
    export = export_gguf(tmp_path / "small", tmp_path / "model.gguf", progress=False)
    fields, tensors = read(tmp_path / "model.gguf")
    assert export.architecture == fields["general.architecture"] == "qwen2"
    # Rows of this architecture stay where they are.
    bias = model.model.layers[0].self_attn.q_proj.bias.half().float()
    assert torch.equal(values(tensors["blk.0.attn_q.bias"]), bias)
    assert tensors["output.weight"].tensor_type.name == "F16"
    # The embedding has ten rows more than the tokenizer has words.
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD329]"
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert np.prod(tensors["token_embd.weight"].shape) == 330 * 64


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    tiny_llama: Path, quantized_llama: Path, tmp_path: Path
) -> None:
    def changed(name: str, **entries: Any) -> Path:
        shutil.copytree(quantized_llama, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **entries}))
        return tmp_path / name

    scaled = changed("scaled", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0})
    half = changed("half", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    tokenized = changed("tokenized")
    document = json.loads((tokenized / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Whitespace"}
    (tokenized / "tokenizer.json").write_text(json.dumps(document))
    fine = tmp_path / "fine"
    make_llama(tmp_path / "source")
    halfbyte.quantize(tmp_path / "source", fine, QuantConfig(method="rtn", group_size=16), progress=False)
    output = tmp_path / "out" / "model.gguf"
    output.parent.mkdir()
    for folder, message in (
        (tiny_llama, "is not quantized"),
        (changed("other", model_type="gemma2"), "model_type 'gemma2': GGUF files are written for llama"),
        (scaled, "rotary scaling 'yarn'"),
        (half, "low_freq_factor of rope_parameters: expected a number above 0"),
        (tokenized, "cuts text in a way that is not known"),
        (fine, r"model\.layers\.0\.mlp\.down_proj: has 96 inputs in groups of 16; GGUF Q4_1 has blocks of 32"),
    ):
        with pytest.raises((UnsupportedError, CheckpointError), match=message):
            export_gguf(folder, output, progress=False)
        assert list(output.parent.iterdir()) == []
    output.write_text("mine")
    with pytest.raises(OutputError, match=r"exists; name another file"):
        export_gguf(quantized_llama, output, progress=False)
    assert output.read_text() == "mine"
    export_gguf(quantized_llama, output, overwrite=True, progress=False)
    assert output.read_bytes().startswith(b"GGUF")


def test_the_verb(quantized_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.gguf"
    result = CliRunner().invoke(app, ["convert", str(quantized_llama), str(output), "--format", "gguf"])
    assert result.exit_code == 0, result.exception
    assert "Q4_1          14 linears, codes and scales unchanged; minima rounded to fp16" in result.stdout
    result = CliRunner().invoke(app, ["convert", str(quantized_llama), str(output), "--format", "gguf", "--json"])
    assert isinstance(result.exception, OutputError)
    arguments = ["convert", str(quantized_llama), str(output), "--format", "gguf", "--overwrite", "--json"]
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert document["blocks"] == {"Q4_1": 14}
    assert document["nbytes"] == output.stat().st_size
    result = CliRunner().invoke(app, [*arguments, "--requantize"])
    assert "takes no --requantize" in str(result.exception)
