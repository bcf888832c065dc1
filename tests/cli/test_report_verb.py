"""`halfbyte report`, and `halfbyte compare --report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.errors import CheckpointError, ConfigError, OutputError
from tests.conftest import TEXT
from tests.report import documents

RUNNER = CliRunner()


def test_a_page_of_a_checkpoint_and_of_what_others_wrote(quantized_llama: Path, tmp_path: Path) -> None:
    for name in ("comparison", "profile", "speculation"):
        (tmp_path / f"{name}.json").write_text(json.dumps(getattr(documents, name)()), encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["report", str(quantized_llama), "-o", str(tmp_path / "page.html"), "--n-samples", "1"]
    arguments += ["--calibration", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "out"), "--json"]
    for name in ("comparison", "profile", "speculation"):
        arguments += [f"--{name}", str(tmp_path / f"{name}.json")]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert document["speculation"][0]["name"] == "speculation"
    assert len(document["models"][0]["columns"]["name"]) == 14
    assert document["models"][0]["calibration"]["tokens"] > 0
    assert document["files"][0] == str(tmp_path / "page.html")
    assert all(Path(file).stat().st_size for file in document["files"])
    assert {Path(file).name for file in document["files"]} == {"page.html", *_names(tmp_path / "out")}


def test_lessons_alone_make_a_page(tmp_path: Path) -> None:
    arguments = ["report", "-o", str(tmp_path / "page.html"), "--lesson", "gpu", "--lesson", "packing", "--json"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert [lesson["lesson"] for lesson in document["lessons"]] == ["gpu", "packing"]
    assert document["title"] == "Lessons"
    assert (tmp_path / "page.html").is_file()


def test_compare_writes_a_page_of_every_quantized_model(
    tiny_llama: Path, quantized_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT[:2400], encoding="utf-8")
    arguments = ["compare", str(tiny_llama), str(quantized_llama), "--data", str(tmp_path / "text.txt"), "--window"]
    arguments += ["32", "--n-samples", "2", "--skip-speed", "--report", str(tmp_path / "page.html")]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert f"written: {tmp_path / 'page.html'}" in result.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"label":"B"' in page
    assert '"kind":["self_attn.q_proj"' in page


def test_bad_input_is_refused_before_any_work(tmp_path: Path, quantized_llama: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    page = ["-o", str(tmp_path / "page.html")]
    model = str(quantized_llama)
    for arguments, kind, message in (
        (["report", model, "-o", str(tmp_path)], OutputError, "is a folder; give a file"),
        (["report", model, "-o", str(tmp_path / "no" / "x.html")], OutputError, "is no folder; make it first"),
        (["report", model, *page, "--output-dir", str(tmp_path / "taken")], OutputError, "is a file; name a folder"),
        (["report", model, *page, "--lesson", "cooking"], ConfigError, "cooking: no such lesson; there are packing"),
        (["report", *page], ConfigError, "expected a model, a comparison"),
        (["report", *page, "--profile", str(tmp_path / "none.json")], ConfigError, "no such file"),
        (["report", *page, "--profile", str(tmp_path / "taken")], CheckpointError, "not valid JSON"),
        (["report", model, *page, "--comparison", str(tmp_path / "other.json")], ConfigError, "'sides' is missing"),
        (["compare", model, model, "--report", str(tmp_path)], OutputError, "--report"),
    ):
        result = RUNNER.invoke(app, arguments)
        assert isinstance(result.exception, kind), (arguments, result.exception)
        assert message in str(result.exception)
    assert _names(tmp_path) == {"taken", "other.json"}


def test_help_has_an_example() -> None:
    assert "Example: halfbyte report" in " ".join(RUNNER.invoke(app, ["report", "--help"]).output.split())


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
