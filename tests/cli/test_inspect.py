"""`halfbyte inspect folds`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app
from halfbyte.cli.inspect import shorten

RUNNER = CliRunner()


def test_folds_are_printed_with_their_deviation_and_what_was_rejected(tiny_llama: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "folds", str(tiny_llama)])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "model.layers.0 (LlamaDecoderLayer), and 1 more blocks like it"
    found = [line.split(maxsplit=3) for line in lines[1:]]
    assert [fields[0] for fields in found] == ["yes"] * 4 + ["no"] * 3
    assert all(float(fields[1]) < 1e-8 for fields in found[:4])
    assert all(float(fields[1]) > 1e-3 for fields in found[4:])
    assert "input_layernorm → self_attn.q_proj, k_proj, v_proj" in lines[1]


def test_folds_as_json(tiny_llama: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "folds", str(tiny_llama), "--all", "--json"])
    blocks = json.loads(result.stdout)
    assert [block["name"] for block in blocks] == ["model.layers.0", "model.layers.1"]
    (value,) = [fold for fold in blocks[0]["folds"] if fold["kind"] == "value" and fold["found"]]
    assert (value["producer"], value["consumers"], value["channels"]) == (
        "self_attn.v_proj", ["self_attn.o_proj"], 32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.b", "a.c", "d.b"], "a.b, c, d.b"),
        (["mlp.experts.0.up", "mlp.experts.1.up", "mlp.gate"], "mlp.experts.*.up, mlp.gate"),
        (["fc1"], "fc1"),
    ],
)
def test_names_are_shortened(names: list[str], expected: str) -> None:
    assert shorten(names) == expected


def test_help_has_an_example() -> None:
    assert "Example: halfbyte inspect folds" in RUNNER.invoke(app, ["inspect", "folds", "--help"]).output
