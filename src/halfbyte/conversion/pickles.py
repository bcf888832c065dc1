"""A model folder of old whose weights are a pickle, read as if it were safetensors, without running what it holds.

A pickle is a program. torch's reader with `weights_only` runs none of it but what makes tensors and dictionaries, and
stops at anything else; the tensors themselves are mapped from the file where its form allows that.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halfbyte.architectures.skeleton import build_skeleton
from halfbyte.architectures.stored import ModelTensors
from halfbyte.checkpoints.header import TensorInfo, shown
from halfbyte.checkpoints.reader import is_plain_name, read_config, read_json_object
from halfbyte.errors import CheckpointError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class PickledCheckpoint:
    """The tensors of `pytorch_model.bin`, or of the shards its index names. Holds one file at a time.

    Attributes:
        folder: the folder.
        config: config.json as a dictionary.
        dropped: tensors left out: each is another one's memory, and the model's config ties the two.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json; expected a Hugging Face model folder")
        self.config = read_config(folder)
        self._path: Path | None = None
        self._open: Mapping[str, torch.Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._tied: dict[str, list[str]] = {}
        for path, expected in _files(folder).items():
            self._take(path, expected)
        self.dropped = tuple(self._drop_tied())

    @property
    def total_bytes(self) -> int:
        """Of all tensors that are kept."""
        return sum(info.nbytes for info in self._infos.values())

    def names(self) -> list[str]:
        """Of all tensors that are kept, file by file."""
        return sorted(self._infos, key=lambda name: (self._infos[name].file, name))

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and file of a tensor; it has no offset that is worth knowing."""
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous."""
        return self._load(self._infos[name].file)[name].contiguous()

    def _load(self, path: Path) -> Mapping[str, torch.Tensor]:
        if self._path != path:
            self._path, self._open = None, {}  # the old file's memory goes before the new one's comes
            self._open = read_pickle(path)
            self._path = path
        return self._open

    def _take(self, path: Path, expected: list[str] | None) -> None:
        """Note what a file holds, and which tensors of it share memory."""
        tensors = self._load(path)
        for name in expected or ():
            if name not in tensors:
                raise CheckpointError(f"{self.folder / INDEX}: tensor {shown(name)} is not in {path.name}")
        for name in tensors:
            if name in self._infos or (expected is not None and name not in expected):
                raise CheckpointError(f"{path}: holds tensor {shown(name)}, which the index does not place there")
        shared: dict[Any, list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            self._infos[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), tensor.nbytes, path, 0)
            if tensor.nbytes:
                shared[tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()].append(name)
        self._tied.update({names[0]: names for names in shared.values() if len(names) > 1})

    def _drop_tied(self) -> list[str]:
        """Leave out what the model's config ties to a tensor that stays; what it does not tie is written twice."""
        if not self._tied:
            return []
        skeleton = build_skeleton(str(self.folder), torch.float32)
        own = {name for name, _ in skeleton.named_parameters(remove_duplicate=True)}
        stored = ModelTensors(skeleton, self, self._infos).stored
        dropped = []
        for names in self._tied.values():
            spare = [name for name in names if name in stored and stored[name].parameter not in own]
            if len(spare) < len(names):
                dropped += spare
        for name in dropped:
            del self._infos[name]
        return sorted(dropped)


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files, each with the tensors that the index places there; None without an index.

    Raises:
        CheckpointError: there is none, or the index is broken or leads out of the folder.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder}: holds no {SINGLE} and no {INDEX}, so there is no pickle to convert")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty object under weight_map")
    files: dict[Path, list[str] | None] = {}
    for name, shard in sorted(weight_map.items()):
        if not is_plain_name(shard):
            raise CheckpointError(
                f"{index}: tensor {shown(name)}: shard {shown(shard)} must be a file name in the same folder"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: shard {shown(shard)} is missing; fetch it again")
        placed = files.setdefault(folder / shard, [])
        assert placed is not None
        placed.append(name)
    return files


def read_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of one file by name.

    Raises:
        CheckpointError: it asks for code, is damaged, or holds something else.
    """
    try:
        # The form before torch 1.6 is no zip archive and cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises whatever it stumbles over
        code = re.search(r"(?:GLOBAL|[Uu]nsupported (?:global|class)[: ]*)\s*([\w.]+\.\w+)", str(error))
        if code is not None:
            reason = f"it asks for {shown(code[1])}, which is code and no tensor; torch refuses to run it"
        else:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"it cannot be read as a pickle of tensors ({shown(first)})"
        raise CheckpointError(f"{path}: {reason}; nothing was converted") from None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: expected a dictionary of tensors by name, found {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise CheckpointError(
                f"{path}: entry {shown(name)} is no dense tensor; expected the weights alone, a name to a tensor"
            )
    return found
