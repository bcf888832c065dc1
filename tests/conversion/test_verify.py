"""What `verify` finds: nothing in sound folders, and each thing that was broken in others."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.conversion.convert import convert
from halfbyte.conversion.verification import Verification
from halfbyte.conversion.verify import verify
from halfbyte.errors import CheckpointError, ConfigError, ModelNotFoundError

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm.weight"


def check(found: Verification, name: str) -> Any:
    (one,) = (check for check in found.checks if check.name == name)
    return one


def run(folder: Path, **options: Any) -> Verification:
    return verify(folder, progress=False, **options)


@pytest.fixture
def folder(quantized_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(quantized_llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(quantized_llama: Path, tmp_path: Path) -> Path:
    convert(quantized_llama, tmp_path / "sharded", "safetensors", max_shard_size="30KB", progress=False)
    return tmp_path / "sharded"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the tensors of a folder, and forget what the manifest says of them."""
    tensors = load_file(folder / MODEL)
    edit(tensors)
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    (folder / "halfbyte_manifest.json").unlink()


def test_sound_folders_have_no_problem(quantized_llama: Path, tiny_llama: Path, sharded: Path) -> None:
    for folder in (quantized_llama, tiny_llama, sharded):
        found = run(folder)
        assert found.problems == []
        assert found.notes == []
    assert "not quantized" in check(run(tiny_llama), "config.json").detail
    assert check(run(tiny_llama), "hashes").result == "not checked"
    hashes = check(run(quantized_llama), "hashes")
    assert (hashes.result, hashes.detail) == ("ok", f"{len(load_file(quantized_llama / MODEL))} tensors as recorded")
    assert check(run(sharded), "quantized linears").detail.startswith("14 unpacked, zero points ")


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "gemv", "native"])
def test_every_layout_is_verified(quantized_llama: Path, tmp_path: Path, format: str) -> None:
    convert(quantized_llama, tmp_path / "out", format, progress=False)
    assert run(tmp_path / "out").problems == []


