"""The header of one GGUF file, believed only where the file's own size bears it out.

    4 bytes     "GGUF"
    uint32      version, 2 or 3
    uint64      number of tensors
    uint64      number of metadata entries
    metadata    each: key, uint32 type, value. A string is a uint64 and so many bytes; an array is a uint32 type, a
                uint64 and so many values
    tensors     each: name, uint32 number of dimensions, uint64 dimensions (fastest first), uint32 type, uint64 offset
    zeros       up to a multiple of general.alignment, 32 if the metadata has none
    data        the tensors; offsets count from here

Everything is little-endian. Files come from strangers: nothing is allocated by a number that was not held against the
bytes that are left, and nothing of a name is shown before it was checked.
Source: ggml's docs/gguf.md; block sizes are those of the `gguf` package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.checkpoints.header import MAX_HEADER_BYTES, MAX_TENSOR_BYTES, shown
from halfbyte.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20
# ggml's own limits.
MAX_DIMENSIONS, MAX_NAME_BYTES = 4, 64
MAX_KEY_BYTES = 65535
# Arrays of arrays are in the specification; no known file has any.
MAX_NESTING = 4
STRING, ARRAY, BOOL = 8, 9, 7
# Type of a metadata value → its layout.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
# The fewest bytes that an entry can have: key, type, value; name, dimensions, one dimension, type, offset.
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is and what it looks like.

    Attributes:
        name: GGUF's.
        kind: of its elements or blocks: "F16", "Q4_0", "Q4_K", …
        shape: in elements, outermost dimension first, as in torch.
        row_bytes: of the last dimension.
        nbytes: of all.
        offset: of its first byte in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    row_bytes: int
    nbytes: int
    offset: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        version: of the format.
        metadata: numbers, booleans and strings; arrays of numbers as numpy arrays, others as lists.
        tensors: by their names, in the order of the file.
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and places of the tensors of one GGUF file, checked against the file's size.

    Raises:
        CheckpointError: anything about the header is not as the format demands.
    """
    try:
        with path.open("rb") as file:
            return _Parser(path, file).parse()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


@cache
def block_sizes() -> dict[int, tuple[str, int, int]]:
    """Number of a tensor type → its name, elements of a block, bytes of a block."""
    import gguf

    return {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES}


