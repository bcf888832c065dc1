"""Lazy reading of a Hugging Face folder: one safetensors tensor at a time.

Files come from strangers. A header is checked against the file it stands in before anything is allocated: its length,
its offsets (inside the file, ascending, without gaps or overlaps) and the size each shape implies.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError, ModelNotFoundError

# The safetensors format's own limit.
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like.

    Attributes:
        dtype: of its elements.
        shape: outermost dimension first.
        nbytes: on disk and in memory.
        file: the safetensors file.
        offset: of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class Checkpoint:
    """A model folder whose headers were read and found sound; tensors are read when asked for.

    Attributes:
        folder: the folder.
        config: config.json as a dictionary.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]):
        self.folder = folder
        self.config = config
        self._tensors = tensors

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and every safetensors header.

        Raises:
            ModelNotFoundError: no such folder, or none with a config.json.
            CheckpointError: a file is missing, truncated, malformed or contradicts another.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelNotFoundError(f"{folder}: no such folder")
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{folder}: has no config.json; expected a Hugging Face model folder")
        config = read_json_object(folder / "config.json")
        tensors: dict[str, TensorInfo] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            tensors = _read_sharded(folder, index)
        elif (folder / "model.safetensors").is_file():
            tensors = read_header(folder / "model.safetensors")
        else:
            raise CheckpointError(_no_weights(folder))
        if not tensors:
            raise CheckpointError(f"{folder}: its safetensors hold no tensor")
        return cls(folder, config, tensors)

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
            raise CheckpointError(f"tensor {name}: not in {self.folder}") from None

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
        data = bytearray(info.nbytes)
        try:
            with info.file.open("rb") as file:
                file.seek(info.offset)
                done = file.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read ({error.strerror})") from error
        if done != info.nbytes:
            raise CheckpointError(f"{info.file}: ended inside tensor {name}; it changed while it was open")
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(info.dtype).reshape(info.shape)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and places of the tensors of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: anything about the header is not as the format demands.
    """
    header, data_start, data_bytes = _parse_header(path)
    tensors = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info = _tensor_info(path, name, entry, data_start)
        spans.append((info.offset - data_start, info.nbytes, name))
        tensors[name] = info
    expected = 0
    for begin, nbytes, name in sorted(spans):
        if begin != expected:
            what = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name} {what}; the file is damaged, fetch it again")
        expected = begin + nbytes
    if expected != data_bytes:
        raise CheckpointError(
            f"{path}: header describes {expected:,} bytes of tensors, the file holds {data_bytes:,}; "
            f"it is truncated or damaged, fetch it again"
        )
    return tensors


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins and how many bytes of it there are."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors header; fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: announces a header of {length:,} bytes in a file of {size:,}; "
                    f"it is truncated or no safetensors file, fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is no JSON object")
    return header, 8 + length, size - 8 - length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One header entry, its byte range checked against its shape and dtype."""

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise CheckpointError(f"{path}: tensor {name}: expected exactly {', '.join(sorted(keys))} in its header entry")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name}: dtype {entry['dtype']!r} is not supported; known are {', '.join(DTYPES)}"
        )
    if not naturals(entry["shape"]) or not naturals(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{path}: tensor {name}: shape and data_offsets must be lists of non-negative integers")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    nbytes = math.prod(shape) * dtype.itemsize  # Python integers: no shape overflows this product
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name}: {entry['dtype']} {list(shape)} takes {nbytes:,} bytes, "
            f"its data_offsets span {end - begin:,}"
        )
    return TensorInfo(dtype, shape, nbytes, path, data_start + begin)


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    """All tensors the index lists, each checked to be in the shard it names."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty object under weight_map")
    shards: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or shard in (".", ".."):
            raise CheckpointError(f"{index}: tensor {name}: shard {shard!r} must be a file name in the same folder")
        if shard not in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(f"{index}: shard {shard} is missing; fetch it again")
            shards[shard] = read_header(folder / shard)
        if name not in shards[shard]:
            raise CheckpointError(f"{index}: tensor {name} is not in {shard}, where the index puts it")
        tensors[name] = shards[shard][name]
    for shard, held in shards.items():
        for name in held:
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{folder / shard}: holds tensor {name}, which the index does not place there")
    return tensors


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run code when opened and is refused; "
            f"convert it to safetensors first"
        )
    return f"{folder}: holds no model.safetensors and no model.safetensors.index.json"
