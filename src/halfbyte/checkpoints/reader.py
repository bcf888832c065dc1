"""Lazy reading of a Hugging Face folder: one safetensors tensor at a time.

Files come from strangers: every header is checked (`header.py`), and so is every name the index gives, before anything
is allocated or opened.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoints.header import DTYPES, TensorInfo, read_header, shown
from halfbyte.errors import CheckpointError, ModelNotFoundError

__all__ = ["DTYPES", "Checkpoint", "TensorInfo", "read_config", "read_header", "read_json_object"]

# config.json and the index are text for people; larger ones are not theirs.
MAX_JSON_BYTES = 100_000_000
# Where quantization_config stood before config.json had one, in the order vLLM looks for them.
OLD_QUANTIZATION_FILES = ("quant_config.json", "quantize_config.json")


class Checkpoint:
    """A model folder whose headers were read and found sound; tensors are read when asked for.

    Attributes:
        folder: the folder.
        config: config.json as a dictionary (`read_config`).
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]):
        self.folder = folder
        self.config = config
        self._tensors = tensors

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and every safetensors header.

        Raises:
            ModelNotFoundError: no such folder.
            CheckpointError: a file is missing, truncated, malformed or contradicts another.
        """
        folder = Path(folder)
        if not os.path.isdir(folder):  # noqa: PTH112  (unlike Path.is_dir, never raises)
            raise ModelNotFoundError(f"{folder}: no such folder")
        if not _is_file(folder / "config.json"):
            raise CheckpointError(f"{folder}: has no config.json; expected a Hugging Face model folder")
        config = read_config(folder)
        index = folder / "model.safetensors.index.json"
        # transformers takes the single file first, too: the index beside it may be left over.
        if _is_file(folder / "model.safetensors"):
            tensors = read_header(folder / "model.safetensors")
        elif _is_file(index):
            tensors = _read_sharded(folder, index)
        else:
            raise CheckpointError(no_weights(folder))
        if not tensors:
            raise CheckpointError(f"{folder}: its safetensors hold no tensor")
        return cls(folder, config, tensors)

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """One safetensors file that stands alone, without a config.

        Raises:
            CheckpointError: it is missing, truncated or malformed.
        """
        return cls(path.parent, {}, read_header(path))

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, without reading it."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"tensor {shown(name)}: not in {self.folder}") from None

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self._tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: not there, or the file changed or became unreadable since it was opened.
        """
        info = self.info(name)
        # A plain read, not a memory map: pages of a map would count as resident for as long as the file is open.
        # Into memory of torch's, which is always aligned alike: the last bit of a matrix product may depend on that.
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            with info.file.open("rb") as file:
                file.seek(info.offset)
                done = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) if info.nbytes else 0
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error.strerror})") from error
        if done != info.nbytes:
            raise CheckpointError(f"{info.file}: ended inside tensor {shown(name)}; it changed while it was open")
        return tensor


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with what old AutoAWQ and AutoGPTQ wrote beside it as its quantization_config.

    Raises:
        CheckpointError: a file is unreadable, not JSON, or not an object.
    """
    config = read_json_object(folder / "config.json")
    if "quantization_config" not in config:
        for name in OLD_QUANTIZATION_FILES:
            if _is_file(folder / name):
                return {**config, "quantization_config": read_json_object(folder / name)}
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes; expected a JSON document of at most {MAX_JSON_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _is_file(path: Path) -> bool:
    """Unlike Path.is_file, False also for names no file can have and for folders that may not be entered."""
    return os.path.isfile(path)  # noqa: PTH113


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    """All tensors the index lists, each checked to be in the shard it names."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty object under weight_map")
    shards: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        where = f"{index}: tensor {shown(name)}"
        if not is_plain_name(shard):
            raise CheckpointError(f"{where}: shard {shown(shard)} must be a file name in the same folder")
        if shard not in shards:
            if not _is_file(folder / shard):
                raise CheckpointError(f"{index}: shard {shown(shard)} is missing; fetch it again")
            shards[shard] = read_header(folder / shard)
        if name not in shards[shard]:
            raise CheckpointError(f"{where} is not in {shown(shard)}, where the index puts it")
        tensors[name] = shards[shard][name]
    for shard, held in shards.items():
        for name in held:
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shown(shard)}: holds tensor {shown(name)}, which the index does not place there"
                )
    return tensors


def is_plain_name(shard: Any) -> bool:
    """Whether it names something in the folder itself; a link there may lead out of it, as in the hub's cache."""
    return isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\\0")


def no_weights(folder: Path) -> str:
    """What a folder without safetensors holds instead, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{folder}: its weights are a pickle ({shown(pickles[0])}), which can run code when opened and is refused; "
            f"halfbyte convert {folder} OUT --format safetensors --from-pickle reads it without running any"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f"; found only {shown(', '.join(others))}" if others else ""
    if any(name.endswith(".gguf") for name in others):
        found += "; of a GGUF file name the file itself"
    return f"{folder}: holds no model.safetensors and no model.safetensors.index.json{found}"
