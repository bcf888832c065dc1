"""What the operating system says of a write, in one line; and room on the disk, asked for before the work."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.errors import OutputError


def ensure_space(path: str | Path, nbytes: int) -> None:
    """Refuse before the work what would fail after it.

    Args:
        path: of a file or folder to be written; neither it nor its parents need exist.
        nbytes: about to be written below it.

    Raises:
        OutputError: its file system has less room.
    """
    free = free_bytes(Path(path))
    if free is not None and free < nbytes:
        raise OutputError(f"output {path}: the disk is too full: {_mb(nbytes)} are needed, {_mb(free)} are free")


def free_bytes(path: Path) -> int | None:
    """Room for this user on the file system that holds `path`, or will; None if it cannot be told."""
    path = path.absolute()
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
    return None


@contextmanager
def writes_explained(target: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of a write below `target` into an OutputError.

    Args:
        target: named in the message.
        needed: bytes the body writes, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            quota = " (quota)" if error.errno == errno.EDQUOT else ""
            wanted = "" if needed is None else f" {_mb(needed)} were to be written,"
            free = free_bytes(target.parent)
            left = "it" if free is None else f"{_mb(free)} are free; it"
            message = f"output {target}: the disk is full{quota}:{wanted} {left} was left as it was"
            raise OutputError(message) from error
        raise OutputError(f"output {target}: cannot be written ({error.strerror or error})") from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its place once the body is through; until then it is untouched.

    Raises:
        OutputError: the folder is missing, the disk is full, or the file cannot be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with writes_explained(target):
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table, all of it or nothing; missing values stay empty.

    Args:
        path: replaced if it exists.
        rows: with the same keys; one at least.

    Raises:
        OutputError: the folder is missing, or the file cannot be written.
    """
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def fsync(path: Path) -> None:
    """Have a file or folder survive a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e3:,.0f} kB"
