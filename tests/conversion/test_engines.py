"""The rules of other engines, each by a case that keeps it and one that breaks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte import QuantConfig
from halfbyte.architectures.splitting import Heads, split
from halfbyte.conversion import engines
from halfbyte.conversion.convert import convert
from halfbyte.conversion.verify import verify
from tests.conftest import make_llama

K_PROJ, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every engine wants: 256 × 256 and wider, groups of 64."""
    folder = tmp_path_factory.mktemp("engines")
    make_llama(folder / "model", hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    config = QuantConfig(method="rtn", group_size=64)
    halfbyte.quantize(folder / "model", folder / "wide", config, progress=False)
    return folder / "wide"


def look(folder: Path, engine: str, gpus: int = 1) -> Any:
    return verify(folder, engines=[engine], tensor_parallel=gpus, progress=False).checks[-1]


def edited(folder: Path, tmp_path: Path, **section: Any) -> Path:
    """With other entries in its quantization_config; None takes one out."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    merged = {**config["quantization_config"], **section}
    config["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_checkpoint_by_the_rules_loads_and_is_fast(wide: Path, engine: str) -> None:
    found = look(wide, engine)
    assert (found.result, found.problems, found.notes) == ("ok", [], [])
    # Products of vLLM and SGLang: q+k+v, o, gate+up and down of two blocks.
    assert ("8 of 8 products on Marlin" if engine in ("vllm", "sglang") else "14 of 14 products on") in found.detail


@pytest.mark.parametrize(
    ("format", "opens"),
    [
        ("gemv", ["transformers", "autoawq"]),
        ("gemv_fast", ["transformers", "autoawq"]),
        ("llm-awq", ["transformers"]),
        ("compressed-tensors", ["vllm", "sglang", "transformers"]),
        ("native", []),
    ],
)
def test_a_layout_is_opened_or_not(wide: Path, tmp_path: Path, format: str, opens: list[str]) -> None:
    convert(wide, tmp_path / "out", format, progress=False)
    for engine in engines.ENGINES:
        problems = look(tmp_path / "out", engine).problems
        assert problems == [] if engine in opens else f"the {format} layout is not opened there" in problems[0]


def test_what_is_not_known_is_not_said(wide: Path, tiny_llama: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "out", "gptq", progress=False)
    assert look(tmp_path / "out", "vllm").result == "not checked"
    assert "is not opened there" in look(tmp_path / "out", "autoawq").problems[0]
    assert look(tiny_llama, "vllm").result == "not checked"


def test_small_products_miss_the_fast_kernel_or_have_none(quantized_llama: Path) -> None:
    """Blocks of 64: q+k+v is 128 × 64, which Marlin takes with padding only or not; groups of 32."""
    found = look(quantized_llama, "vllm")
    assert found.problems == []
    assert "model.layers.0.self_attn.o_proj: falls off the fast kernel (Marlin: 64 outputs and 64 inputs, " in (
        "\n".join(found.notes)
    )
    assert not any("q_proj+k_proj+v_proj" in note for note in found.notes)
    found = look(quantized_llama, "autoawq")
    assert f"{K_PROJ}: no kernel takes it (the AWQ GEMM kernel: 32 outputs are no multiple of 64)" in found.problems


def test_names_left_in_16_bit_are_matched_as_each_engine_does(wide: Path, tmp_path: Path) -> None:
    """`layers.1` is a part of full names, the beginning and end of none, and nothing that AutoAWQ sees."""
    copy = edited(wide, tmp_path, modules_to_not_convert=["lm_head", "layers.1"])
    problems = {engine: look(copy, engine).problems for engine in engines.ENGINES}
    assert f"{DOWN}: is quantized, but an entry of modules_to_not_convert matches it" in problems["vllm"][0]
    assert len(problems["vllm"]) == len(problems["sglang"]) == 7
    assert problems["transformers"] == problems["autoawq"] == []


def test_a_linear_in_16_bit_must_be_matched(wide: Path, tmp_path: Path) -> None:
    source = wide.parent / "model"
    config = QuantConfig(method="rtn", group_size=64, modules_to_not_convert=("0.self_attn.k_proj",))
    halfbyte.quantize(source, tmp_path / "kept", config, progress=False)
    found = {engine: look(tmp_path / "kept", engine).problems for engine in engines.ENGINES}
    assert found["vllm"] == [
        "model.layers.0.self_attn: of q_proj, k_proj, v_proj, which become one product there, only q_proj, v_proj "
        "are quantized"
    ]
    # SGLang asks for qkv_proj, which no entry is a part of.
    assert found["sglang"] == [
        f"{K_PROJ}: is in 16 bit, but no entry of modules_to_not_convert matches it by its rule",
        *found["vllm"],
    ]
    assert found["transformers"] == []
    # AutoAWQ sees `self_attn.k_proj` alone.
    assert found["autoawq"] == [
        f"{K_PROJ}: is in 16 bit, but no entry of modules_to_not_convert matches it by its rule"
    ]


def test_keys_that_an_engine_does_not_read(wide: Path, tmp_path: Path) -> None:
    old = edited(wide, tmp_path, bits=None, group_size=None, w_bit=4, q_group_size=64)
    assert look(old, "transformers").problems == [
        "config.json: w_bit and q_group_size: not read there, 4 bits and groups of 128 are assumed"
    ]
    shutil.rmtree(old)
    assert look(edited(wide, tmp_path, zero_point=None), "vllm").problems == [
        "config.json: zero_point: must be there and true"
    ]


def test_sglang_does_not_pad_and_has_one_kernel_for_compressed_tensors(quantized_llama: Path, tmp_path: Path) -> None:
    """Inputs of 64 and 96 are no multiples of 128."""
    found = look(quantized_llama, "sglang")
    assert found.problems == []
    assert any("o_proj: falls off the fast kernel (Marlin: 64 outputs and 64 inputs" in note for note in found.notes)
    convert(quantized_llama, tmp_path / "out", "compressed-tensors", progress=False)
    assert "o_proj: no kernel takes it (Marlin: 64 outputs and 64" in "\n".join(
        look(tmp_path / "out", "sglang").problems
    )


def test_tensor_parallelism_splits_outputs_or_inputs(wide: Path) -> None:
    assert look(wide, "vllm", 2).problems == []
    eight = look(wide, "vllm", 8).problems
    assert "model.layers.0.self_attn.o_proj: 32 inputs on each of 8 GPUs are no whole groups of 64" in eight
    assert "4 attention heads cannot be split over 8 GPUs" in eight
    assert not any("down_proj" in problem for problem in eight)  # 512 / 8 = 64
    three = look(wide, "vllm", 3).problems
    assert "model.layers.0.self_attn.q_proj: 256 outputs cannot be split over 3 GPUs" in three
    assert f"{DOWN}: 512 inputs cannot be split over 3 GPUs" in three
    assert (
        "model.layers.0.self_attn.q_proj: 4 outputs on each of 64 GPUs are no multiple of 8, what a word packs"
        in look(wide, "vllm", 64).problems
    )


@pytest.mark.parametrize(
    ("heads", "gpus", "expected"),
    [
        (Heads(32, 8), 8, {"a.q_proj+k_proj+v_proj": (32 * 16 // 8 + 2 * 16, 512, 128)}),
        # Twice as many GPUs as key-value heads: each has a copy of one.
        (Heads(32, 8), 16, {"a.q_proj+k_proj+v_proj": (32 * 16 // 16 + 2 * 16, 512, 128)}),
        (Heads(24, 8), 12, "8 key-value heads cannot be split over 12 GPUs, nor copied to them evenly"),
        (Heads(32, 8), 5, "32 attention heads cannot be split over 5 GPUs"),
    ],
)
def test_heads_are_split_whole_and_few_of_them_copied(heads: Heads, gpus: int, expected: Any) -> None:
    width = 16
    weights = {"a.q_proj": (heads.queries * width, 512, 128)}
    weights |= {f"a.{name}": (heads.keys * width, 512, 128) for name in ("k_proj", "v_proj")}
    shapes, problems = split(weights, gpus, heads)
    if isinstance(expected, str):
        assert expected in problems
    else:
        assert (shapes, problems) == (expected, [])
