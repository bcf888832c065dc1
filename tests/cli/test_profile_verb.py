"""`halfbyte profile` as a user meets it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.verbs import run, run_process

TINY = ["profile", "--model-dim", 512, "--rounds", 3, "--threads", 1]


def test_sizes_stand_behind_each_other_and_files_go_where_they_should(tmp_path: Path) -> None:
    result = run(*TINY, "--batch-sizes", 1, 2, "--output-dir", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if " so far" not in line]
    document = json.loads(result.stdout)
    assert {row["batch_size"] for row in document["rows"]} == {1, 2}
    assert (document["threads"], document["no_pictures"]) == (1, None)
    names = ["performance_results.csv", "throughput_scaling.png", "latency_comparison.png", "roofline.png"]
    assert document["files"] == [str(tmp_path / "out" / name) for name in names]
    with (tmp_path / "out" / names[0]).open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])


def test_without_matplotlib_the_table_and_the_csv_still_come(tmp_path: Path) -> None:
    # A module of that name that cannot be imported stands before the real one.
    (tmp_path / "path" / "matplotlib").mkdir(parents=True)
    (tmp_path / "path" / "matplotlib" / "__init__.py").write_text("raise ImportError('not here')")
    result = run_process(
        *TINY, "--batch-sizes", "1", "--layers", "--output-dir", tmp_path / "out", PYTHONPATH=str(tmp_path / "path")
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["performance_results.csv"]
    assert (
        "no pictures: pictures need matplotlib, which is not installed: pip install 'halfbyte[plot]'" in result.stdout
    )
    for word in ("width 512: all linears", "q, k, v, o (512 × 512, 4 in a block)", "int4-a8", "tokens/s", "roofline"):
        assert word in result.stdout


def test_help_has_an_example() -> None:
    text = " ".join(run("profile", "--help").stdout.split())
    assert "Example: halfbyte profile" in text
    assert "--json" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-5"], "--model 'gpt-5': its shape is not known; use --model-dim, or one of"),
        (["--batch-sizes", "1", "0"], "--batch-sizes 1 0: expected whole numbers from 1 on"),
        (["--batch-sizes", "many"], "--batch-sizes many: expected whole numbers from 1 on"),
        (["llama-3-8b"], "llama-3-8b: profile takes no arguments; did you mean --batch-sizes or --model?"),
        (["--model-dim", "100"], "does not divide q, k, v, o with 100 input channels"),
        (["--output-dir", "file/below"], "is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("profile", *arguments, folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
