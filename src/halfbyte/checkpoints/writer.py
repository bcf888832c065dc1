"""Atomic writing of a Hugging Face folder.

Everything goes into a hidden folder beside the target, which takes the target's name in one rename when all of it is on
the disk. A failure, or Ctrl-C, removes the hidden folder and leaves the target as it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte.errors import OutputError

# What belongs to a model beside its weights and config.json.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.*",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


class CheckpointWriter:
    """Context manager: add tensors and documents, then `commit`.

    Args:
        output_dir: the folder to be.
        overwrite: replace a checkpoint that is there already.
        source: a folder that must not be the target, because it is still being read.
        max_shard_bytes: a shard is written when the next tensor would exceed this.

    Raises:
        OutputError: the target is taken, is no folder, cannot be created, or the disk is full.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        overwrite: bool = False,
        source: Path | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ):
        self.target = Path(output_dir).absolute()
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._committed = False
        _check_target(self.target, overwrite, source)
        with _explained(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.partial-", dir=self.target.parent))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._committed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue a tensor; full shards go to disk at once."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += nbytes
        self._total_bytes += nbytes

    def add_json(self, filename: str, value: Any) -> None:
        """Write a JSON document, readable by people."""
        self.add_text(filename, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def add_text(self, filename: str, text: str) -> None:
        """Write a text file."""
        with _explained(self.target):
            (self._folder / filename).write_text(text, encoding="utf-8")

    def copy_files_from(self, folder: Path) -> None:
        """Carry over tokenizer, generation config, chat template and licence."""
        with _explained(self.target):
            for pattern in COMPANIONS:
                for path in sorted(folder.glob(pattern)):
                    if path.is_file():
                        shutil.copyfile(path, self._folder / path.name)

    def commit(self) -> None:
        """Make everything durable and visible under the target's name, in one step."""
        self._flush()
        with _explained(self.target):
            self._name_shards()
            for path in self._folder.iterdir():
                _fsync(path)
            self._folder.chmod(0o777 & ~_umask())
            _fsync(self._folder)
            self._swap_in()
            _fsync(self.target.parent)

    def _flush(self) -> None:
        if not self._pending:
            return
        with _explained(self.target, self._pending_bytes):
            save_file(self._pending, self._folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Only now is their number known, and so their names."""
        count = len(self._shards)
        if count == 1:
            (self._folder / "shard-0").rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            filename = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"shard-{number}").rename(self._folder / filename)
            weight_map.update(dict.fromkeys(names, filename))
        if count:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            self.add_json("model.safetensors.index.json", index)

    def _swap_in(self) -> None:
        if not self.target.exists():
            self._folder.rename(self.target)
            self._committed = True
            return
        # A folder cannot replace a non-empty one in one rename: the old one steps aside and goes last.
        aside = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.old-", dir=self.target.parent))
        self.target.rename(aside / "old")
        try:
            self._folder.rename(self.target)
        except OSError:
            (aside / "old").rename(self.target)
            raise
        self._committed = True
        shutil.rmtree(aside, ignore_errors=True)


def _check_target(target: Path, overwrite: bool, source: Path | None) -> None:
    """Refuse a target that is taken, before hours of work."""
    if target.is_symlink() and not target.exists():
        raise OutputError(f"output {target}: is a symbolic link to nothing; remove it or choose another folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"output {target}: is a file; choose a folder")
    if source is not None and source.resolve() == target.resolve():
        raise OutputError(f"output {target}: is the folder the model is read from; choose another one")
    if any(target.iterdir()):
        if not overwrite:
            raise OutputError(f"output {target}: exists and is not empty; choose another folder or pass --overwrite")
        if not (target / "config.json").is_file():
            raise OutputError(f"output {target}: is no model folder (no config.json), so it is not overwritten")


@contextmanager
def _explained(target: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the operating system says of a write into one line."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors wraps the error of its write in an exception of its own; only the text is left of it.
        full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            wanted = "" if needed is None else f" {needed / 1e6:,.0f} MB were to be written,"
            free = shutil.disk_usage(target.parent).free / 1e6
            message = f"output {target}: the disk is full:{wanted} {free:,.0f} MB are free; nothing was kept"
            raise OutputError(message) from error
        if isinstance(error, OSError):
            raise OutputError(f"output {target}: cannot be written ({error.strerror or error})") from error
        raise


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
