from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoints.journal import Journal
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import OutputError

RUN = {"model": "a" * 64, "bits": 4}


def record_two(target: Path, run: dict[str, Any] = RUN) -> None:
    with Journal(target) as journal:
        journal.begin(run)
        journal.record(0, {"a": torch.ones(4), "odd": torch.ones(3, dtype=torch.uint8)}, {"note": "first"})
        journal.record(2, {"c": torch.zeros(2, 2)}, {"note": "third"})


def test_what_was_recorded_is_there_for_the_next_run(tmp_path: Path) -> None:
    record_two(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == [".m.partial"]
    with Journal(tmp_path / "m") as journal:
        assert journal.earlier_run() == RUN
        journal.begin(RUN)
        assert {index: record["note"] for index, record in journal.records.items()} == {0: "first", 2: "third"}
        assert [name for name, _ in journal.read(0)] == ["a", "odd"]
        journal.record(1, {"b": torch.ones(2)}, {})
        with journal.writer() as writer:
            for index in range(3):
                for name, tensor in journal.read(index):
                    writer.add(name, tensor)
            writer.add_json("config.json", {})
            journal.commit(writer, {"done": True})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert Checkpoint.open(tmp_path / "m").names() == ["a", "b", "c", "odd"]


def test_nothing_recorded_leaves_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "m") as journal:
        journal.begin(RUN)
    assert list(tmp_path.iterdir()) == []
    with Journal(tmp_path / "m"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_the_earlier_one_alone(tmp_path: Path) -> None:
    record_two(tmp_path / "m")
    other = {"model": "b" * 64, "bits": 3}
    with pytest.raises(
        OutputError, match=r"keeps 2 finished blocks .*, but bits was 4 and is now 3; model has changed\. "
    ):
        begin(tmp_path / "m", other)
    assert begin(tmp_path / "m", RUN) == {0, 2}
    assert begin(tmp_path / "m", other, overwrite=True) == set()


def begin(target: Path, run: dict[str, Any], **settings: Any) -> set[int]:
    with Journal(target, **settings) as journal:
        journal.begin(run)
        return set(journal.records)


def test_an_attempt_that_finished_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / ".m.partial"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"bits": 3}))
    assert begin(tmp_path / "m", RUN) == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone", "half a record", "not a record"])
def test_a_damaged_block_is_not_finished(damage: str, tmp_path: Path) -> None:
    record_two(tmp_path / "m")
    tensors, record = (tmp_path / ".m.partial" / "blocks" / f"0.{kind}" for kind in ("safetensors", "json"))
    data = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(data[:-1])
    elif damage == "changed":
        tensors.write_bytes(data[:-1] + b"!")
    elif damage == "gone":
        tensors.unlink()
    else:
        record.write_text(record.read_text()[:20] if damage == "half a record" else "[]")
    assert begin(tmp_path / "m", RUN) == {2}


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    with Journal(tmp_path / "m"), pytest.raises(OutputError, match="another run is writing it; wait"):
        Journal(tmp_path / "m").__enter__()
    record_two(tmp_path / "m")
    child = os.fork()
    if child == 0:
        Journal(tmp_path / "m").__enter__()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert begin(tmp_path / "m", RUN) == {0, 2}


def test_a_taken_target_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "diary.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists and is not empty"):
        Journal(tmp_path / "m")
    with pytest.raises(OutputError, match="is no model folder"):
        Journal(tmp_path / "m", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "file" / "m").__enter__()
