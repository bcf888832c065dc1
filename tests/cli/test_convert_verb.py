"""`halfbyte convert` and `halfbyte verify` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.verbs import run


@pytest.fixture(scope="module")
def converted(quantized_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A GPTQ checkpoint, and what was printed while it was made."""
    folder = tmp_path_factory.mktemp("verbs") / "gptq"
    result = run("convert", quantized_llama, folder, "--format", "gptq")
    assert (result.returncode, result.stderr) == (0, "")
    return folder, result.stdout


def test_convert_says_what_became_of_each_kind(converted: tuple[Path, str]) -> None:
    folder, printed = converted
    assert "Quantized linears, gemm → gptq, as both are read back" in printed
    assert printed.count("codes unchanged") == 7
    assert "other tensors 6, byte for byte as they were" in printed
    assert f"saved to      {folder}" in printed


def test_convert_prints_json(converted: tuple[Path, str], tmp_path: Path) -> None:
    result = run("convert", converted[0], tmp_path / "out", "--format", "safetensors", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["source_format"], document["exact"], document["shards"]) == ("gptq", True, 1)


def test_convert_refuses_in_one_line(converted: tuple[Path, str], tmp_path: Path) -> None:
    result = run("convert", converted[0], tmp_path / "out", "--format", "marlin")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("halfbyte: model.layers.0.mlp.down_proj: ")
    assert result.stderr.count("\n") == 1
    assert "; --format " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_convert_names_every_layout_that_it_writes(converted: tuple[Path, str], tmp_path: Path) -> None:
    result = run("convert", converted[0], tmp_path / "out", "--format", "ggml")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("halfbyte: --format ggml: expected gemm, ")
    assert result.stderr.endswith(", gguf\n")
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_goes_the_way_that_its_refusal_names(tiny_llama: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_llama, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    refused = run("verify", old)
    assert refused.returncode == 1
    refused = run("eval", old)
    assert refused.returncode == 2
    command = refused.stderr.partition("halfbyte convert ")[2].partition(" reads it")[0]
    words = [str(tmp_path / "new") if word == "OUT" else word for word in command.split()]
    assert run("convert", *words).returncode == 0
    verified = run("verify", tmp_path / "new")
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "0 problems")


def test_verify_groups_what_is_alike_and_exits_with_1(converted: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted[0], folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "halfbyte_manifest.json").unlink()
    result = run("verify", folder)
    assert (result.returncode, result.stderr) == (1, "")
    line = "problem  model.layers.*.input_layernorm.weight: 1 of 64 values are not finite (2 of them)"
    assert line in result.stdout
    assert result.stdout.splitlines()[-1] == "2 problems"
    document = json.loads(run("verify", folder, "--json").stdout)
    assert document["problems"] == 2
    assert [check["name"] for check in document["checks"] if check["problems"]] == ["numbers"]


def test_verify_refuses_what_it_cannot_look_at(converted: tuple[Path, str], tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path], "has no config.json"),
        ([converted[0], "--for", "tgi"], "--for 'tgi': rules are known of vllm, sglang, transformers, autoawq"),
        ([converted[0], "--tp", 2], "--tp 2: only with --for vllm or --for sglang"),
        ([converted[0], "--for", "vllm", "--tp", 0], "--tp: expected at least 1, got 0"),
    ):
        result = run("verify", *arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr
