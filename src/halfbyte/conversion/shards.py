"""The safetensors of a folder with everything that is wrong with them, where `Checkpoint.open` stops at the first."""

from __future__ import annotations

from pathlib import Path

from halfbyte.checkpoints.header import TensorInfo, read_header, shown
from halfbyte.checkpoints.reader import is_plain_name, no_weights, read_json_object
from halfbyte.conversion.verification import Check
from halfbyte.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_files(folder: Path, check: Check) -> tuple[dict[str, TensorInfo], bool]:
    """The tensors that can be read, and whether every file could be: what is missing otherwise may be in one of those.

    Args:
        folder: of the model.
        check: filled with what is wrong.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if SINGLE in present:
        if (folder / INDEX).is_file():
            check.notes.append(f"{INDEX} beside {SINGLE}: loaders take the file and pass the index over")
        held = _header(folder / SINGLE, check)
        tensors, used, complete = held or {}, {SINGLE}, held is not None
    elif (folder / INDEX).is_file():
        tensors, used, complete = _sharded(folder, check)
    else:
        check.problems.append(no_weights(folder))
        return {}, False
    for name in sorted(present - used):
        check.notes.append(f"{shown(name)}: belongs to no checkpoint; loaders that take every file will read it, too")
    nbytes = sum(info.nbytes for info in tensors.values())
    files = "1 file" if len(used) == 1 else f"{len(used)} files"
    check.detail = f"{len(tensors)} tensors, {nbytes / 1e6:,.1f} MB in {files}"
    return tensors, complete


def _header(path: Path, check: Check) -> dict[str, TensorInfo] | None:
    try:
        return read_header(path)
    except CheckpointError as error:
        check.problems.append(str(error))
        return None


def _sharded(folder: Path, check: Check) -> tuple[dict[str, TensorInfo], set[str], bool]:
    """Tensors as the index places them, the files that could be read, and whether those are all it names."""
    try:
        weight_map = read_json_object(folder / INDEX).get("weight_map")
    except CheckpointError as error:
        check.problems.append(str(error))
        return {}, set(), False
    if not isinstance(weight_map, dict) or not weight_map:
        check.problems.append(f"{INDEX}: expected a non-empty object under weight_map")
        return {}, set(), False
    shards: dict[str, dict[str, TensorInfo]] = {}
    named = sorted({str(shard) for shard in weight_map.values()})
    for shard in named:
        if not is_plain_name(shard):
            check.problems.append(f"{INDEX}: shard {shown(shard)} must be a file name in the same folder")
        elif not (folder / shard).is_file():
            placed = sum(where == shard for where in weight_map.values())
            check.problems.append(f"{shown(shard)}: missing, with the {placed} tensors that {INDEX} places there")
        elif (read := _header(folder / shard, check)) is not None:
            shards[shard] = read
    tensors = {}
    for name, shard in weight_map.items():
        held = shards.get(str(shard))
        if held is not None and name in held:
            tensors[name] = held[name]
        elif held is not None:  # one that is missing or broken was named already
            check.problems.append(f"{shown(name)}: not in {shown(shard)}, where {INDEX} puts it")
    for shard, held in shards.items():
        for name in held:
            if weight_map.get(name) != shard:
                what = "is there a second time" if name in tensors else "is not in the index"
                check.problems.append(f"{shown(name)}: {what}, in {shown(shard)}")
    return tensors, set(named), len(shards) == len(named)
