from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from halfbyte.conversion.targets import TARGETS
from halfbyte.errors import HalfbyteError
from halfbyte.formats.layouts import read_layout
from tests.cli.verbs import run
from tests.hostile.broken_linears import NAME, Linear, broken, sound


def unpack(linear: Linear) -> None:
    section, tensors = linear
    layout = read_layout({"quantization_config": section})
    assert layout is not None
    layout.unpack({key: tensor for key, tensor in tensors.items() if key in layout.keys}, NAME)


def refusal(linear: Linear) -> str | None:
    try:
        unpack(linear)
    except HalfbyteError as error:
        return str(error)
    return None


@pytest.mark.parametrize("layout", TARGETS)
def test_a_sound_linear_opens(layout: str) -> None:
    unpack(sound(layout))


@pytest.mark.parametrize("layout", TARGETS)
def test_each_change_is_refused_in_one_line(layout: str) -> None:
    kinds = dict(broken(layout))
    assert len(kinds) > 50
    for what, linear in kinds.items():
        message = refusal(linear)
        assert message is not None, what
        assert message.isprintable(), what
        assert len(message) < 1000, what


@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_the_command_line_names_the_tensor(verb: str, quantized_llama: Path, tmp_path: Path) -> None:
    """A scale that is NaN: generate stops with one line, verify reports it with the exit code of a finding."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in quantized_llama.iterdir():
        if path.name != "halfbyte_manifest.json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run(verb, folder, {"generate": "x", "verify": "--json"}[verb])
    expected = "tensor model.layers.1.mlp.up_proj.scales: holds values that are not finite; the checkpoint is damaged"
    if verb == "generate":
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"halfbyte: {expected}\n")
    else:
        checks = json.loads(result.stdout)["checks"]
        assert (result.returncode, [problem for check in checks for problem in check["problems"]]) == (1, [expected])
