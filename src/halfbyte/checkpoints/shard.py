"""One safetensors file, written tensor by tensor without knowing what follows.

The header comes first in the file but is known last. So a shard that stays small is held and written whole; one that
grows beyond `SPILL_BYTES` gets a header of fixed room, padded with spaces as the format allows, filled in at the end:

    small   [n] header                 tensors
    large   [n] header + spaces (1 MiB) tensors → appended as they come

Memory is `SPILL_BYTES` and one tensor, whatever the size of the shard. The safetensors library's `save_file` needs the
whole shard, and a copy of it.

Tensors whose bytes are no multiple of 8 wait for the end, widest elements first: the format allows no gaps, and an
unaligned tensor could not be mapped.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from halfbyte.checkpoints.header import DTYPES
from halfbyte.errors import UnsupportedError

SPILL_BYTES = 16 << 20
HEADER_ROOM = 1 << 20
ALIGNMENT = 8
METADATA = {"format": "pt"}  # what transformers demands to find

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Collects tensors into one file; nothing is valid there until `finish`.

    Args:
        path: the file; created when needed.

    Attributes:
        names: of the tensors, as they came.
        nbytes: of their data.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self.nbytes = 0
        self._entries: dict[str, Any] = {}  # of tensors whose place is known
        self._offset = 0
        self._held: list[tuple[str, torch.Tensor]] = []
        self._held_bytes = 0
        self._unaligned: list[tuple[str, torch.Tensor]] = []
        self._header_bytes = 100  # at most: "__metadata__", braces, padding
        self._file: BinaryIO | None = None
        self._room = 0

    def has_room(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header, once its room is fixed, can take one more tensor."""
        return self._file is None or self._header_bytes + _entry_bytes(name, tensor) <= self._room

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; its bytes are read before this returns or copied.

        Raises:
            UnsupportedError: a dtype or layout safetensors has no name for.
            OSError: the disk says no.
        """
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided or tensor.is_meta:
            raise UnsupportedError(f"tensor {name}: safetensors holds no {tensor.dtype}, {tensor.layout} tensors")
        self.names.append(name)
        self.nbytes += tensor.nbytes
        self._header_bytes += _entry_bytes(name, tensor)
        if tensor.nbytes % ALIGNMENT:
            self._unaligned.append((name, tensor.detach().cpu().clone()))
        elif self._file is not None:
            self._append(name, tensor)
        elif self._held_bytes + tensor.nbytes <= SPILL_BYTES:
            self._held.append((name, tensor.detach().cpu().clone()))
            self._held_bytes += tensor.nbytes
        else:
            self._spill()
            self._append(name, tensor)

    def finish(self) -> None:
        """Write what was held, then the header. The file is complete, though perhaps only in the page cache."""
        rest = [*self._held, *sorted(self._unaligned, key=lambda item: -item[1].element_size())]
        for name, tensor in rest if self._file is None else rest[len(self._held) :]:
            self._place(name, tensor)
        header = json.dumps({"__metadata__": METADATA, **self._entries}, ensure_ascii=False).encode()
        size = self._room - 8 if self._file is not None else -(-len(header) // ALIGNMENT) * ALIGNMENT
        prefix = struct.pack("<Q", size) + header.ljust(size)
        if self._file is None:
            with self.path.open("wb") as file:
                file.write(prefix)
                _write(file, rest)
            return
        _write(self._file, rest[len(self._held) :])
        self._file.seek(0)
        self._file.write(prefix)
        self.close()

    def close(self) -> None:
        """Give the file back, finished or not."""
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        """From here on everything goes to disk at once; the header gets its room."""
        self._room = HEADER_ROOM + -(-self._header_bytes // 4096) * 4096
        self._file = self.path.open("wb")
        self._file.seek(self._room)
        for name, tensor in self._held:
            self._append(name, tensor)
        self._held.clear()

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        assert self._file is not None
        self._place(name, tensor)
        _write(self._file, [(name, tensor)])

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        end = self._offset + tensor.nbytes
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end


def save_file(shard: ShardWriter) -> None:
    """`shard.finish()`, by the name under which the writer's last step can be made to fail."""
    shard.finish()


def _entry_bytes(name: str, tensor: torch.Tensor) -> int:
    """At most what the header needs for a tensor: name, dtype, every dimension, two offsets of 19 digits."""
    return len(json.dumps(name)) + 22 * tensor.ndim + 120


def _write(file: BinaryIO, tensors: list[tuple[str, torch.Tensor]]) -> None:
    for _, tensor in tensors:
        if tensor.numel():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
