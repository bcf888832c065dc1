"""Model folders that are broken or lie, each made from a sound one by one change."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "llama"}
HUGE = b"1" + b"0" * 4000


def write_safetensors(path: Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    """A safetensors file with any header, sound or not; `length` lies about the header's size."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def model(header: Any, data: bytes = bytes(8), **settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        write_safetensors(folder / "model.safetensors", header, data, **settings)

    return make


def index(weight_map: Any, shards: dict[str, Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for name, header in shards.items():
            write_safetensors(folder / name, header, bytes(8))

    return make


def files(**contents: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, data in contents.items():
            (folder / name.replace("__", ".")).write_bytes(data)

    return make


def sound(folder: Path) -> None:
    """The folder all others are variations of."""
    model({"a": entry()})(folder)


# name → (maker, what the message must say)
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (files(model__safetensors=b""), "has no config.json"),
    "config is no JSON": (files(config__json=b"{", model__safetensors=b""), "config.json: not valid JSON"),
    "config is a list": (files(config__json=b"[]", model__safetensors=b""), "expected a JSON object, found list"),
    "config is binary": (files(config__json=b"\xff\xfe\x00", model__safetensors=b""), "config.json: not valid JSON"),
    "config is a bomb": (files(config__json=b"[" * 200_000, model__safetensors=b""), "config.json: not valid JSON"),
    "no weights": (files(config__json=b"{}"), "holds no model.safetensors"),
    "shards without an index": (
        files(**{"config__json": b"{}", "model-00001-of-00002__safetensors": b""}),
        "found only model-00001-of-00002.safetensors",
    ),
    "a pickle": (files(config__json=b"{}", pytorch_model__bin=b"\x80\x02"), "pickle .pytorch_model.bin., which can"),
    "empty file": (files(config__json=b"{}", model__safetensors=b""), "0 bytes, too short"),
    "seven bytes": (files(config__json=b"{}", model__safetensors=bytes(7)), "7 bytes, too short"),
    "a pickle renamed": (
        files(config__json=b"{}", model__safetensors=b"\x80\x02}q\x00X\x05\x00\x00\x00"),
        "announces a header",
    ),
    "header longer than the file": (model({"a": entry()}, length=10_000), "announces a header of 10,000 bytes"),
    "header of 2^63 bytes": (model({"a": entry()}, length=2**63), "announces a header of 9,223,372,036,854,775,808"),
    "header is no JSON": (model(b"{nope}", b""), "header is not valid JSON"),
    "header is not UTF-8": (model(b'{"\xff": 1}', b""), "header is not valid JSON"),
    "header is a bomb": (model(b"[" * 100_000, b""), "header is not valid JSON"),
    "header is a list": (model([], b""), "header is no JSON object"),
    "header names a tensor twice": (
        model(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
        "a key occurs twice",
    ),
    "no tensors": (model({}, b""), "hold no tensor"),
    "truncated data": (model({"a": entry()}, bytes(5)), "describes 8 bytes of tensors, the file holds 5"),
    "data after the end": (model({"a": entry()}, bytes(9)), "describes 8 bytes of tensors, the file holds 9"),
    "offsets outside": (model({"a": entry(offsets=(8, 16))}), "tensor a leaves a gap before it"),
    "offsets reversed": (model({"a": entry(offsets=(8, 0))}), "data_offsets span -8"),
    "offsets negative": (model({"a": entry(offsets=(-8, 0))}), "lists of non-negative 63-bit integers"),
    "offsets are floats": (model({"a": entry(offsets=(0.0, 8.0))}), "lists of non-negative 63-bit integers"),
    "offsets are booleans": (model({"a": entry(offsets=(False, True))}), "lists of non-negative 63-bit integers"),
    "three offsets": (model({"a": entry(offsets=(0, 4, 8))}), "lists of non-negative 63-bit integers"),
    "overlap": (
        model({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "tensor b overlaps the tensor before it",
    ),
    "gap": (model({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "tensor b leaves a gap before it"),
    "shape larger than data": (model({"a": entry(shape=(3,))}), r"F32 \[3\] takes 12 bytes, its data_offsets span 8"),
    "shape that overflows": (model({"a": entry(shape=(2**40, 2**40))}), "its data_offsets span 8"),
    "shape that wraps to the size": (model({"a": entry(shape=(2**62 + 2,))}), "its data_offsets span 8"),
    "negative shape": (model({"a": entry(shape=(-2,))}), "lists of non-negative 63-bit integers"),
    "shape of text": (model({"a": entry(shape=("2",))}), "lists of non-negative 63-bit integers"),
    "dimensions of 4000 digits": (
        model(b'{"a":{"dtype":"F32","shape":[%b,%b],"data_offsets":[0,8]}}' % (HUGE, HUGE)),
        "lists of non-negative 63-bit integers",
    ),
    "empty but of absurd width": (model({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""), "takes 0 bytes"),
    "empty but beyond 64 bits": (model({"a": entry(shape=(0, 2**64), offsets=(0, 0))}, b""), "63-bit integers"),
    "a thousand dimensions": (model({"a": entry(shape=[1] * 999, offsets=(0, 4))}, bytes(4)), "has 999 dimensions"),
    "name of two lines": (model({"a\nb\x1b[2J": entry(shape=(3,))}), r"tensor 'a\\nb\\x1b\[2J': F32 \[3\] takes"),
    "name that is no text": (model({"a\ud800": entry()}), "header is not valid JSON"),
    "name of a megabyte": (model({"a" * 1_000_000: entry(shape=(3,))}), "tensor a{200}…: F32"),
    "header in UTF-16": (model(json.dumps({"a": entry()}).encode("utf-16")), "header is not valid JSON"),
    "header with a byte order mark": (
        model(b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode()),
        "header is not valid JSON",
    ),
    "metadata is a number": (model({"__metadata__": 3, "a": entry()}), "__metadata__ must be an object of strings"),
    "metadata of numbers": (model({"__metadata__": {"x": 3}, "a": entry()}), "__metadata__ must be an object of str"),
    "dtype of two lines": (model({"a": entry(dtype="F\n4")}), r"dtype 'F\\n4' is not supported"),
    "unknown dtype": (model({"a": entry(dtype="F4")}), "dtype F4 is not supported"),
    "dtype is a list": (model({"a": entry(dtype=["F32"])}), "is not supported"),  # type: ignore[arg-type]
    "entry is a number": (model({"a": 3}), "expected exactly data_offsets, dtype, shape"),
    "entry with more keys": (model({"a": {**entry(), "x": 1}}), "expected exactly data_offsets, dtype, shape"),
    "index without a map": (index(None, {}), "expected a non-empty object under weight_map"),
    "index is empty": (index({}, {}), "expected a non-empty object under weight_map"),
    "missing shard": (index({"a": "s1"}, {}), "shard s1 is missing"),
    "shard outside the folder": (index({"a": "../s1"}, {}), "must be a file name in the same folder"),
    "shard at an absolute path": (index({"a": "/etc/passwd"}, {}), "must be a file name in the same folder"),
    "shard is the parent": (index({"a": ".."}, {}), "must be a file name in the same folder"),
    "shard in a folder below": (index({"a": "x/s1"}, {}), "must be a file name in the same folder"),
    "shard with a null byte": (index({"a": "s1\0"}, {}), "must be a file name in the same folder"),
    "shard name too long for a file": (index({"a": "s" * 300}, {}), "shard s+… is missing"),
    "shard name of two lines": (index({"a": "s\n1"}, {}), r"shard 's\\n1' is missing"),
    "shard is a number": (index({"a": 1}, {}), "must be a file name in the same folder"),
    "tensor not in its shard": (index({"b": "s1"}, {"s1": {"a": entry()}}), "tensor b is not in s1"),
    "tensor the index forgot": (
        index({"a": "s1"}, {"s1": {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(4, 8))}}),
        "holds tensor b, which the index does not place there",
    ),
    "tensor in two shards": (
        index({"a": "s1", "b": "s2"}, {"s1": {"a": entry()}, "s2": {
            "a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(1,), offsets=(4, 8))}}),
        "holds tensor a, which the index does not place there",
    ),
}  # fmt: skip
