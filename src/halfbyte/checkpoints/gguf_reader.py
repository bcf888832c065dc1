"""A GGUF file, opened: metadata by type, tensors when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from halfbyte.checkpoints.gguf_header import GgufTensor, read_gguf_header
from halfbyte.checkpoints.header import shown
from halfbyte.errors import CheckpointError, UnsupportedError

# Rows are turned into floats so many bytes of them at a time.
CHUNK_BYTES = 64 << 20
PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_T = TypeVar("_T")


class GgufFile:
    """A GGUF file whose header was read and found sound.

    Attributes:
        path: of the file.
        metadata: as it stands in the file.
        tensors: by GGUF's names.

    Raises:
        CheckpointError: the header is not as the format demands.
        UnsupportedError: the file is one of several.
    """

    def __init__(self, path: Path):
        header = read_gguf_header(path)
        self.path, self.metadata, self.tensors = path, header.metadata, header.tensors
        parts = self.whole("split.count", 1)
        if parts > 1:
            raise UnsupportedError(f"{path}: is one of {parts} files; join them first: llama-gguf-split --merge")

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.text("general.architecture")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number that is not negative."""
        value = self._get(key, default)
        if type(value) is not int or value < 0:
            raise self._unexpected(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; of a float32 the shortest decimal that it rounds to, which is the one that was meant."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise self._unexpected(key, "a finite number", value)
        return float(str(np.float32(value))) if np.float32(value) == value else float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if type(value) is not str:
            raise self._unexpected(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.metadata.get(key, default)
        if type(value) is not bool:
            raise self._unexpected(key, "a boolean", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(type(item) is str for item in value):
            raise self._unexpected(key, "an array of strings", value)
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of `count` finite numbers."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray) or value.shape != (count,) or not np.isfinite(value).all():
            raise self._unexpected(key, f"an array of {count:,} finite numbers", value)
        found: list[float] = value.tolist()
        return found

    def _get(self, key: str, default: _T | None) -> Any:
        if key not in self.metadata and default is None:
            raise CheckpointError(f"{self.path}: metadata {key}: missing")
        return self.metadata.get(key, default)

    def _unexpected(self, key: str, expected: str, value: Any) -> CheckpointError:
        found = f"{len(value):,} values" if isinstance(value, list | np.ndarray) else shown(str(value))
        return CheckpointError(f"{self.path}: metadata {key}: expected {expected}, found {found}")

    def info(self, name: str) -> GgufTensor:
        """Kind, shape and place of a tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {shown(name)}: missing") from None

    def rows(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8 [rows, row_bytes], in memory of their own.

        Raises:
            CheckpointError: not there, or the file changed or became unreadable since it was opened.
        """
        info = self.info(name)
        rows = torch.empty(info.nbytes // info.row_bytes, info.row_bytes, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(info.offset)
                done = file.readinto(rows.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error
        if done != info.nbytes:
            raise CheckpointError(f"{self.path}: ended inside tensor {shown(name)}; was it changed meanwhile?")
        return rows


def floats(rows: torch.Tensor, kind: str, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What rows of blocks stand for.

    Args:
        rows: uint8 [out, bytes], whole blocks.
        kind: of the blocks.
        name: for messages.
        dtype: of the result; None for that of bf16, fp16 and fp32, and for the rest fp16, or bf16 beyond fp16's range.

    Returns:
        [out, in].

    Raises:
        UnsupportedError: the gguf package does not decode this kind.
        CheckpointError: a number is not finite.
    """
    plain = PLAIN.get(kind)
    for wanted in (dtype or plain or torch.float16, torch.bfloat16):
        if plain is not None:
            values = rows.view(plain).to(wanted)
        else:
            values = torch.cat(
                [_decoded(part, kind, name).to(wanted) for part in torch.split(rows, _rows_at_once(rows))]
            )
        if torch.isfinite(values).all():
            return values
    raise CheckpointError(f"tensor {shown(name)}: holds numbers that are not finite; the file is damaged")


def _rows_at_once(rows: torch.Tensor) -> int:
    return max(1, CHUNK_BYTES // rows.shape[1])


def _decoded(rows: torch.Tensor, kind: str, name: str) -> torch.Tensor:
    import gguf

    try:
        with np.errstate(all="ignore"):
            return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]))
    except (NotImplementedError, ValueError):
        raise UnsupportedError(
            f"tensor {shown(name)}: {kind} is not decoded here; near it are Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and Q8_0"
        ) from None
