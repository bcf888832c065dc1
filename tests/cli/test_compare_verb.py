"""`halfbyte compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.errors import ConfigError, OutputError
from tests.conftest import TEXT

RUNNER = CliRunner()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT[:2400], encoding="utf-8")
    return tmp_path / "text.txt"


def test_tables_verdict_and_notes(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    arguments = ["compare", str(tiny_llama), f"{tiny_llama}@awq:n_grid=2", "--data", str(text_file), "--quick"]
    arguments += ["--window", "32", "--n-samples", "6", "--output-json", str(tmp_path / "result.json")]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    for expected in (
        "smaller", "KL to A, nats", "top-1 as A", "tok/s", "; it decodes ",
        f"{text_file}: 186 tokens in 6 windows of 32",
        "calibration   of what was quantized here: 16 × 256 tokens",
        "provisional   --quick",
    ):  # fmt: skip
        assert expected in result.stdout
    assert "p-values" not in result.stdout
    document = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert document["provisional"]
    assert document["verdicts"][0] in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "result.json", "text.txt"]


def test_as_json_without_speed(tiny_llama: Path, quantized_llama: Path, text_file: Path) -> None:
    arguments = ["compare", str(tiny_llama), str(quantized_llama), "--data", str(text_file), "--window", "32"]
    result = RUNNER.invoke(app, [*arguments, "--skip-speed", "--json"])
    document = json.loads(result.stdout)
    assert [side["label"] for side in document["sides"]] == ["A", "B"]
    assert document["sides"][1]["throughput"] is None
    assert len(document["sides"][0]["window_nll"]) == document["text"]["windows"] > 6


def test_columns_that_would_be_empty_are_left_out(tiny_llama: Path, quantized_llama: Path, text_file: Path) -> None:
    arguments = ["compare", str(tiny_llama), str(quantized_llama), "--data", str(text_file), "--window", "32"]
    result = RUNNER.invoke(app, [*arguments, "--skip-speed", "--skip-original"])
    assert "perplexity" in result.stdout
    assert "decode" not in result.stdout
    assert "KL to" not in result.stdout
    assert "not loaded    A (--skip-original)" in result.stdout


def test_bad_input_is_refused_before_any_work(tmp_path: Path, tiny_llama: Path) -> None:
    two = ["compare", str(tiny_llama), str(tiny_llama)]
    for arguments, kind, message in (
        (["compare", str(tiny_llama)], ConfigError, "expected 2 to 26 models"),
        ([*two, "--output-json", str(tmp_path)], OutputError, "is a folder"),
        ([*two, "--output-json", str(tmp_path / "no" / "x.json")], OutputError, "is no folder; make it first"),
        ([*two, "--head-bits", "few"], ConfigError, "--head-bits few"),
    ):
        result = RUNNER.invoke(app, arguments)
        assert isinstance(result.exception, kind)
        assert message in str(result.exception)


def test_help_has_an_example() -> None:
    assert "Example: halfbyte compare" in " ".join(RUNNER.invoke(app, ["compare", "--help"]).output.split())
