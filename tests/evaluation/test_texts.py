from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.evaluation.texts import PUBLISHED, read_passages, read_text

LINES = (" \n", " = Crow = \n", " \n", " The crow sat . \n", " It counted\x85 . \n", " \n")
ROWS = ["", " = Crow = \n", "", " The crow sat . \n", " It counted\x85 . \n", ""]


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_wikitext_is_the_same_text_from_its_file_and_from_its_rows(tmp_path: Path) -> None:
    raw = tmp_path / "wiki.test.raw"
    raw.write_text("".join(LINES))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    found = [read_text("wikitext2", path) for path in (raw, write_rows(tmp_path / "rows.jsonl", ROWS))]
    found.append(read_text("wikitext2", tmp_path / "rows.json"))
    assert [one.name for one in found] == ["wikitext2"] * 3
    assert [one.text for one in found] == ["\n\n".join(ROWS)] * 3
    assert read_text(raw).text == "".join(LINES)


def test_c4_is_its_first_documents_with_spaces_between(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [f"document {n}" for n in range(1200)])
    assert read_text("c4", rows).text == " ".join(f"document {n}" for n in range(1100))
    (tmp_path / "c4.txt").write_text("one\n\ntwo\n")
    assert read_text("c4", tmp_path / "c4.txt").text == "one two"


def test_passages_are_rows_or_lines(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "lambada.jsonl", ["a b", "c\nd"])
    assert read_passages(rows) == ["a b", "c\nd"]
    (tmp_path / "lambada.txt").write_text("a b\nc d\n")
    assert read_passages(tmp_path / "lambada.txt") == ["a b", "c d"]


def test_a_file_of_rows_is_its_documents(tmp_path: Path) -> None:
    assert read_text(write_rows(tmp_path / "rows.jsonl", ["one", "two"])).text == "one\n\ntwo"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "lambada"])
def test_without_the_library_a_name_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=rf"^data {name}.*pip install datasets.*--data {name} --data-path FILE$"):
        read_text(name)


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ("lambada", None, "halfbyte eval --data lambada"),
        ("wikitext2", "none.jsonl", "data_path none.jsonl: expected a file or a folder"),
        ("builtin", "rows.jsonl", "data_path rows.jsonl: only for wikitext2, c4, lambada"),
        ("none.txt", None, "data none.txt: cannot be read .*expected builtin, wikitext2"),
    ],
)
def test_what_is_no_text_is_refused(data: str, path: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_text(data, path)


def test_broken_rows_are_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text"\n')
    with pytest.raises(ConfigError, match=r"^data .*rows.jsonl, line 2: not JSON"):
        read_text(rows)
    rows.write_text('{"text": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(ConfigError, match="row 1: a conversation; expected text"):
        read_text(rows)


def test_parquet_and_folders_through_the_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "clone" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": ROWS})
    rows.to_parquet(folder / "test-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"text": ["not this"]}).to_parquet(folder / "train-00000-of-00001.parquet")
    text = "\n\n".join(ROWS)
    assert read_text("wikitext2", tmp_path / "clone").text == text
    assert read_text("wikitext2", folder / "test-00000-of-00001.parquet").text == text
    assert read_text(str(folder)).text == text
