"""A saved copy: the same bytes in other files, and a card that says what the checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load

import halfbyte
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import ConfigError, OutputError
from halfbyte.publishing.card import model_card


def comparison(folder: Path, **changes: Any) -> Any:
    sides = [
        {"label": "A", "folder": "/original", "perplexity": {"value": 26.1711}, "kl": None},
        {"label": "B", "folder": str(folder), "perplexity": {"value": 30.2612}, "kl": {"value": 0.1253}},
    ]
    found = {
        "sides": sides,
        "reference": "A",
        "provisional": False,
        "text": {"name": "wikitext2", "tokens": [1000, 23]},
    }
    return SimpleNamespace(to_dict=lambda: {**found, **changes})


@pytest.fixture(scope="module")
def model(quantized_llama: Path) -> halfbyte.Model:
    return halfbyte.load(quantized_llama)


def test_the_copy_is_resharded_and_has_the_same_bytes(
    model: halfbyte.Model, quantized_llama: Path, tmp_path: Path
) -> None:
    copy = model.save_pretrained(tmp_path / "copy", max_shard_size="30KB")
    before, after = Checkpoint.open(quantized_llama), Checkpoint.open(copy)
    assert len(list(copy.glob("model-*-of-*.safetensors"))) > 1
    assert before.names() == after.names()
    for name in before.names():
        assert before.info(name).dtype == after.info(name).dtype
        assert before.read(name).view(torch.uint8).equal(after.read(name).view(torch.uint8))
    assert after.config == before.config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (copy / name).read_bytes() == (quantized_llama / name).read_bytes()
    manifest = json.loads((copy / "halfbyte_manifest.json").read_text())
    assert set(manifest["sha256"]) == set(after.names())
    assert torch.equal(halfbyte.load(copy).logits([1, 2, 3]), model.logits([1, 2, 3]))


def test_it_is_all_or_nothing(model: halfbyte.Model, quantized_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_size 'large': expected an amount"):
        model.save_pretrained(tmp_path / "copy", max_shard_size="large")
    with pytest.raises(ConfigError, match="comparison: none of its models is"):
        model.save_pretrained(tmp_path / "copy", comparison=comparison(tmp_path))
    with pytest.raises(OutputError, match="is the folder the model is read from"):
        model.save_pretrained(quantized_llama, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_what_is_not_quantized_is_saved_without_a_card(tiny_llama: Path, tmp_path: Path) -> None:
    copy = halfbyte.load(tiny_llama).save_pretrained(tmp_path / "copy")
    assert not (copy / "README.md").exists()
    assert Checkpoint.open(copy).names() == Checkpoint.open(tiny_llama).names()
    with pytest.raises(ConfigError, match="is not quantized"):
        model_card(tiny_llama)


def test_the_card_says_what_the_manifest_says(model: halfbyte.Model, quantized_llama: Path, tmp_path: Path) -> None:
    copy = model.save_pretrained(tmp_path / "mine", comparison=comparison(quantized_llama))
    text = (copy / "README.md").read_text()
    data = metadata_load(copy / "README.md")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["4-bit", "awq", "halfbyte"],
    }
    manifest = json.loads((quantized_llama / "halfbyte_manifest.json").read_text())
    assert manifest["calibration"]["sha256"] in text
    for line in (
        "# mine", "| Group size | 32 |", "| Method | `awq` |", "| before | 26.171 |  |", "| after | 30.261 | 0.1253 |",
        "Over 1,023 tokens of wikitext2.", 'halfbyte.load("mine")', "vllm serve mine",
        'AutoModelForCausalLM.from_pretrained("mine", quantization_config=halfbyte.HalfbyteConfig())',
    ):  # fmt: skip
        assert line in text.splitlines() or line in text
    assert str(quantized_llama.parent) not in text


def test_a_card_that_is_there_is_kept_until_there_is_something_to_add(model: halfbyte.Model, tmp_path: Path) -> None:
    first = model.save_pretrained(tmp_path / "first")
    (first / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    again = halfbyte.load(first)
    assert (again.save_pretrained(tmp_path / "kept") / "README.md").read_text().endswith("Mine.\n")
    new = again.save_pretrained(tmp_path / "new", comparison=comparison(first))
    assert metadata_load(new / "README.md")["license"] == "mit"
    assert "Mine." not in (new / "README.md").read_text()


def test_the_base_model_is_named_where_it_has_a_name_for_others(quantized_llama: Path, tmp_path: Path) -> None:
    config = json.loads((quantized_llama / "config.json").read_text())
    manifest = json.loads((quantized_llama / "halfbyte_manifest.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "LICENSE.txt").write_text("Do what you like.")
    (tmp_path / "halfbyte_manifest.json").write_text(json.dumps({**manifest, "model": "org/base"}))
    (tmp_path / "README.md").write_text(model_card(tmp_path))
    data = metadata_load(tmp_path / "README.md")
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["license_link"]) == ("other", "LICENSE.txt")
    assert "`org/base`, quantized with halfbyte to 4 bits" in model_card(tmp_path)


def test_a_checkpoint_in_our_own_layout(tmp_path: Path) -> None:
    section = {"quant_method": "halfbyte", "version": 1, "bits": 3, "group_size": -1, "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    text = model_card(tmp_path, name="me/three")
    assert "library_name: halfbyte" in text
    assert "| Group size | whole rows |" in text
    assert 'from_pretrained("me/three")' in text
    assert "vLLM does not read this layout" in text


@pytest.mark.parametrize(("version", "served"), [("gemm", True), ("GEMM", True), ("gemv", False)])
def test_vllm_reads_one_of_awqs_forms(version: str, served: bool, tmp_path: Path) -> None:
    section = {"quant_method": "awq", "version": version, "bits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    assert ("vllm serve me/four" in model_card(tmp_path, name="me/four")) == served
