"""`halfbyte inspect layers`, `rounding`, `channels`, `weights` and `memory`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app, main
from halfbyte.cli.bars import bar, side_by_side
from tests.conftest import TEXT

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to collect activations over."""
    path = tmp_path_factory.mktemp("text") / "crows.txt"
    path.write_text(TEXT)
    return path


def run(verb: str, model: Path, *options: object) -> str:
    result = RUNNER.invoke(app, ["inspect", verb, str(model), *map(str, options)])
    assert result.exit_code == 0, result.output
    return result.output


def document(verb: str, model: Path, *options: object) -> Any:
    return json.loads(run(verb, model, *options, "--json"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_layers_are_sorted_and_cut_but_written_whole(quantized_llama: Path, text: Path, tmp_path: Path) -> None:
    settings = ("--calibration", text, "--n-samples", 1)
    output = run("layers", quantized_llama, *settings, "--top", 3, "--csv", tmp_path / "layers.csv")
    rows = table(tmp_path / "layers.csv")
    assert len(rows) == 14
    worst = sorted(rows, key=lambda row: -float(row["output_error"]))[:3]
    lines = [line.split() for line in output.splitlines()]
    shown = [cells[0] for cells in lines if cells and cells[0][:2] in ("0.", "1.")]
    assert shown == [row["name"].removeprefix("model.layers.") for row in worst]
    assert "… and 11 linears more; --top 0 shows all." in output
    assert "names begin with model.layers." in output
    assert f"Activations over {512} tokens of crows.txt." in output
    for title in ("rtn", "scaled", "ranged", "stored", "zero pt"):
        assert title in output
    assert document("layers", quantized_llama, *settings)["layers"][0]["recorded_stored"] == pytest.approx(
        float(rows[0]["recorded_stored"])
    )


def test_layers_without_activations(quantized_llama: Path) -> None:
    found = document("layers", quantized_llama, "--no-activations")
    assert found["calibration"] is None
    assert all(layer["output_error"] is None for layer in found["layers"])
    output = run("layers", quantized_llama, "--no-activations", "--sort", "zero-point", "--layer", "0.mlp.up_proj")
    assert "model.layers.0.mlp.up_proj" in output
    assert "96×64" in output


def test_rounding_as_a_table_and_as_a_file(quantized_llama: Path, tmp_path: Path) -> None:
    output = run("rounding", quantized_llama, "--csv", tmp_path / "rounding.csv", "--top", 0)
    rows = table(tmp_path / "rounding.csv")
    assert len(rows) == 14
    assert list(rows[0]) == [
        "name", "bits", "weights", "up", "down", "exact", "bias", "rms", "clipped", "moved",
    ]  # fmt: skip
    weights = sum(int(row["weights"]) for row in rows)
    up = sum(float(row["up"]) * int(row["weights"]) for row in rows) / weights
    assert f"All {weights:,} weights: {up:.2%} up" in output
    lines = [line.split() for line in output.splitlines()]
    biases = [abs(float(cells[4])) for cells in lines if len(cells) == 8 and cells[0].startswith(("0.", "1."))]
    assert len(biases) == 14
    assert biases == sorted(biases, reverse=True)


def test_channels_of_all_and_of_one(quantized_llama: Path, text: Path, tmp_path: Path) -> None:
    settings = ("--calibration", text, "--n-samples", 1)
    everything = document("channels", quantized_llama, *settings)["layers"]
    most = max(everything, key=lambda layer: layer["error_share_rtn"])
    first = next(line for line in run("channels", quantized_llama, *settings).splitlines() if "_proj" in line)
    assert first.split()[0] == most["name"].removeprefix("model.layers.")
    output = run("channels", quantized_llama, *settings, "--layer", "0.mlp.down_proj", "--csv", tmp_path / "c.csv")
    rows = table(tmp_path / "c.csv")
    assert [int(row["channel"]) for row in rows] == list(range(96))
    (critical,) = [row for row in rows if row["critical"] == "True"]
    assert max(float(row["activation"]) for row in rows) == float(critical["activation"])
    assert f"{float(critical['scale']):.3f}" in output
    run("channels", quantized_llama, *settings, "--csv", tmp_path / "all.csv")
    assert len(table(tmp_path / "all.csv")) == 14
    assert "channels" not in table(tmp_path / "all.csv")[0]


def test_weights_are_drawn(quantized_llama: Path, tmp_path: Path) -> None:
    output = run("weights", quantized_llama, "--csv", tmp_path / "weights.csv")
    assert "all 14 linears: 61,440 weights" in output
    assert "█" in output
    assert "bits (entropy)" in output
    rows = table(tmp_path / "weights.csv")
    assert [row["codes_used"] for row in rows] == ["16"] * 14
    found = document("weights", quantized_llama, "--layer", "1.self_attn.k_proj")
    (layer,) = found["layers"]
    assert sum(layer["codes"]["4"]) == layer["weights"] == 32 * 64


def test_memory_of_a_quantized_and_of_another_model(quantized_llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    output = run("memory", quantized_llama, "--csv", tmp_path / "memory.csv")
    assert "output head in 8 bits" in output
    assert [row["kind"] for row in table(tmp_path / "memory.csv")] == [
        "quantized linears", "embedding", "output head", "norms and biases", "codes", "scales", "zero points", "total",
    ]  # fmt: skip
    assert "times smaller" not in run("memory", tiny_llama)
    assert "times smaller than in 16 bits" in output
    assert document("memory", tiny_llama, "--no-load")["engine"] is None


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("layers", ["--sort", "size"], "--sort size: expected one of outputs, weights, zero-point, stages, name"),
        ("rounding", ["--top", "-1"], "--top -1: expected 0 (all) or a number of rows"),
        ("weights", ["--layer", "9.up"], "--layer 9.up: no such quantized linear"),
        ("rounding", ["--csv", "no/such/folder/x.csv"], "output no/such/folder/x.csv: cannot be written"),
        ("channels", ["--n-samples", "0"], "--n-samples: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_named_in_one_line(
    quantized_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str,
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["halfbyte", "inspect", verb, str(quantized_llama), *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_bar_is_never_wider_than_it_may_be_and_never_nothing_for_something() -> None:
    assert bar(8, 8, 4) == "████"
    assert bar(0, 8, 4) == ""
    assert bar(1e-9, 8, 4) == "▏"
    assert bar(5, 8, 4) == "██▌"
    lines = side_by_side(["a", "bb"], [[3, 1]], ["title"], width=4)
    assert lines == ["    title", " a  ████   75.00%", "bb  █▍     25.00%"]


@pytest.mark.parametrize("verb", ["layers", "rounding", "channels", "weights", "memory"])
def test_help_has_an_example(verb: str) -> None:
    assert f"Example: halfbyte inspect {verb}" in RUNNER.invoke(app, ["inspect", verb, "--help"]).output
