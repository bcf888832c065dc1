"""Atomic writing of a Hugging Face folder.

Everything goes into a hidden folder beside the target, which takes the target's name in one rename when all of it is on
the disk. A failure, or Ctrl-C, removes the hidden folder and leaves the target as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from halfbyte.checkpoints.disk import ensure_space, fsync, umask, writes_explained
from halfbyte.checkpoints.shard import ShardWriter, save_file
from halfbyte.errors import OutputError

__all__ = ["CheckpointWriter", "ensure_space"]

# What belongs to a model beside its weights and config.json.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.*",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


class CheckpointWriter:
    """Context manager: add tensors and documents, then `commit`.

    Tensors go to disk as they come: memory stays at a few MiB and one tensor (`shard.py`).

    Args:
        output_dir: the folder to be; a link to a folder stands for that folder.
        overwrite: replace a checkpoint that is there already.
        source: a folder that must not be the target, because it is still being read.
        max_shard_bytes: the next shard begins where a tensor would exceed this.
        hidden_folder: take this name on the target's file system for the hidden folder, and remove what stands there;
            None for a name no one has.

    Attributes:
        target: the folder to be, links followed.
        sha256: of the bytes of each tensor so far, by its name, in hexadecimal; for the manifest.
        nbytes: of the tensors so far.

    Raises:
        OutputError: the target is taken, is no folder, cannot be created, or the disk is full.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        overwrite: bool = False,
        source: Path | None = None,
        max_shard_bytes: int = 2_000_000_000,
        hidden_folder: Path | None = None,
    ):
        self._overwrite = overwrite
        self._source = source
        self._max_shard_bytes = max_shard_bytes
        self._shard: ShardWriter | None = None
        self._shards: list[list[str]] = []
        self.sha256: dict[str, str] = {}
        self.nbytes = 0
        self._committed = False
        self.target = real_target(output_dir)
        check_target(self.target, overwrite, source)
        with writes_explained(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if hidden_folder is None:
                hidden_folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.partial-", dir=self.target.parent))
            else:
                shutil.rmtree(hidden_folder, ignore_errors=True)
                hidden_folder.mkdir()
            self._folder = hidden_folder

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.close()
        if not self._committed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor. The caller may change or free it afterwards.

        Raises:
            OutputError: the disk is full or refuses.
            UnsupportedError: safetensors has no such dtype.
            ValueError: the name was used before.
        """
        if name in self.sha256:
            raise ValueError(f"tensor {name}: added twice")
        shard = self._shard
        if shard and (shard.nbytes + tensor.nbytes > self._max_shard_bytes or not shard.has_room(name, tensor)):
            self._finish_shard()
        with writes_explained(self.target, tensor.nbytes):
            if self._shard is None:
                self._shard = ShardWriter(self._folder / f"shard-{len(self._shards)}")
            self._shard.add(name, tensor)
        self.sha256[name] = tensor_hash(tensor)
        self.nbytes += tensor.nbytes

    @property
    def shards(self) -> int:
        """Files that hold tensors; all of them once this is committed."""
        return len(self._shards)

    def add_json(self, filename: str, value: Any) -> None:
        """Write a JSON document, readable by people.

        Infinity stays what Python and transformers write for it: it occurs in real config.json files (Mamba's
        `time_step_limit`), and what was read there must not fail to be written hours later.
        """
        self.add_text(filename, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def add_text(self, filename: str, text: str) -> None:
        """Write a text file."""
        with writes_explained(self.target):
            (self._folder / filename).write_text(text, encoding="utf-8")

    def copy_files_from(self, folder: Path) -> None:
        """Carry over tokenizer, generation config, chat template and licence."""
        with writes_explained(self.target):
            for pattern in COMPANIONS:
                for path in sorted(folder.glob(pattern)):
                    if path.is_file():
                        shutil.copyfile(path, self._folder / path.name)

    def commit(self) -> None:
        """Make everything durable and visible under the target's name, in one step.

        Raises:
            OutputError: the disk refuses, or someone else has put something there in the meantime.
        """
        self._finish_shard()
        with writes_explained(self.target):
            self._name_shards()
            for path in self._folder.iterdir():
                fsync(path)
            self._folder.chmod(0o777 & ~umask())
            fsync(self._folder)
            self._swap_in()
            fsync(self.target.parent)

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        with writes_explained(self.target, self._shard.nbytes):
            save_file(self._shard)
        self._shards.append(self._shard.names)
        self._shard = None

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
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            self.add_json("model.safetensors.index.json", index)

    def _swap_in(self) -> None:
        try:
            self._folder.rename(self.target)  # takes the place of nothing, or of an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # What is there may not be what was there when the work began.
            check_target(self.target, self._overwrite, self._source)
            self._replace()
        self._committed = True

    def _replace(self) -> None:
        """A folder cannot replace a non-empty one in one rename: the old one steps aside and goes last."""
        aside = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.old-", dir=self.target.parent))
        old = aside / "old"
        try:
            self.target.rename(old)
            self._folder.rename(self.target)
        finally:  # also on Ctrl-C between the two
            if old.exists() and not self.target.exists():
                old.rename(self.target)
            shutil.rmtree(aside, ignore_errors=True)


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in order, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def real_target(output_dir: str | Path) -> Path:
    """The folder that `output_dir` names, links followed.

    A hidden folder beside the link could be on another disk, and a rename would replace the link.

    Raises:
        OutputError: no folder can have that name, or a link leads nowhere.
    """
    path = Path(output_dir).absolute()
    if "\0" in str(path):
        raise OutputError("output: a folder's name cannot contain a null byte")
    with writes_explained(path):
        if path.is_symlink() and not path.exists():
            raise OutputError(f"output {path}: is a symbolic link to nothing; remove it or choose another folder")
        return Path(os.path.realpath(path))


def check_target(target: Path, overwrite: bool, source: Path | None) -> None:
    """Refuse a target that is taken, before hours of work.

    Args:
        target: from `real_target`; need not exist.
        overwrite: a checkpoint may stand there.
        source: a folder that must not be the target.

    Raises:
        OutputError: it cannot, or must not, be replaced.
    """
    with writes_explained(target):
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"output {target}: is a file; choose a folder")
        if source is not None and source.resolve() == target:
            raise OutputError(f"output {target}: is the folder the model is read from; choose another one")
        if any(target.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"output {target}: exists and is not empty; choose another folder or pass --overwrite"
                )
            if not (target / "config.json").is_file():
                raise OutputError(f"output {target}: is no model folder (no config.json), so it is not overwritten")
        for here, what in ((".", "the current folder"), ("~", "your home folder")):
            if Path(os.path.realpath(os.path.expanduser(here))).is_relative_to(target):  # noqa: PTH111  (Path's raises)
                raise OutputError(
                    f"output {target}: is or contains {what}, which would be replaced; name a folder in it"
                )
        if target.is_mount():
            raise OutputError(f"output {target}: is a mount point, which no rename can replace; name a folder in it")
