"""`halfbyte explain`."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.errors import ConfigError

RUNNER = CliRunner()


def test_alone_it_lists_the_lessons() -> None:
    result = RUNNER.invoke(app, ["explain"])
    assert result.exit_code == 0
    for name in ("packing", "rounding", "awq", "kernel", "gpu", "speculative"):
        assert f" {name} " in result.output
    listed = json.loads(RUNNER.invoke(app, ["explain", "--json"]).stdout)
    assert listed[0]["lesson"] == "packing"


def test_a_lesson_in_a_pipe_is_plain_text_of_a_hundred_columns() -> None:
    result = RUNNER.invoke(app, ["explain", "packing", "--lang", "en"])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert max(len(line.rstrip()) for line in result.output.splitlines()) <= 100
    assert "1/7  A weight becomes a code" in result.output
    assert "0x75316420" in result.output
    assert "25 statements were checked" in result.output


@pytest.mark.parametrize(("lang", "heading"), [("vi", "trở thành một mã"), ("zh_TW", "權重變成")])
def test_headings_are_translated(lang: str, heading: str) -> None:
    assert heading in RUNNER.invoke(app, ["explain", "packing", "--lang", lang]).output


def test_json_has_the_numbers() -> None:
    document = json.loads(RUNNER.invoke(app, ["explain", "packing", "--json", "--n", "16", "--k", "64"]).stdout)
    assert (document["lesson"], document["language"]) == ("packing", "en") or document["language"] in ("vi", "zh_TW")
    (table,) = [block for block in document["steps"][0]["blocks"] if block["kind"] == "table"]
    assert [row[0]["value"] for row in table["rows"]] == list(range(8))
    assert all(0 <= row[3]["value"] <= 15 for row in table["rows"])


def test_help_has_an_example() -> None:
    assert "Example: halfbyte explain packing" in RUNNER.invoke(app, ["explain", "--help"]).output


@pytest.mark.parametrize("arguments", [["packing", "--step"], ["packing", "--step", "--json"]])
def test_steps_want_a_terminal(arguments: list[str]) -> None:
    error = RUNNER.invoke(app, ["explain", *arguments]).exception
    assert isinstance(error, ConfigError)
    assert str(error).startswith("--step: expected a terminal")


def _read_until(terminal: int, wanted: str, seconds: float = 60) -> str:
    seen = ""
    end = time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
    return seen


def test_steps_wait_for_a_key_and_q_ends() -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "halfbyte", "explain", "packing", "--step", "--lang", "en"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    first = _read_until(controller, "q to end]")
    assert "1/7" in first
    assert "2/7" not in _read_until(controller, "2/7", 1)  # no key yet
    # A key that comes before the program listens is dropped, as terminals do.
    second = ""
    while "2/7" not in second and process.poll() is None:
        os.write(controller, b" ")
        second += _read_until(controller, "2/7", 1)
    assert "2/7" in second
    rest = second
    while process.poll() is None:
        os.write(controller, b"q")
        rest += _read_until(controller, "never", 0.5)
    assert "7/7" not in rest
    assert process.returncode == 0
    os.close(controller)
