"""FILE.gguf as a MODEL: a Hugging Face folder that is made when the file is first asked for, and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.checkpoints.cache import cache_folder
from halfbyte.checkpoints.disk import ensure_space, writes_explained
from halfbyte.errors import CheckpointError
from halfbyte.progress import progress_bar

if TYPE_CHECKING:
    from halfbyte.checkpoints.gguf_folder import Pack

SUFFIX = ".gguf"
# Raised whenever what is made of a file changes, so that an older folder in the cache is not taken for a current one.
EXPANSION = 1


def is_gguf(model: str | Path) -> bool:
    """Whether MODEL names a GGUF file that is there."""
    path = os.path.expanduser(str(model))  # noqa: PTH111  (Path's raises where there is no home)
    return path.lower().endswith(SUFFIX) and os.path.isfile(path)  # noqa: PTH113  (never raises)


def gguf_folder(
    model: str | Path,
    *,
    pack: Pack | None = None,
    section: Callable[[], dict[str, Any] | None] = lambda: None,
    progress: bool = True,
) -> Path:
    """The folder of a GGUF file, in the cache; made if it is not there yet, or if the file has changed since.

    Args:
        model: the file.
        pack: see `expand`; without it every weight is floats, in 16 bit.
        section: see `expand`.
        progress: show a bar on a terminal, and say that a folder is made.

    Raises:
        CheckpointError: the file is broken, or contradicts itself.
        UnsupportedError: an architecture, tokenizer, rotary scaling or kind of tensor that is not read.
        OutputError: the cache cannot be written, or the disk is full.
    """
    path = Path(model).expanduser().absolute()
    form = "floats" if pack is None else "codes"
    target = cache_folder() / "gguf" / f"{path.stem}-{form}-{_identity(path)}"
    if (target / "config.json").is_file():
        return target
    from halfbyte.checkpoints.gguf_folder import expand
    from halfbyte.checkpoints.gguf_reader import GgufFile

    tensors = GgufFile(path).tensors
    with writes_explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    ensure_space(target, sum(info.nbytes * 5 // 2 if pack else 2 * info.elements for info in tensors.values()))
    if progress:
        print(f"halfbyte: reading {path.name} as {form}, once; kept in {target}", file=sys.stderr)
    with (
        writes_explained(target),
        tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as scratch,
        progress_bar(f"Reading {path.name}", len(tensors), enabled=progress, unit="tensors") as ticker,
    ):
        try:
            expand(path, Path(scratch) / "folder", pack=pack, section=section, advance=ticker.advance)
        except CheckpointError as error:  # what is wrong with a tensor's numbers is found by who knows no file
            raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        try:
            (Path(scratch) / "folder").rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster: what it made is the same
                raise
    return target


def _identity(path: Path) -> str:
    """Hash of what tells this state of the file from another; reading it would take as long as loading."""
    facts = path.stat()
    described = f"{path} {facts.st_size} {facts.st_mtime_ns} {EXPANSION}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]