def poison(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[3] = value

    return edit


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "NaN in a norm": (poison(NORM, float("nan")), "numbers", f"{NORM}: 1 of 64 values are not finite"),
    "NaN in scales": (poison(f"{Q}.scales", float("nan")), "quantized linears", f"{Q}.scales: holds values"),
    "no zeros": (lambda t: t.pop(f"{Q}.qzeros"), "quantized linears", f"tensor {Q}.qzeros: missing"),
    "no norm": (lambda t: t.pop(NORM), "names and shapes", f"{NORM}: missing; the config implies it"),
    "no linear": (lambda t: [t.pop(f"{Q}.{k}") for k in ("qweight", "qzeros", "scales")], "names and shapes",
                  f"{Q}.weight: missing"),
    "narrow norm": (lambda t: t.update({NORM: t[NORM][:32].clone()}), "names and shapes",
                    rf"{NORM}: expected \[64\] from config.json, found \[32\]"),
    "narrow linear": (lambda t: t.update({f"{Q}.{k}": t[f"{Q}.{k}"][:, :4].clone() for k in ("qweight", "qzeros")}
                                         | {f"{Q}.scales": t[f"{Q}.scales"][:, :32].clone()}),
                      "names and shapes", rf"{Q}: expected a \[64, 64\] linear from config.json, found \[32, 64\]"),
    "whole numbers": (lambda t: t.update({NORM: t[NORM].int()}), "names and shapes",
                      f"{NORM}: expected floating point, found int32"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_one_broken_thing_is_one_problem(folder: Path, kind: str) -> None:
    edit, name, message = BROKEN[kind]
    change(folder, edit)
    found = run(folder)
    (problem,) = found.problems
    assert check(found, name).problems == [problem]
    assert re.search(message, problem), problem
    assert problem.isprintable()


def test_all_problems_are_told(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        poison(NORM, float("inf"))(tensors)
        poison(f"{Q}.scales", float("inf"))(tensors)
        del tensors["model.layers.1.mlp.up_proj.scales"]

    change(folder, edit)
    found = run(folder)
    assert len(found.problems) == 3
    page = found._repr_html_()
    assert all(html.escape(problem) in page for problem in found.problems)
    assert (found.count, page.count("3 problems")) == ("3 problems", 1)


def test_one_problem_is_counted_as_one(folder: Path) -> None:
    change(folder, poison(NORM, float("nan")))
    found = run(folder)
    assert found.count == "1 problem"
    assert f"{folder}: 1 problem<" in found._repr_html_()


def test_a_tensor_the_model_has_no_place_for_is_noted(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(2)}))
    found = run(folder)
    assert found.problems == []
    assert found.notes == ["model.layers.9.extra: the model in config.json has no such tensor"]


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / INDEX).read_text())
    edit(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


def test_everything_wrong_with_an_index_is_told(sharded: Path) -> None:
    (sharded / "halfbyte_manifest.json").unlink()

    def edit(weight_map: dict[str, Any]) -> None:
        del weight_map[NORM]
        weight_map["invented"] = weight_map["model.embed_tokens.weight"]
        weight_map["elsewhere"] = "../model.safetensors"

    edit_index(sharded, edit)
    problems = check(run(sharded), "files and index").problems
    assert any("shard ../model.safetensors must be a file name" in problem for problem in problems)
    assert any(problem.startswith("invented: not in model-") for problem in problems)
    assert any(problem.startswith(f"{NORM}: is not in the index, in model-") for problem in problems)
    assert len(problems) == 3


def test_a_missing_shard_is_one_problem_of_the_files(sharded: Path) -> None:
    (sharded / "halfbyte_manifest.json").unlink()
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.unlink()
    found = run(sharded)
    (problem,) = check(found, "files and index").problems
    assert problem.startswith(f"{shard.name}: missing, with the ")
    assert found.problems == [problem]
    assert "as far as the files could be read" in check(found, "names and shapes").detail


def test_a_truncated_shard_is_one_problem_and_does_not_hide_others(sharded: Path) -> None:
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    tensors = load_file(last)
    save_file({**tensors, NORM: torch.full_like(tensors[NORM], torch.nan)}, last, metadata={"format": "pt"})
    truncated, not_finite, changed = run(sharded).problems
    assert "truncated" in truncated
    assert f"{NORM}: 64 of 64 values are not finite" in not_finite
    assert f"{NORM}: changed since it was written" in changed


def test_a_tensor_that_is_there_twice_is_a_problem(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    one, other = load_file(first), load_file(second)
    name = next(iter(one))
    save_file({**other, name: one[name]}, second, metadata={"format": "pt"})
    (problem,) = check(run(sharded), "files and index").problems
    assert problem == f"{name}: is there a second time, in {second.name}"


def test_files_that_belong_to_nothing_are_noted(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text("{}")
    found = run(folder)
    assert found.problems == []
    assert len(found.notes) == 2


def test_a_changed_byte_is_found_by_its_hash(folder: Path) -> None:
    tensors = load_file(folder / MODEL)
    tensors[f"{Q}.qweight"][0, 0] ^= 1
    del tensors["model.layers.1.input_layernorm.weight"]
    tensors["new"] = torch.zeros(1)
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    assert sorted(check(run(folder), "hashes").problems) == [
        "model.layers.0.self_attn.q_proj.qweight: changed since it was written (SHA-256)",
        "model.layers.1.input_layernorm.weight: recorded in halfbyte_manifest.json, not in the files",
        "new: in the files, not recorded in halfbyte_manifest.json",
    ]


def test_tokenizers_are_looked_at(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {"320": {"content": "<beyond>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": tokens}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    beyond = {"id": 320, "content": "<beyond>", "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}  # fmt: skip
    tokenizer["added_tokens"].append(beyond)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run(folder).problems == ["tokenizer: has an id of 320; the embedding has 320 rows"]
    (folder / "tokenizer.json").write_text("{")
    (problem,) = run(folder).problems
    assert "the tokenizer cannot be read" in problem


def test_an_unknown_layout_is_a_problem(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "exl3"}}))
    found = run(folder)
    assert "quantization method 'exl3'" in check(found, "config.json").problems[0]
    assert check(found, "quantized linears").result == "not checked"


def test_what_is_no_model_is_refused(tmp_path: Path, quantized_llama: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no config.json"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="engine 'tgi': rules are known of vllm, sglang, transformers, autoawq"):
        run(quantized_llama, engines=["tgi"])
    with pytest.raises(ConfigError, match="tensor_parallel: expected at least 1"):
        run(quantized_llama, engines=["vllm"], tensor_parallel=0)
    with pytest.raises(ConfigError, match="an engine that splits linears: vllm or sglang"):
        run(quantized_llama, tensor_parallel=2)
