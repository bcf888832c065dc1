"""A checkpoint in the making that outlives its process.

Beside the target stands one hidden folder with a name that the next run finds:

    .NAME.partial/
        lock                  held by the process at work; the system gives it back however that process ends
        run.json              what is being done: a record is worth nothing to a run that does something else
        blocks/7.safetensors  tensors of a finished block
        blocks/7.json         its record, written last: the block is finished once this file is there
        measured/7.json       what an earlier pass found out about a block
    states/               the caller's own files between blocks
        checkpoint/           the new checkpoint while it is put together, later renamed to the target
        finished.json         written before that rename; where it stands without checkpoint/, the rename has happened

Every file that counts is written under another name, fsync'ed and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from halfbyte.checkpoints.disk import fsync, writes_explained
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.shard import ShardWriter
from halfbyte.checkpoints.writer import CheckpointWriter, check_target, real_target
from halfbyte.errors import OutputError

# Longer values (hashes) differ without telling a reader anything.
SHOWN_CHARACTERS = 60


class Journal:
    """Context manager: `begin`, then `record` block after block, then put the checkpoint together and `commit`.

    Leaving it without a finished block removes the hidden folder; otherwise the folder stays for the next run, until
    `commit` has succeeded.

    Args:
        output_dir: the folder to be; a link to a folder stands for that folder.
        overwrite: replace a checkpoint that is there already, and an unfinished run that did something else.
        source: a folder that must not be the target, because it is still being read.

    Attributes:
        target: `output_dir`, links followed.
        folder: the hidden folder.
        records: document of each finished block, by its index.
        measured: document an earlier pass kept of a block, by its index.
        finished: the document given to `commit` by a run that ended right after its rename, or None.

    Raises:
        OutputError: the target is taken or cannot be a folder.
    """

    def __init__(self, output_dir: str | Path, *, overwrite: bool = False, source: Path | None = None):
        self._overwrite = overwrite
        self._source = source
        self._lock: int | None = None
        self._run: dict[str, Any] | None = None
        self.target = real_target(output_dir)
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.records: dict[int, dict[str, Any]] = {}
        self.measured: dict[int, dict[str, Any]] = {}
        self.finished: dict[str, Any] | None = None
        if not self._renamed():
            check_target(self.target, overwrite, source)

    def __enter__(self) -> Journal:
        with writes_explained(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder, self.target)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An earlier attempt that was refused is not this run's to remove.
        ours = self._run is not None or not (self.folder / "run.json").exists()
        if ours and (not (self.records or self.measured) or self.finished is not None):
            self._clear()
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def begin(self, run: dict[str, Any]) -> None:
        """Find out whether the folder holds an earlier attempt at the same thing, and take over its blocks.

        Args:
            run: everything the result depends on, as JSON values by the name a user knows it by.

        Raises:
            OutputError: the earlier attempt did something else and has finished blocks; says what differs.
        """
        run = json.loads(json.dumps(run))
        if self._renamed():
            document = _read_json(self.folder / "finished.json") or {}
            if document.get("run") == run:
                self.finished, self._run = document["report"], run
                return
            self._clear()
            check_target(self.target, self._overwrite, self._source)
        with writes_explained(self.target):
            (self.folder / "finished.json").unlink(missing_ok=True)
            fsync(self.folder)  # before checkpoint/ goes: without it the marker would say that the rename has happened
            self._take_over(run)
            for name in ("blocks", "measured", "states"):
                (self.folder / name).mkdir(exist_ok=True)
            if _read_json(self.folder / "run.json") != run:
                _write_durably(self.folder / "run.json", run)
        self._run = run

    def earlier_run(self) -> dict[str, Any]:
        """What an earlier attempt gave to `begin`; empty if there was none."""
        if self._renamed():
            return dict((_read_json(self.folder / "finished.json") or {}).get("run", {}))
        return _read_json(self.folder / "run.json") or {}

    def nbytes(self) -> int:
        """What the folder holds so far."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def record(self, index: int, tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
        """Keep a finished block: after this returns, neither a kill nor a power cut takes it away.

        Args:
            index: of the block.
            tensors: by the names they will have in the checkpoint.
            document: JSON values the caller wants back in `records`.

        Raises:
            OutputError: the disk is full or refuses; the blocks recorded before are still there.
        """
        path = self._tensors(index)
        with writes_explained(self.target, sum(tensor.nbytes for tensor in tensors.values())):
            shard = ShardWriter(path.with_suffix(".part"))
            try:
                for name, tensor in tensors.items():
                    shard.add(name, tensor)
                shard.finish()
            finally:
                shard.close()
            fsync(shard.path)
            shard.path.rename(path)
            document = {**document, "tensors": list(tensors), "sha256": file_hash(path)}
            try:
                _write_durably(path.with_suffix(".json"), document)
            finally:  # Ctrl-C may come when the block is on disk already: then it is kept, and counted
                if path.with_suffix(".json").exists():
                    self.records[index] = document

    def measure(self, index: int, document: dict[str, Any]) -> None:
        """Keep JSON values about a block that is not finished yet: what the next run finds in `measured`.

        Raises:
            OutputError: the disk is full or refuses.
        """
        with writes_explained(self.target):
            _write_durably(self.folder / "measured" / f"{index}.json", document)
        self.measured[index] = document

    def read(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a finished block, in the order they were recorded."""
        held = Checkpoint.of_file(self._tensors(index))
        for name in self.records[index]["tensors"]:
            yield name, held.read(name)

    def writer(self) -> CheckpointWriter:
        """Where the new checkpoint is put together. Give it to `commit` in the end."""
        return CheckpointWriter(
            self.target,
            overwrite=self._overwrite,
            source=self._source,
            hidden_folder=self.folder / "checkpoint",
        )

    def commit(self, writer: CheckpointWriter, report: dict[str, Any]) -> None:
        """Make the checkpoint visible under the target's name.

        Args:
            writer: from `writer`, filled.
            report: what the next run finds in `finished` if this one is killed before it has told anyone.
        """
        with writes_explained(self.target):
            _write_durably(self.folder / "finished.json", {"run": self._run, "report": report})
        try:
            writer.commit()
        except BaseException:
            if not self._renamed():
                (self.folder / "finished.json").unlink(missing_ok=True)
            raise
        self.finished = report

    def _renamed(self) -> bool:
        """Whether an earlier run got as far as its last rename, and no farther."""
        marker, checkpoint = self.folder / "finished.json", self.folder / "checkpoint"
        try:
            return marker.is_file() and not checkpoint.exists() and (self.target / "config.json").is_file()
        except OSError:
            return False

    def _take_over(self, run: dict[str, Any]) -> None:
        """Fill `records` from an earlier run that did the same; make room if it may go."""
        earlier = _read_json(self.folder / "run.json")
        records, measured = (_read_numbered(self.folder / name) for name in ("blocks", "measured"))
        if earlier == run:
            self.measured = measured
            self.records = {
                index: record
                for index, record in records.items()
                if is_intact(self._tensors(index), record.get("sha256", ""))
            }
        elif (records or measured) and not self._overwrite:
            kept = f"{len(records)} finished blocks" if records else f"what was measured of {len(measured)} blocks"
            differences = "; ".join(_differences(earlier or {}, run))
            raise OutputError(
                f"output {self.target}: {self.folder} keeps {kept} of an unfinished run, but "
                f"{differences}. Repeat that run to go on with it, or pass --overwrite to start again"
            )
        else:
            self._clear()

    def _tensors(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index}.safetensors"

    def _clear(self) -> None:
        """Remove all but the lock; the marker goes last, since without it a finished run would look unfinished."""
        for name in ("checkpoint", "blocks", "measured", "states"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("run.json", "finished.json"):
            (self.folder / name).unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file is there and holds what was written."""
    return path.is_file() and file_hash(path) == sha256


def _lock(folder: Path, target: Path) -> int:
    """Make the folder this process's own; the descriptor that holds it. flock ends with the process, a file would not.

    Raises:
        OutputError: another process has it.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its last user has just removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == (folder / "lock").stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"output {target}: another run is writing it; wait for that one, or choose another folder"
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _write_durably(path: Path, document: Any) -> None:
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(document), encoding="utf-8")
    fsync(part)
    part.rename(path)
    fsync(path.parent)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The document; None where there is none, or only half of one that a fault of the disk left."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _read_numbered(folder: Path) -> dict[int, dict[str, Any]]:
    """Every whole document NUMBER.json of a folder, by its number."""
    documents = {int(path.stem): _read_json(path) for path in folder.glob("*.json") if path.stem.isdecimal()}
    return {number: document for number, document in sorted(documents.items()) if document is not None}


def _differences(earlier: dict[str, Any], run: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*earlier, *run}):
        old, new = earlier.get(key), run.get(key)
        if old != new:
            shown = max(len(str(old)), len(str(new))) <= SHOWN_CHARACTERS
            yield f"{key} was {old} and is now {new}" if shown else f"{key} has changed"
