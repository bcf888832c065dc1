"""The command line as a user meets it: whole processes, exit codes, what is printed where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TEXT


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "halfbyte", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120
    )


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    result = run(
        "quantize", tiny_llama, "-o", folder / "out", "--calibration", folder / "text.txt",
        "--max-calib-samples", 4, "--max-calib-seq-len", 64, "--group-size", 32, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    report: dict[str, object] = json.loads(result.stdout)
    return folder / "out", report


def test_quantize_prints_its_report_as_json(quantized: tuple[Path, dict[str, object]]) -> None:
    folder, report = quantized
    assert report["output_dir"] == str(folder)
    assert len(report["linears"]) == 14  # type: ignore[arg-type]


def test_quantize_propagates_when_told_to(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ["--max-calib-samples", 2, "--max-calib-seq-len", 32, "--n-grid", 2, "--propagate", "--json"]
    result = run("quantize", tiny_llama, "-o", tmp_path / "out", *settings)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["config"]["propagate"] is True


def test_quantize_prints_a_table(tiny_llama: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_llama, "-o", tmp_path / "out", "--max-calib-samples", 2, "--max-calib-seq-len", 64)
    assert result.returncode == 0, result.stderr
    assert "q_proj" in result.stdout
    assert "builtin: 2 blocks, 128 tokens" in result.stdout


def test_quantize_shows_the_bits_of_each_kind_where_they_differ(tiny_llama: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_llama, "-o", tmp_path / "out", "--method", "rtn", "--target-bits", 5.25)
    assert result.returncode == 0, result.stderr
    assert "mean bits" in result.stdout
    assert "stored bits per quantized weight, 5.25 allowed" in result.stdout


def test_generate_streams_text_and_gives_json(quantized: tuple[Path, dict[str, object]]) -> None:
    text = run("generate", quantized[0], "The", "--max-new-tokens", 8)
    assert text.returncode == 0, text.stderr
    document = json.loads(run("generate", quantized[0], "The", "--max-new-tokens", 8, "--json").stdout)
    assert document["text"] + "\n" == text.stdout


def test_eval_measures_both(quantized: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["eval", quantized[0], "--data", tmp_path / "text.txt", "--window", 64, "--max-windows", 2]
    arguments += ["--prompt-tokens", 8, "--new-tokens", 3]
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["perplexity"]["tokens"] == 126
    assert document["throughput"]["decode_tokens_per_second"] > 0
    assert document["kernels"] == {"a8": 14}
    table = run(*arguments)
    assert table.returncode == 0, table.stderr
    for word in ("perplexity", "prefill", "decode", "14 × a8"):
        assert word in table.stdout


def test_bench_measures_steps_prompts_and_kernels(quantized: tuple[Path, dict[str, object]]) -> None:
    common = ["--threads", "1,2", "--rounds", 1, "--compute", "a16", "--head-bits", 16]
    cells = ["--context", "2,5", "--batch", "1,3"]
    decode = run("bench", "decode", quantized[0], *common, *cells, "--steps", 2, "--json")
    assert decode.returncode == 0, decode.stderr
    document = json.loads(decode.stdout)
    assert (document["benchmark"], document["kernels"]) == ("decode", {"a16": 14})
    expected = [(t, c, b) for t in (1, 2) for c in (2, 5) for b in (1, 3)]
    assert [(r["threads"], r["context"], r["batch"]) for r in document["results"]] == expected
    for result in document["results"]:
        assert result["head_bytes"] == 320 * 64 * 2
        assert result["bandwidth_share"] == pytest.approx(result["bytes_per_second"] / result["bandwidth"])
    document = json.loads(run("bench", "prefill", quantized[0], *common, *cells, "--json").stdout)
    assert [(r["threads"], r["context"], r["batch"]) for r in document["results"]] == expected
    document = json.loads(run("bench", "kernels", quantized[0], *common, "--rows", "1,2", "--json").stdout)
    assert {result["form"] for result in document["results"]} == {"a16", "half"}
    assert len(document["results"]) == 2 * 2 * 5


@pytest.mark.parametrize(
    ("verb", "words"),
    [("decode", ("MB/token", "tok/s", "share")), ("prefill", ("GFLOP/s",)), ("kernels", ("to M = 1", "320 × 64"))],
)
def test_bench_prints_a_table(quantized: tuple[Path, dict[str, object]], verb: str, words: tuple[str, ...]) -> None:
    table = run("bench", verb, quantized[0], "--rounds", 1, *(["--context", 3] if verb != "kernels" else []))
    assert table.returncode == 0, table.stderr
    for word in ("14 × a8", *words):
        assert word in table.stdout


def test_backends_says_what_is_picked_and_why() -> None:
    document = json.loads(run("backends", "--json", HALFBYTE_ISA="portable", HALFBYTE_THREADS="1").stdout)
    assert (document["tier"], document["threads"]) == ("portable", 1)
    assert [kernel["kernel"] for kernel in document["kernels"] if kernel["picked"]] == ["native"]
    assert "native" in run("backends").stdout


def test_doctor_finds_nothing_wrong_here_and_says_what_is_elsewhere() -> None:
    document = json.loads(run("doctor", "--json").stdout)
    assert document["problems"] == []
    result = run("doctor", HALFBYTE_ISA="mmx")
    assert result.returncode == 2
    assert "HALFBYTE_ISA=mmx: no such tier" in result.stdout


def test_models_list_names_the_sample() -> None:
    assert json.loads(run("models", "list", "--json").stdout)[0]["name"] == "sample:smollm2-135m"
    assert "sample:smollm2-135m" in run("models", "list").stdout


@pytest.mark.parametrize(
    "verb",
    [
        *("quantize", "generate", "eval", "backends", "doctor", "models list", "models pull"),
        *("bench decode", "bench prefill", "bench kernels"),
    ],
)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = run(*verb.split(), "--help")
    assert result.returncode == 0
    assert f"Example: halfbyte {verb}" in " ".join(result.stdout.split())
    assert "--json" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "hi"], "nowhere: no such folder"),
        (["generate", "nowhere", "hi", "--temperature", "-1"], "temperature: expected 0 or more"),
        (["eval", "nowhere", "--data", "none.txt"], "--data none.txt: cannot be read"),
        (["quantize", "nowhere", "-o", "out"], "nowhere: no such folder"),
        (["quantize", "nowhere", "-o", "out", "--bits", "5"], "bits: "),
        (["quantize", "nowhere", "-o", "out", "--method", "rtn", "--propagate"], "propagate: method rtn looks at no"),
        (["quantize", "nowhere", "-o", "out", "--bits", "3", "--target-bits", "4"], "bits: target_bits chooses"),
        (["quantize", "nowhere", "-o", "out", "--group-size", "big"], "--group-size big"),
        (["quantize", "nowhere", "-o", "out", "--duo-scaling", "maybe"], "--duo-scaling maybe"),
        (["quantize", "nowhere", "-o", "out", "--calibration", "none.txt"], "nowhere: no such folder"),
        (["backends", "--in-features", "0"], "expected positive numbers"),
        (["models", "pull", "sample:none"], "no such sample model"),
        (["bench", "decode"], "MODEL or --shape: expected one of them"),
        (["bench", "decode", "nowhere", "--shape", "1b"], "MODEL or --shape: expected one of them"),
        (["bench", "decode", "nowhere"], "nowhere: no such folder"),
        (["bench", "decode", "nowhere", "--context", "0,many"], "--context 0,many: expected whole numbers from 0 on"),
        (["bench", "prefill", "nowhere", "--context", "0"], "--context 0: expected whole numbers from 1 on"),
        (["bench", "prefill", "--shape", "9b"], "shape: expected 1b, got '9b'"),
        (["bench", "kernels", "nowhere", "--threads", "0"], "--threads 0: expected whole numbers from 1 on"),
        (["bench", "kernels", "nowhere", "--head-bits", "few"], "--head-bits few: expected auto"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "halfbyte", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("halfbyte: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forced_tier_this_cpu_lacks_is_one_line(quantized: tuple[Path, dict[str, object]]) -> None:
    result = run("generate", quantized[0], "The", HALFBYTE_ISA="mmx")
    assert result.returncode == 2
    assert result.stderr == ("halfbyte: HALFBYTE_ISA=mmx: no such tier; known are avx512_vnni, avx2, portable\n")


def test_a_reader_that_leaves_early_is_no_error(quantized: tuple[Path, dict[str, object]]) -> None:
    command = f"{sys.executable} -m halfbyte quantize --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
