"""What the command line says where something is not as expected: options as typed, models as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli import app, convert, profile, quantize, verify
from halfbyte.cli.render import name_options


def refusal(*arguments: object) -> str:
    """The one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is not None
    assert result.stdout == ""
    return str(result.exception)


@pytest.mark.parametrize(
    ("verb", "given", "message", "expected"),
    [
        (quantize, {"tp_align": 4}, "tp_align 4: 9 heads", "--tp-align 4: 9 heads"),
        (quantize, {"group_size": "auto"}, 'group_size "auto": none', '--group-size "auto": none'),
        (quantize, {"group_size": "128"}, "group_size 128 does not divide", "--group-size 128 does not divide"),
        (quantize, {}, 'bits: 4 only; use format="native"', "--bits: 4 only; use --format native"),
        (quantize, {}, "use -1 or add it to modules_to_not_convert", "use -1 or add it to --skip"),
        (quantize, {}, "shorter blocks, max_calib_seq_len, need", "shorter blocks, --max-calib-seq-len, need"),
        (verify, {"engine": ["vllm", "vlm"]}, "engine 'vlm': rules are", "--for 'vlm': rules are"),
        (
            profile,
            {"model": "big"},
            "model 'big': not known; use model_dim",
            "--model 'big': not known; use --model-dim",
        ),
        # What stays: names of files and tensors, other spellings, sentences, arguments.
        (
            quantize,
            {},
            "tensor group_size.weight: in /tmp/group_size/x",
            "tensor group_size.weight: in /tmp/group_size/x",
        ),
        (quantize, {}, "such as @awq:group_size=32,bits=3", "such as @awq:group_size=32,bits=3"),
        (quantize, {"calibration": "my.txt"}, "calibration blocks are short", "calibration blocks are short"),
        (convert, {"output": Path("x")}, "output x: exists", "output x: exists"),
    ],
)
def test_options_are_named_as_they_were_typed(
    verb: object, given: dict[str, object], message: str, expected: str
) -> None:
    assert name_options(message, verb.command, given) == expected  # type: ignore[attr-defined]


def test_eval_that_would_measure_nothing_is_refused() -> None:
    said = refusal("eval", "nowhere", "--skip-perplexity", "--skip-speed")
    assert said == "--skip-perplexity and --skip-speed: leave nothing to measure; give one of them, or --tasks"


def test_eval_on_no_text_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    said = refusal("eval", "nowhere", "--data", tmp_path / "empty.txt")
    assert said == f"--data {tmp_path / 'empty.txt'}: holds no text; give a file with some"


@pytest.mark.parametrize("verb", [("backends",), ("convert", "--format", "gptq"), ("convert", "--format", "gguf")])
def test_a_model_is_named_as_it_was_typed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HOME", str(tiny_llama.parent))
    typed = f"~/{tiny_llama.name}"
    output = [tmp_path / "out"] if verb[0] == "convert" else []
    assert refusal(verb[0], typed, *output, *verb[1:]).startswith(f"{typed}: is not quantized")
