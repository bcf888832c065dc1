from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.checkpoints.reader import DTYPES, Checkpoint, read_config
from halfbyte.errors import CheckpointError, ModelNotFoundError


def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        tensors[name] = torch.arange(6).reshape(2, 3).to(dtype)
    tensors["empty"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(3.5)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == sorted(tensors)
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        info, found = checkpoint.info(name), checkpoint.read(name)
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else found == tensor


def test_a_tensor_read_is_ours_to_change(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), torch.ones(4))


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert "a" in checkpoint
    assert "c" not in checkpoint
    assert checkpoint.read("b").tolist() == [0, 0, 0]
    with pytest.raises(CheckpointError, match="^tensor c: not in"):
        checkpoint.read("c")


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_the_old_file_of_a_quantized_model_becomes_a_section(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / name).write_text('{"w_bit": 4}')
    assert read_config(tmp_path) == {"model_type": "x", "quantization_config": {"w_bit": 4}}
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    assert read_config(tmp_path) == {"quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{name}: expected a JSON object, found list"):
        read_config(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        Checkpoint.open(tmp_path / "none")