class _Parser:
    """Reads a header from its beginning; `left` is what the file still has."""

    def __init__(self, path: Path, file: BufferedReader):
        self.path, self._file = path, file
        self._size = path.stat().st_size
        self._position = 0

    def parse(self) -> GgufHeader:
        version, tensors, entries = self._counts()
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string(MAX_KEY_BYTES, "a metadata key")
            if key in metadata:
                raise self._error(f"metadata {shown(key)}: occurs twice")
            metadata[key] = self._value(f"metadata {shown(key)}")
        infos = [self._tensor() for _ in range(tensors)]
        alignment = self._alignment(metadata)
        start = -(-self._position // alignment) * alignment
        return GgufHeader(version, metadata, self._placed(infos, start, alignment))

    def _counts(self) -> tuple[int, int, int]:
        if self._take(min(4, self.left), "its magic number") != MAGIC:
            raise self._error("does not begin with GGUF; expected a GGUF file")
        raw = self._take(4, "its version")
        version = int.from_bytes(raw, "little")
        if int.from_bytes(raw, "big") in (1, *VERSIONS):
            raise self._error(
                "is big-endian; only little-endian GGUF files are read, convert it with gguf-convert-endian"
            )
        if version not in VERSIONS:
            raise self._error(f"is of version {version} of GGUF; versions 2 and 3 are read")
        tensors, entries = self._unsigned(8, "the number of tensors"), self._unsigned(8, "the number of entries")
        for count, least, what in ((tensors, _LEAST_TENSOR, "tensors"), (entries, _LEAST_ENTRY, "metadata entries")):
            if count * least > self.left:
                raise self._error(f"announces {count:,} {what} in {self.left:,} bytes; it is truncated or damaged")
        return version, tensors, entries

    @property
    def left(self) -> int:
        """Bytes of the file that were not read yet."""
        return self._size - self._position

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def _take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self._error(
                f"{what} would take {count:,} bytes, {self.left:,} are left; it is truncated or damaged, fetch it again"
            )
        if self._position + count > MAX_HEADER_BYTES:
            raise self._error(f"its header is longer than {MAX_HEADER_BYTES:,} bytes")
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._error(f"ended inside {what}; was it changed meanwhile?")
        self._position += count
        return raw

    def _unsigned(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "little")

    def _string(self, limit: int, what: str) -> str:
        length = self._unsigned(8, f"the length of {what}")
        if length > limit:
            raise self._error(f"{what} is {length:,} bytes long; at most {limit:,} are expected")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None

    def _value(self, what: str) -> Any:
        return self._typed(self._unsigned(4, f"the type of {what}"), what, 0)

    def _typed(self, kind: int, what: str, depth: int) -> Any:
        if kind == STRING:
            return self._string(MAX_HEADER_BYTES, what)
        if kind == ARRAY:
            return self._array(what, depth + 1)
        if kind not in _SCALARS:
            raise self._error(f"{what}: type {kind} is none of GGUF's 13 value types")
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self._take(dtype.itemsize, what), dtype)[0].item()
        if kind != BOOL:
            return value
        if value > 1:
            raise self._error(f"{what}: a boolean of {value}; expected 0 or 1")
        return bool(value)

    def _array(self, what: str, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise self._error(f"{what}: arrays inside arrays, more than {MAX_NESTING} deep")
        kind = self._unsigned(4, f"the type of the elements of {what}")
        count = self._unsigned(8, f"the length of {what}")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            values = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
            if kind != BOOL:
                return values
            if (values > 1).any():
                raise self._error(f"{what}: a boolean of {values.max()}; expected 0 or 1")
            return values.astype(bool)
        least = {STRING: 8, ARRAY: 12}.get(kind, 1)
        if count * least > self.left:
            raise self._error(
                f"{what}: announces {count:,} elements in {self.left:,} bytes; it is truncated or damaged"
            )
        return [self._typed(kind, what, depth) for _ in range(count)]

    def _tensor(self) -> GgufTensor:
        """One tensor, its offset not yet from the file's beginning."""
        name = self._string(MAX_NAME_BYTES, "the name of a tensor")
        what = f"tensor {shown(name)}"
        dimensions = self._unsigned(4, f"the dimensions of {what}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._error(f"{what}: has {dimensions:,} dimensions; expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._unsigned(8, f"the shape of {what}") for _ in range(dimensions))[::-1]
        number, offset = self._unsigned(4, f"the type of {what}"), self._unsigned(8, f"the offset of {what}")
        if number not in block_sizes():
            raise self._error(f"{what}: type {number} is not known; is the file newer than the gguf package here?")
        kind, elements, nbytes = block_sizes()[number]
        if 0 in shape:
            raise self._error(f"{what}: has no elements, shape {list(shape)}")
        if shape[-1] % elements:
            raise self._error(f"{what}: rows of {shape[-1]:,} elements; {kind} has blocks of {elements}")
        row_bytes = total = shape[-1] // elements * nbytes
        for size in shape[:-1]:
            total *= size
        if total > MAX_TENSOR_BYTES:
            raise self._error(f"{what}: {kind} {list(shape)} takes {total:,} bytes, more than any file has")
        return GgufTensor(name, kind, shape, row_bytes, total, offset)

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._error("metadata general.alignment: expected a power of two, 8 at least")
        return value

    def _placed(self, infos: list[GgufTensor], start: int, alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name, each inside the file, aligned, and apart from the others."""
        tensors: dict[str, GgufTensor] = {}
        for info in infos:
            what = f"tensor {shown(info.name)}"
            if info.name in tensors:
                raise self._error(f"{what}: occurs twice")
            if info.offset % alignment:
                raise self._error(f"{what}: its offset {info.offset:,} is no multiple of {alignment}")
            if start + info.offset + info.nbytes > self._size:
                raise self._error(
                    f"{what}: {info.kind} {list(info.shape)} at offset {info.offset:,} ends beyond the file's "
                    f"{self._size:,} bytes; it is truncated or damaged, fetch it again"
                )
            tensors[info.name] = GgufTensor(**{**vars(info), "offset": start + info.offset})
        end = 0
        for info in sorted(tensors.values(), key=attrgetter("offset")):
            if info.offset < end:
                raise self._error(f"tensor {shown(info.name)}: overlaps the tensor before it; the file is damaged")
            end = info.offset + info.nbytes
        return tensors
