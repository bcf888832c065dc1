"""GGUF files that are broken or lie, each made from a sound one by one change."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

U8, BOOL, U32, F32, STRING, ARRAY, U64 = 0, 7, 4, 6, 8, 9, 10
Q4_0, TYPE_F32 = 2, 0
ALIGNMENT = 32


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata entry of any type, its value as it is to stand in the file."""
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(
    name: str | bytes = "a", shape: tuple[int, ...] = (2,), kind: int = TYPE_F32, offset: int = 0, **lies: int
) -> bytes:
    """The entry of a tensor, dimensions in the file's order."""
    dimensions = struct.pack("<I", lies.get("dimensions", len(shape))) + b"".join(struct.pack("<Q", n) for n in shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def file(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(64),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    order: str = "<",
) -> bytes:
    """A GGUF file with any header, sound or not; `counts` lies about tensors and entries."""
    numbers = counts or (len(tensors), len(entries))
    header = magic + struct.pack(f"{order}IQQ", version, *numbers) + b"".join(entries) + b"".join(tensors)
    return header.ljust(-(-len(header) // ALIGNMENT) * ALIGNMENT, b"\0") + data


def sound() -> bytes:
    """The file all others are variations of."""
    return file((entry("general.architecture", STRING, string("llama")),), (tensor(),), struct.pack("<2f", 1.0, 2.0))


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(U8, 1, b"\x07")


def _entry(kind: int, value: bytes) -> Callable[[], bytes]:
    return lambda: file((entry("k", kind, value),))


def _tensors(*tensors: bytes, **settings: Any) -> Callable[[], bytes]:
    return lambda: file((), tensors, **settings)


# name → (its bytes, what the message must say)
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "does not begin with GGUF"),
    "three bytes": (lambda: b"GGU", "does not begin with GGUF"),
    "another magic": (lambda: file(magic=b"GGML"), "does not begin with GGUF"),
    "a pickle renamed": (lambda: b"\x80\x02}q\x00X\x05\x00\x00\x00" * 9, "does not begin with GGUF"),
    "nothing but magic": (lambda: b"GGUF", "its version would take 4 bytes, 0 are left"),
    "no counts": (lambda: b"GGUF\x03\0\0\0", "the number of tensors would take 8 bytes, 0 are left"),
    "version 0": (lambda: file(version=0), "is of version 0 of GGUF; versions 2 and 3 are read"),
    "version 1": (lambda: file(version=1), "is of version 1 of GGUF"),
    "version 4": (lambda: file(version=4), "is of version 4 of GGUF"),
    "big-endian": (lambda: file(order=">"), "is big-endian"),
    "2^60 tensors": (lambda: file(counts=(1 << 60, 0)), "announces 1,152,921,504,606,846,976 tensors in 72 bytes"),
    "2^60 entries": (lambda: file(counts=(0, 1 << 60)), "announces 1,152,921,504,606,846,976 metadata entries"),
    "2^64 - 1 of both": (lambda: file(counts=((1 << 64) - 1, (1 << 64) - 1)), "announces 18,446,744,073"),
    "one entry too many": (
        lambda: file((entry("k", U8, b"\1"),), counts=(0, 2))[:38],
        "announces 2 metadata entries in 14 bytes",
    ),
    "a key of 2^60 bytes": (lambda: file((string("k", 1 << 60) + bytes(5),)), "a metadata key is 1,152,921,504,606"),
    "a key longer than the file": (lambda: file((string("k", 60_000) + bytes(5),)), "a metadata key would take 60,000"),
    "a key that is no text": (lambda: file((entry(b"\xff\xfe", U8, b"\1"),)), "a metadata key is not UTF-8"),
    "a key twice": (lambda: file((entry("k", U8, b"\1"), entry("k", U8, b"\2"))), "metadata k: occurs twice"),
    "a key with a line": (lambda: file((entry("a\nb", 13, b"\1"),)), r"metadata 'a\\nb': type 13 is none"),
    "an unknown value type": (_entry(13, bytes(8)), "metadata k: type 13 is none of GGUF's 13 value types"),
    "value type 2^32 - 1": (_entry(0xFFFFFFFF, bytes(8)), "type 4294967295 is none"),
    "a value that ends early": (
        lambda: file((entry("k", U64, bytes(7)),))[:44],
        "metadata k would take 8 bytes, 7 are left",
    ),
    "a string of 2^60 bytes": (_entry(STRING, string("v", 1 << 60)), "metadata k is 1,152,921,504,606,846,976 bytes"),
    "a string longer than the file": (_entry(STRING, string("v", 9_999)), "metadata k would take 9,999 bytes"),
    "a string that is no text": (_entry(STRING, string(b"\xc3\x28")), "metadata k is not UTF-8"),
    "a boolean of 2": (_entry(BOOL, b"\2"), "metadata k: a boolean of 2"),
    "an array of booleans with a 9": (_entry(ARRAY, array(BOOL, 2, b"\1\x09")), "a boolean of 9"),
    "an array of 2^60 floats": (_entry(ARRAY, array(F32, 1 << 60)), "would take 4,611,686,018,427,387,904 bytes"),
    "an array of 2^64 - 1 floats": (_entry(ARRAY, array(F32, (1 << 64) - 1)), "would take 73,786,976,294,838,206,460"),
    "an array of 2^60 strings": (_entry(ARRAY, array(STRING, 1 << 60)), "announces 1,152,921,504,606,846,976 elements"),
    "an array of 2^60 arrays": (_entry(ARRAY, array(ARRAY, 1 << 60)), "announces 1,152,921,504,606,846,976 elements"),
    "an array of nothing known": (_entry(ARRAY, array(77, 2)), "type 77 is none of GGUF's 13 value types"),
    "2^60 of nothing known": (_entry(ARRAY, array(77, 1 << 60)), "announces 1,152,921,504,606,846,976 elements"),
    "arrays five deep": (_entry(ARRAY, nested(4)), "arrays inside arrays, more than 4 deep"),
    "arrays 9,000 deep": (_entry(ARRAY, nested(9_000)), "arrays inside arrays, more than 4 deep"),
    "alignment 0": (lambda: file((entry("general.alignment", U32, bytes(4)),)), "expected a power of two"),
    "alignment 48": (lambda: file((entry("general.alignment", U32, b"\x30\0\0\0"),)), "expected a power of two"),
    "alignment 2^31": (lambda: file((entry("general.alignment", U32, b"\0\0\0\x80"),)), "expected a power of two"),
    "alignment in words": (
        lambda: file((entry("general.alignment", STRING, string("32")),)),
        "expected a power of two",
    ),
    "a name of 65 bytes": (_tensors(tensor("n" * 65)), "the name of a tensor is 65 bytes long; at most 64"),
    "a name of 2^60 bytes": (_tensors(string("n", 1 << 60) + bytes(24)), "the name of a tensor is 1,152,921,504"),
    "a name that is no text": (_tensors(tensor(b"\xff")), "the name of a tensor is not UTF-8"),
    "a name with a line": (_tensors(tensor("a\nb", kind=99)), r"tensor 'a\\nb': type 99 is not known"),
    "no dimensions": (_tensors(tensor(shape=(), dimensions=0)), "has 0 dimensions; expected 1 to 4"),
    "five dimensions": (_tensors(tensor(shape=(1, 1, 1, 1, 1))), "has 5 dimensions; expected 1 to 4"),
    "2^32 - 1 dimensions": (_tensors(tensor(dimensions=0xFFFFFFFF)), "has 4,294,967,295 dimensions"),
    "an unknown tensor type": (_tensors(tensor(kind=99)), "tensor a: type 99 is not known"),
    "a type taken away": (_tensors(tensor(shape=(32,), kind=4)), "tensor a: type 4 is not known"),
    "a row that ends inside a block": (
        _tensors(tensor(shape=(33,), kind=Q4_0)),
        "rows of 33 elements; Q4_0 has blocks",
    ),
    "no elements": (_tensors(tensor(shape=(0,))), r"tensor a: has no elements, shape \[0\]"),
    "no rows": (_tensors(tensor(shape=(32, 0))), r"tensor a: has no elements, shape \[0, 32\]"),
    "a shape that overflows": (_tensors(tensor(shape=(1 << 40, 1 << 40))), "more than any file has"),
    "a shape that wraps to nothing": (_tensors(tensor(shape=(1 << 32, 1 << 32, 1 << 32))), "more than any file has"),
    "a shape larger than the file": (_tensors(tensor(shape=(17,))), "ends beyond the file's 128 bytes"),
    "an offset outside": (_tensors(tensor(offset=64)), "at offset 64 ends beyond the file's"),
    "an offset of 2^63": (_tensors(tensor(offset=1 << 63)), "ends beyond the file's 128 bytes"),
    "an offset that wraps": (_tensors(tensor(offset=(1 << 64) - 32)), "ends beyond the file's"),
    "a misaligned offset": (_tensors(tensor(offset=4)), "its offset 4 is no multiple of 32"),
    "the same offset twice": (_tensors(tensor("a"), tensor("b")), "tensor b: overlaps the tensor before it"),
    "an overlap": (_tensors(tensor("a", (9,)), tensor("b", offset=32)), "tensor b: overlaps the tensor before it"),
    "a name twice": (_tensors(tensor("a"), tensor("a", offset=32)), "tensor a: occurs twice"),
    "data cut off": (lambda: sound()[:-1], "ends beyond the file's"),
    "tensors cut off": (lambda: sound()[:100], "the offset of tensor a would take 8 bytes, 6 are left"),
}
