from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import writer as writer_module
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import OutputError


def write(target: Path, value: float = 1.0, **settings: Any) -> None:
    with CheckpointWriter(target, **settings) as writer:
        writer.add("a", torch.full((4,), value))
        writer.add("b", torch.zeros(8))
        writer.add_json("config.json", {"value": value})
        writer.commit()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "new" / "model")
    checkpoint = Checkpoint.open(tmp_path / "new" / "model")
    assert checkpoint.names() == ["a", "b"]
    assert torch.equal(checkpoint.read("a"), torch.ones(4))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model"]


def test_shards_carry_the_usual_names_and_an_index(tmp_path: Path) -> None:
    write(tmp_path / "m", max_shard_bytes=32)
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert torch.equal(checkpoint.read("b"), torch.zeros(8))
    assert checkpoint.total_bytes == 48


def test_nothing_is_visible_before_commit_and_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    class Boom(BaseException):
        pass

    def fail() -> None:
        with CheckpointWriter(tmp_path / "m") as writer:
            writer.add("a", torch.ones(4))
            writer.add_json("config.json", {})
            assert not (tmp_path / "m").exists()
            raise Boom

    with pytest.raises(Boom):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_overwrite_and_survives_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "m"
    write(target, 1.0)
    with pytest.raises(OutputError, match="pass --overwrite"):
        CheckpointWriter(target)

    def fail() -> None:
        with CheckpointWriter(target, overwrite=True) as writer:
            writer.add("a", torch.zeros(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(Checkpoint.open(target).read("a"), torch.ones(4))
    write(target, 2.0, overwrite=True)
    assert torch.equal(Checkpoint.open(target).read("a"), torch.full((4,), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_if_the_last_rename_fails_the_old_folder_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m"
    write(target, 1.0)
    rename = Path.rename

    def refuse(self: Path, to: Any) -> Path:
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot be written .Input/output error."):
        write(target, 2.0, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(Checkpoint.open(target).read("a"), torch.ones(4))


def test_targets_that_must_not_be_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("x")
    write(tmp_path / "model")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "file", {}, "is a file"),
        (tmp_path / "file" / "below", {}, "cannot be written"),
        (tmp_path / "link", {}, "symbolic link to nothing"),
        (home, {"overwrite": True}, "no model folder"),
        (tmp_path / "model", {"overwrite": True, "source": tmp_path / "home" / ".." / "model"}, "is read from"),
    ]
    for target, settings, message in cases:
        with pytest.raises(OutputError, match=message):
            CheckpointWriter(target, **settings)
    assert (home / "letters.txt").read_text() == "x"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m")
    assert Checkpoint.open(tmp_path / "m").names() == ["a", "b"]


def test_companions_are_carried_over_and_weights_are_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "merges.txt", "generation_config.json", "pytorch_model.bin", "notes.md"):
        (source / name).write_text(name)
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.copy_files_from(source)
        writer.commit()
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.name != "posix", reason="mounts a file system")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    def fill() -> None:
        with CheckpointWriter(small_disk / "m") as writer:
            writer.add("a", torch.zeros(1 << 20))
            writer.commit()

    with pytest.raises(OutputError, match=r"the disk is full: 4 MB were to be written, . MB are free") as error:
        fill()
    assert "\n" not in str(error.value)
    assert list(small_disk.iterdir()) == []


def test_the_process_umask_decides_who_may_read(tmp_path: Path) -> None:
    write(tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~writer_module._umask()
