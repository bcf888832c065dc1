"""A GGUF file as a MODEL: written and read again, the same codes and the same logits; other families, other blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

import halfbyte
from halfbyte.checkpoints.gguf_copy import gguf_folder
from halfbyte.checkpoints.gguf_models import llama3_factors
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.cli import app
from halfbyte.conversion.convert import convert
from halfbyte.conversion.gguf_file import export_gguf
from halfbyte.conversion.quantized import QuantizedCheckpoint
from halfbyte.conversion.verify import verify
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats.layouts import read_layout
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.on_the_fly import model_folder
from halfbyte.tensor import QuantizedTensor
from tests.conftest import TEXT, make_llama, make_tokenizer

IDS = torch.arange(48) * 7 % 320
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))


def weights(folder: Path) -> dict[str, QuantizedTensor]:
    checkpoint = Checkpoint.open(folder)
    layout = read_layout(checkpoint.config)
    assert layout is not None
    quantized = QuantizedCheckpoint(checkpoint, layout)
    return {name: quantized.read(name) for name in quantized.linears}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert first.names() == second.names()
    for name in first.names():
        assert torch.equal(first.read(name), second.read(name)), name


def quantized(folder: Path, output: Path, **options: Any) -> Path:
    halfbyte.quantize(folder, output, QuantConfig(method="rtn", group_size=32, **options), progress=False)
    return output


@pytest.mark.parametrize("symmetric", [False, True])
def test_to_gguf_and_back_is_the_same_checkpoint(tiny_llama: Path, tmp_path: Path, symmetric: bool) -> None:
    start = quantized(tiny_llama, tmp_path / "start", zero_point=not symmetric)
    export = export_gguf(start, tmp_path / "x.gguf", progress=False)
    assert export.blocks == {"Q4_0" if symmetric else "Q4_1": 14}
    back = convert(tmp_path / "x.gguf", tmp_path / "back", "gemm", progress=False)
    assert (back.source_format, back.exact, len(back.linears)) == ("gguf", True, 14)
    assert_same_tensors(start, tmp_path / "back")
    before, direct = halfbyte.load(start), halfbyte.load(tmp_path / "x.gguf")
    assert torch.equal(before.logits(IDS), direct.logits(IDS))
    text = "The 7th crow sat"
    assert direct.tokenizer(text)["input_ids"] == before.tokenizer(text)["input_ids"]
    assert direct.generate(text, max_new_tokens=12) == before.generate(text, max_new_tokens=12)


def test_numbers_that_are_damaged_are_found_and_the_file_named(quantized_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    export_gguf(quantized_llama, path, progress=False)
    path.write_bytes(path.read_bytes()[:-64] + b"\xff" * 64)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: tensor .* not finite"):
        verify(path, progress=False)
    assert [left.name for left in (tmp_path / "cache" / "gguf").iterdir()] == []


def test_a_file_is_read_once_and_again_when_it_changes(quantized_llama: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "x.gguf"
    export_gguf(quantized_llama, path, progress=False)
    folder = model_folder(path)
    assert "reading x.gguf as codes, once; kept in" in capsys.readouterr().err
    assert model_folder(path) == folder
    assert capsys.readouterr().err == ""
    floats = gguf_folder(path, progress=False)
    assert "quantization_config" not in Checkpoint.open(floats).config
    export_gguf(quantized_llama, path, overwrite=True, progress=False)
    assert model_folder(path, progress=False) != folder
    assert not [item for item in folder.parent.iterdir() if item.name.startswith(".")]


def test_codes_and_floats_of_a_file_are_the_same_weights(quantized_llama: Path, tmp_path: Path) -> None:
    export_gguf(quantized_llama, tmp_path / "x.gguf", progress=False)
    floats = Checkpoint.open(gguf_folder(tmp_path / "x.gguf", progress=False))
    for name, tensor in weights(model_folder(tmp_path / "x.gguf", progress=False)).items():
        wide = floats.read(f"{name}.weight").float()
        assert float((wide - tensor.dequantize()).norm() / wide.norm()) < 1e-3, name
    # The embedding came from bf16 and stays it; the norms are float32 in the file.
    assert {floats.info(name).dtype for name in floats.names() if "proj" not in name} == {torch.bfloat16}


def test_a_file_is_quantized_anew_from_its_floats(quantized_llama: Path, tmp_path: Path) -> None:
    export_gguf(quantized_llama, tmp_path / "x.gguf", progress=False)
    report = halfbyte.quantize(
        tmp_path / "x.gguf", tmp_path / "small", QuantConfig(method="rtn", group_size=32, bits=3), progress=False
    )
    assert len(report.linears) == 14
    copy = model_folder(f"{tmp_path}/x.gguf@rtn:group_size=32,bits=3", progress=False)
    assert_same_tensors(copy, tmp_path / "small")


def test_llama3_scaling_goes_there_and_back(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", rope_parameters=LLAMA3)
    start = quantized(folder, tmp_path / "start")
    export_gguf(start, tmp_path / "x.gguf", progress=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = halfbyte.load(start).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / scaled, factors, rtol=1e-5)
    assert (factors[0], factors[-1]) == (1.0, 8.0) or factors.max() > 1
    read = Checkpoint.open(model_folder(tmp_path / "x.gguf", progress=False)).config["rope_parameters"]
    assert read == LLAMA3
    assert torch.equal(halfbyte.load(start).logits(IDS), halfbyte.load(tmp_path / "x.gguf").logits(IDS))


def test_factors_that_are_nobody_s_are_taken_as_they_are(tmp_path: Path) -> None:
    rope = {**LLAMA3, "high_freq_factor": 3.0, "original_max_position_embeddings": 100}
    start = quantized(make_llama(tmp_path / "model", rope_parameters=rope), tmp_path / "start")
    export_gguf(start, tmp_path / "x.gguf", progress=False)
    found = Checkpoint.open(model_folder(tmp_path / "x.gguf", progress=False)).config["rope_parameters"]
    assert found["rope_type"] == "longrope"
    assert found["long_factor"] == llama3_factors(rope, 16).tolist()
    one, other = halfbyte.load(start).logits(IDS), halfbyte.load(tmp_path / "x.gguf").logits(IDS)
    assert torch.allclose(one, other, atol=1e-3)


def test_linear_scaling_goes_there_and_back(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
    start = quantized(make_llama(tmp_path / "model", rope_parameters=rope), tmp_path / "start")
    export_gguf(start, tmp_path / "x.gguf", progress=False)
    assert Checkpoint.open(model_folder(tmp_path / "x.gguf", progress=False)).config["rope_parameters"] == rope


def test_biases_an_untied_head_and_head_norms(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**{**sizes, "head_dim": 16, "vocab_size": 330}, tie_word_embeddings=False))
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**{**sizes, "vocab_size": 330}, tie_word_embeddings=True))
    for name, model in (("qwen2", qwen2), ("qwen3", qwen3)):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias") or "norm" in key:
                    parameter.normal_(1, 0.3)
        model.to(torch.float16).save_pretrained(tmp_path / name)
        make_tokenizer(tmp_path / name)
        start = quantized(tmp_path / name, tmp_path / f"{name}-4bit")
        export_gguf(start, tmp_path / f"{name}.gguf", progress=False)
        convert(tmp_path / f"{name}.gguf", tmp_path / f"{name}-back", "gemm", progress=False)
        assert_same_tensors(start, tmp_path / f"{name}-back")
        one, other = halfbyte.load(start), halfbyte.load(tmp_path / f"{name}.gguf")
        assert torch.equal(one.logits(IDS), other.logits(IDS)), name


def write_model(path: Path, model: Any, architecture: str, offset: float, kind: str, **settings: Any) -> None:
    """A transformers model as llama.cpp's converter writes it: names by the gguf package, matrices in `kind`."""
    config, keys = model.config, gguf.Keys
    (arch,) = [one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    for key, value in settings.items():
        writer.add_key_value(keys.Attention.SLIDING_WINDOW.format(arch=architecture) if key == "window" else
                             f"{architecture}.{key}", value, gguf.GGUFValueType.UINT32 if type(value) is int else
                             gguf.GGUFValueType.FLOAT32)  # fmt: skip
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    pieces += [f"[{index}]" for index in range(320 - len(pieces))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (320 - 259)]
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_scores([0.0] * 259 + [-float(index) for index in range(320 - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        stored = values + np.float32(offset) if name.endswith("norm.weight") else values
        wanted = gguf.GGMLQuantizationType[kind if stored.ndim > 1 else "F32"]
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), gguf.quantize(stored, wanted),
                          raw_dtype=wanted)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gemma(second: bool) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = GemmaForCausalLM(GemmaConfig(**sizes))
    if second:
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=16, query_pre_attn_scalar=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.15)
    return model.bfloat16()


@pytest.mark.parametrize("second", [False, True])
def test_gemma_s_norms_lose_the_one_that_the_file_adds(second: bool, tmp_path: Path) -> None:
    model = gemma(second)
    more = {"window": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if second else {}
    write_model(tmp_path / "x.gguf", model, "gemma2" if second else "gemma", 1.0, "BF16", **more)
    found = Checkpoint.open(model_folder(tmp_path / "x.gguf", progress=False))
    for name, parameter in model.named_parameters():
        assert torch.allclose(found.read(name).float(), parameter.float(), atol=1e-7), name
    with torch.inference_mode():
        expected = model.float()(IDS[None]).logits[0]
    assert torch.allclose(halfbyte.load(tmp_path / "x.gguf").logits(IDS), expected, atol=2e-2)


def test_blocks_of_five_and_eight_bits_run_as_codes(tmp_path: Path) -> None:
    for kind, bits in (("Q8_0", 8), ("Q5_0", 5), ("Q5_1", 5)):
        model = gemma(False)
        write_model(tmp_path / f"{kind}.gguf", model, "gemma", 1.0, kind)
        folder = model_folder(tmp_path / f"{kind}.gguf", progress=False)
        assert {tensor.bits for tensor in weights(folder).values()} == {bits}
        assert Checkpoint.open(folder).config["quantization_config"]["bits"] == bits
        coded = halfbyte.load(tmp_path / f"{kind}.gguf", compute="a16", head_bits=16).logits(IDS)
        plain = halfbyte.load(gguf_folder(tmp_path / f"{kind}.gguf", progress=False)).logits(IDS)
        assert float((coded - plain).norm() / plain.norm()) < 2e-2, kind


def test_minima_become_zero_points_only_on_request(tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", gemma(False), "gemma", 1.0, "Q4_1")
    message = "has floating minima; .* --requantize rounds them; --format native holds every linear; halfbyte quantize"
    with pytest.raises(UnsupportedError, match=message):
        convert(tmp_path / "x.gguf", tmp_path / "out", "gemm", progress=False)
    assert not (tmp_path / "out").exists()
    found = convert(tmp_path / "x.gguf", tmp_path / "out", "gemm", requantize=True, progress=False)
    assert {linear.outcome for linear in found.linears} == {"requantized"}
    assert 0.01 < max(linear.relative_error for linear in found.linears) < 0.15
    assert convert(tmp_path / "x.gguf", tmp_path / "native", "native", progress=False).exact
    assert convert(tmp_path / "x.gguf", tmp_path / "copy", "safetensors", progress=False).format == "safetensors"


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf", gemma(False), "gemma", 1.0, "F16")
    folder = model_folder(tmp_path / "x.gguf", progress=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = tokenizer.encode("ab ab aé")
    assert found.tokens == ["<s>", "▁ab", "▁ab", "▁", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == "ab ab aé"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_sizes_that_contradict_the_tensors_are_refused(quantized_llama: Path, tmp_path: Path) -> None:
    export_gguf(quantized_llama, tmp_path / "x.gguf", progress=False)
    raw = (tmp_path / "x.gguf").read_bytes()
    for key, message in (
        ("llama.block_count", "announces 1,879,048,194 blocks, its tensors are of 2"),
        ("llama.embedding_length", r"token_embd\.weight: expected \[320, 1879048256\]"),
        ("llama.feed_forward_length", r"blk\.0\.ffn_up\.weight: expected \[1879048288, 64\]"),
        ("llama.attention.head_count_kv", r"blk\.0\.attn_k\.weight: expected"),
    ):
        place = raw.index(key.encode()) + len(key) + 4
        broken = bytearray(raw)
        broken[place + 3] = 0x70
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            model_folder(tmp_path / "broken.gguf", progress=False)
    found = verify(tmp_path / "x.gguf", progress=False)
    assert found.checks[0].detail.startswith("architecture llama, 14 × Q4_1")
    assert not found.problems


def test_the_verbs(quantized_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    export_gguf(quantized_llama, path, progress=False)
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--format", "gemm"])
    assert result.exit_code == 0, result.exception
    assert "gguf → gemm" in result.stdout
    assert result.stdout.count("codes unchanged") == 7
    generated = CliRunner().invoke(app, ["generate", str(path), "The 7th", "--max-new-tokens", "4"])
    expected = halfbyte.load(quantized_llama).generate("The 7th", max_new_tokens=4)
    assert expected.strip() in generated.stdout
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    arguments = ["eval", str(path), "--data", str(tmp_path / "text.txt"), "--window", "64", "--skip-speed", "--json"]
    assert json.loads(CliRunner().invoke(app, arguments).stdout)["perplexity"]
