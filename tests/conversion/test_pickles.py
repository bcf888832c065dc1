"""Folders of old: `pytorch_model.bin` becomes safetensors, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.conversion.convert import convert
from halfbyte.errors import CheckpointError, ModelNotFoundError

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama without weights."""
    shutil.copytree(tiny_llama, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    return tmp_path / "old"


@pytest.fixture(scope="module")
def state(tiny_llama: Path) -> dict[str, torch.Tensor]:
    """Its weights, as torch.save had them: with the head that is tied to the embedding."""
    checkpoint = Checkpoint.open(tiny_llama)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def unpickle(folder: Path, **options: Any) -> Any:
    out = folder.parent / "new"
    return convert(folder, out, "safetensors", from_pickle=True, progress=False, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_tensors_are_those_of_the_pickle(
    folder: Path, state: dict[str, torch.Tensor], tiny_llama: Path, zipped: bool
) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = unpickle(folder)
    assert (found.source_format, found.dropped) == ("pickle", ("lm_head.weight",))
    old, new = Checkpoint.open(tiny_llama), Checkpoint.open(found.output_dir)
    assert new.names() == old.names()
    for name in old.names():
        assert torch.equal(new.read(name), old.read(name))
    assert (found.output_dir / "tokenizer.json").is_file()


def test_a_head_that_the_config_does_not_tie_is_written(folder: Path, state: dict[str, torch.Tensor]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    torch.save(state, folder / "pytorch_model.bin")
    found = unpickle(folder)
    assert found.dropped == ()
    assert torch.equal(Checkpoint.open(found.output_dir).read("lm_head.weight"), state["lm_head.weight"])


def test_views_of_one_memory_are_written_each_for_itself(folder: Path, state: dict[str, torch.Tensor]) -> None:
    fused = torch.arange(2 * 64 * 32).reshape(64, 64).bfloat16()
    views = {"model.layers.0.self_attn.k_proj.weight": fused[:32], "model.layers.0.self_attn.v_proj.weight": fused[32:]}
    torch.save({**state, **views, "turned": fused.T}, folder / "pytorch_model.bin")
    new = Checkpoint.open(unpickle(folder).output_dir)
    for name, tensor in {**views, "turned": fused.T}.items():
        assert torch.equal(new.read(name), tensor)


def shards(folder: Path, state: dict[str, torch.Tensor], weight_map: Callable[[dict[str, str]], Any]) -> None:
    """Every layer in a file of its own."""
    placed: dict[str, str] = {}
    for number in (0, 1):
        part = {name: tensor for name, tensor in state.items() if ("layers.1." in name) == bool(number)}
        filename = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save(part, folder / filename)
        placed.update(dict.fromkeys(part, filename))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map(placed)}))


def test_shards_are_read_one_by_one(folder: Path, state: dict[str, torch.Tensor]) -> None:
    shards(folder, state, lambda placed: placed)
    found = unpickle(folder, max_shard_size="50KB")
    new = Checkpoint.open(found.output_dir)
    assert found.shards > 2
    assert set(new.names()) == set(state) - {"lm_head.weight"}
    assert all(torch.equal(new.read(name), state[name]) for name in new.names())


NORM = "model.norm.weight"
BAD_INDEX: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "leads out": (lambda placed: {**placed, NORM: "../pytorch_model.bin"}, "shard .* must be a file name in the same"),
    "no name": (lambda placed: {**placed, NORM: 7}, "shard of type int must be a file name"),
    "gone": (lambda placed: {**placed, NORM: "gone.bin"}, "shard gone.bin is missing; fetch it again$"),
    "forgets": (lambda placed: {k: v for k, v in placed.items() if k != NORM}, f"holds tensor {NORM}, which the index"),
    "invents": (lambda placed: {**placed, "x": placed[NORM]}, "tensor x is not in pytorch_model-00001-of-00002.bin$"),
    "empty": (lambda placed: {}, "expected a non-empty object under weight_map$"),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_a_bad_index_is_refused(folder: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    change, message = BAD_INDEX[kind]
    shards(folder, state, change)
    refused(folder, message)


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(folder: Path, zipped: bool) -> None:
    victim = folder.parent / "victim"
    bomb = {"a": torch.zeros(2), "b": Bomb(victim)}
    torch.save(bomb, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(folder, r"pytorch_model.bin: it asks for \w+.mkdir, which is code and no tensor; torch refuses to run it")
    assert not victim.exists()


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(20)), "cannot be read as a pickle of tensors"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a pickle of tensors"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "cannot be read as a pickle of tensors"),
    "a tensor": (
        lambda path: torch.save(torch.zeros(2), path),
        "expected a dictionary of tensors .*, found Tensor",
    ),
    "nested": (lambda path: torch.save({"state": {"a": torch.zeros(2)}}, path), "entry state is no dense tensor"),
    "sparse": (lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path), "entry a is no dense tensor"),
    "numbered": (lambda path: torch.save({3: torch.zeros(2)}, path), "entry of type int is no dense tensor"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_another_file_is_refused(folder: Path, kind: str) -> None:
    make, message = BAD_FILES[kind]
    make(folder / "pytorch_model.bin")
    refused(folder, message)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        unpickle(folder)
    assert str(error.value).isprintable()
    assert not (folder.parent / "new").exists()


def test_a_folder_without_a_pickle_is_refused(folder: Path) -> None:
    refused(folder, "holds no pytorch_model.bin and no pytorch_model.bin.index.json")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    with pytest.raises(ModelNotFoundError, match="no such folder; --from-pickle takes a folder"):
        unpickle(folder / "nowhere")


def test_the_refusal_elsewhere_names_a_command_that_works(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"halfbyte convert {folder} OUT --format safetensors --from-pickle"):
        Checkpoint.open(folder)
    unpickle(folder)
