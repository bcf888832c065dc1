"""The header of one safetensors file, believed only where the file's own size bears it out.

    8 bytes   n, little-endian: the size of the header
    n bytes   JSON: {"name": {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
    the rest  the tensors, without gaps or overlaps; offsets count from here

Files come from strangers: nothing is allocated, and nothing of a name is shown, before it was checked.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CheckpointError

# The safetensors format's own limit.
MAX_HEADER_BYTES = 100_000_000
# What torch can address and index.
MAX_TENSOR_BYTES = 2**63 - 1
MAX_DIMENSIONS = 64

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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
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


def shown(value: object) -> str:
    """A value out of a file as it may stand in a message: one line, no control characters, not too long."""
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    text = value[:200] if value[:200].isprintable() else ascii(value[:200])
    return text if len(value) <= 200 else text + "…"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and places of the tensors of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: anything about the header is not as the format demands.
    """
    header, data_start, data_bytes = _parse(path)
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
            raise CheckpointError(f"{path}: tensor {shown(name)} {what}; the file is damaged, fetch it again")
        expected = begin + nbytes
    if expected != data_bytes:
        raise CheckpointError(
            f"{path}: header describes {expected:,} bytes of tensors, the file holds {data_bytes:,}; "
            f"it is truncated or damaged, fetch it again"
        )
    return tensors


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
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
        # Decoded here because `json.loads` would guess UTF-16 and accept a byte order mark.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the safetensors header's __metadata__ must be an object of strings")
    return header, 8 + length, size - 8 - length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    for key in result:
        key.encode("utf-8")  # "\ud800" is JSON but no text, and could not be printed
    return result


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_TENSOR_BYTES for item in value)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One header entry, its byte range checked against its shape and dtype."""
    where = f"{path}: tensor {shown(name)}"
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise CheckpointError(f"{where}: expected exactly {', '.join(sorted(keys))} in its header entry")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{where}: dtype {shown(entry['dtype'])} is not supported; known are {', '.join(DTYPES)}")
    if not _naturals(entry["shape"]) or not _naturals(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{where}: shape and data_offsets must be lists of non-negative 63-bit integers")
    if len(entry["shape"]) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: has {len(entry['shape'])} dimensions; at most {MAX_DIMENSIONS} are supported")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    # An empty tensor may not be absurd either: torch computes strides from the dimensions that are not zero.
    volume = dtype.itemsize
    for size in shape:
        volume *= max(size, 1)
    nbytes = 0 if 0 in shape else volume
    if volume > MAX_TENSOR_BYTES or end - begin != nbytes:
        raise CheckpointError(
            f"{where}: {entry['dtype']} {list(shape)} takes {nbytes:,} bytes, its data_offsets span {end - begin:,}"
        )
    return TensorInfo(dtype, shape, nbytes, path, data_start + begin)
