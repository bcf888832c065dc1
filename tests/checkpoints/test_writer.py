from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints import disk, shard
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.writer import CheckpointWriter, ensure_space
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


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_if_the_last_rename_fails_the_old_folder_comes_back(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    write(target, 1.0)
    rename = Path.rename

    def refuse(self: Path, to: Any) -> Path:
        if ".partial-" in self.name and not target.exists():
            raise failure
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises((OutputError, KeyboardInterrupt), match=r"cannot be written \(Input/output error\)|^$"):
        write(target, 2.0, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(Checkpoint.open(target).read("a"), torch.ones(4))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_targets_that_must_not_be_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("x")
    write(tmp_path / "model")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "file", {}, "is a file"),
        (tmp_path / "file" / "below", {}, "cannot be written"),
        (tmp_path / "link", {}, "symbolic link to nothing"),
        (loop, {}, "symbolic link to nothing"),
        (loop / "below", {}, "cannot be written"),
        (tmp_path / ("x" * 300), {}, "cannot be written .File name too long"),
        (tmp_path / "a\0b", {}, "null byte"),
        (home, {"overwrite": True}, "no model folder"),
        (tmp_path / "model", {"overwrite": True, "source": tmp_path / "home" / ".." / "model"}, "is read from"),
    ]
    for target, settings, message in cases:
        with pytest.raises(OutputError, match=message):
            CheckpointWriter(target, **settings)
    assert (home / "letters.txt").read_text() == "x"


@pytest.mark.parametrize("place", ["home", "cwd"])
def test_nobody_is_put_out_of_the_folder_they_stand_in(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model")
    inside = tmp_path / "model" / "inside"
    inside.mkdir()
    if place == "home":
        monkeypatch.setenv("HOME", str(inside))
    else:
        monkeypatch.chdir(inside)
    with pytest.raises(OutputError, match="is or contains (the current|your home) folder"):
        CheckpointWriter(tmp_path / "model", overwrite=True)
    assert inside.exists()


def test_a_link_to_a_folder_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "disk" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "m")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Checkpoint.open(tmp_path / "disk" / "m").names() == ["a", "b"]


def test_what_came_into_being_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    def race() -> None:
        with CheckpointWriter(tmp_path / "m") as writer:
            writer.add("late", torch.ones(1))
            write(tmp_path / "m")
            writer.commit()

    with pytest.raises(OutputError, match="exists and is not empty"):
        race()
    assert Checkpoint.open(tmp_path / "m").names() == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_infinity_in_a_config_is_written_as_it_was_read(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m") as writer:
        writer.add("a", torch.ones(1))
        writer.add_json("config.json", {"time_step_limit": [0.0, float("inf")]})
        writer.commit()
    assert Checkpoint.open(tmp_path / "m").config == {"time_step_limit": [0.0, float("inf")]}


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
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.name != "posix", reason="mounts a file system")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    def fill() -> None:
        with CheckpointWriter(small_disk / "m") as writer:
            writer.add("a", torch.zeros(1 << 20))
            writer.commit()

    with pytest.raises(
        OutputError, match=r"the disk is full: 4,\d{3} kB were to be written, [\d,]+ kB are free"
    ) as error:
        fill()
    assert "\n" not in str(error.value)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_while_a_shard_streams(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "SPILL_BYTES", 4096)
    monkeypatch.setattr(shard, "HEADER_ROOM", 4096)

    def fill() -> None:
        with CheckpointWriter(small_disk / "m") as writer:
            for number in range(64):
                writer.add(str(number), torch.zeros(1 << 14))
            writer.commit()

    with pytest.raises(OutputError, match="the disk is full"):
        fill()
    assert list(small_disk.iterdir()) == []


def test_a_mount_point_is_refused_before_the_work(small_disk: Path) -> None:
    with pytest.raises(OutputError, match="is a mount point"):
        CheckpointWriter(small_disk)


def test_space_can_be_asked_for_up_front(tmp_path: Path) -> None:
    ensure_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"the disk is too full: 1,000,000,000,000 MB are needed, [\d,]+ MB are free"):
        ensure_space(tmp_path / "not" / "yet", 10**18)


def test_a_small_lack_of_space_is_told_in_kilobytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.checkpoints.disk.free_bytes", lambda path: 102_400)
    with pytest.raises(OutputError, match="the disk is too full: 345 kB are needed, 102 kB are free"):
        ensure_space(tmp_path, 345_000)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full: "),
        (errno.EDQUOT, r"the disk is full \(quota\)"),
        (errno.EACCES, r"cannot be written \(Permission denied\)"),
        (errno.EROFS, r"cannot be written \(Read-only file system\)"),
        (errno.EIO, r"cannot be written \(Input/output error\)"),
    ],
)
def test_what_the_system_says_becomes_one_line(
    code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shard, "_write", refuse)
    with pytest.raises(OutputError, match=f"^output .*/m: {message}") as error:
        write(tmp_path / "m")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_process_umask_decides_who_may_read(tmp_path: Path) -> None:
    write(tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~disk.umask()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o666 & ~disk.umask()}


def test_the_hash_of_each_tensor_is_known(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.int16).reshape(2, 3).T, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.add_json("config.json", {})
        writer.commit()
    data = {"a": struct.pack("<6h", 0, 3, 1, 4, 2, 5), "b": bytes([0xC0, 0x3F])}
    assert writer.sha256 == {name: hashlib.sha256(stored).hexdigest() for name, stored in data.items()}
    assert (writer.nbytes, writer.shards) == (14, 1)
