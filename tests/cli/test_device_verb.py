"""`halfbyte device`: each mode as a table, as JSON, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app, device
from halfbyte.device.monitor import Sample
from halfbyte.errors import HalfbyteError

run = CliRunner()


def printed(*arguments: str) -> str:
    found = run.invoke(app, ["device", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_a_snapshot_is_a_table_or_a_document() -> None:
    assert "instruction sets" in printed()
    document = json.loads(printed("--json"))
    assert document["peaks"]["threads"] >= 1
    assert document["gpus"] == [] or document["no_gpu"] is None


def test_a_launch_is_drawn() -> None:
    text = printed("--kernel-config", "128,4,1;256,1,1;registers=96", "--arch", "sm_90")
    assert "grid 128 × 4 × 1 = 512 blocks" in text
    assert "one SM: 2 blocks, 16 of 64 warps: occupancy 25%, limited by registers" in text
    assert "AAAAAAAABBBBBBBB" + 48 * "·" in text
    assert "2 waves: the GPU holds 132 × 2 = 264 blocks at a time" in text
    assert "248 blocks, 93.9% of the places" in text
    assert "registers were not given" not in text
    assert "32 a thread are assumed" in printed("--kernel-config", "1;100", "--arch", "sm_75")
    assert json.loads(printed("--kernel-config", "1;100", "--arch", "sm_75", "--json"))["idle_lanes"] == 28


def test_a_hierarchy_is_drawn_from_facts_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = printed("--hierarchy", "--arch", "sm_90", "--output-dir", str(tmp_path / "new"))
    assert "nothing was measured" in text
    assert "228 KiB per SM" in text
    assert (tmp_path / "new/hierarchy.png").read_bytes().startswith(b"\x89PNG")


def test_the_hierarchy_here_is_measured() -> None:
    text = printed("--hierarchy")
    assert "one thread" in text
    levels = json.loads(printed("--hierarchy", "--json"))["hierarchies"][0]["levels"]
    assert levels[-1]["name"] == "memory"
    assert levels[-1]["together"] > 0


def test_a_monitor_prints_a_line_a_sample_and_writes_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = printed("--monitor", "0.2", "--interval", "0.1", "--output-dir", str(tmp_path))
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["seconds", "cpu_percent"]
    assert len(lines) == 1 + 2 + 1
    with (tmp_path / "monitor.csv").open() as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == pytest.approx([0.1, 0.2], abs=0.09)
    assert (tmp_path / "monitor.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_ends_a_monitor_and_keeps_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float, interval: float):  # type: ignore[no-untyped-def]
        yield Sample(1.0, 0.5, None, None, 2 * 10**9, 4 * 10**9, ())
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.device.monitor.monitor", interrupted)
    assert "50.0" in printed("--monitor", "9", "--output-dir", str(tmp_path))
    assert (tmp_path / "monitor.csv").read_text().splitlines()[1].startswith("1.0,50.0,,,2.0")


def test_products_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = json.loads(
        printed("--benchmark", "--sizes", "64", "--device", "cpu", "--output-dir", str(tmp_path), "--json")
    )
    assert [row["kind"] for row in found["rows"]] == ["fp32", "fp16", "bf16", "int4"]
    assert found["files"] == [str(tmp_path / "matmul.csv"), str(tmp_path / "matmul.png")]
    assert len((tmp_path / "matmul.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hierarchy", "--benchmark"], "--hierarchy and --benchmark: expected one of them at a time"),
        (["--arch", "sm_90"], "--arch: belongs to --hierarchy or --kernel-config"),
        (["--output-dir", "x"], "--output-dir: belongs to"),
        (["--kernel-config", "1;2000", "--arch", "sm_90"], "block x is 2,000"),
        (["--kernel-config", "1;32", "--arch", "sm_61"], "architecture sm_61: its limits are not known here"),
        (["--benchmark", "--sizes", "big"], "--sizes big: expected whole numbers"),
        (["--monitor", "0"], "monitor: expected from one interval"),
    ],
)
def test_what_cannot_be_is_one_error(arguments: list[str], says: str) -> None:
    found = run.invoke(app, ["device", *arguments])
    assert isinstance(found.exception, HalfbyteError)
    assert says in str(found.exception)


def test_a_terminal_shows_the_last_samples() -> None:
    taken = [{"seconds": float(second), "cpu_percent": None} for second in range(20)]
    table = device._table(taken)
    assert table.row_count == 20
    assert [column.header for column in table.columns] == ["seconds", "cpu percent"]
