"""The command line as a user meets it: exit codes, what is printed where; whole processes where only they show it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import halfbyte
from tests.cli.verbs import run, run_process
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    result = run_process(
        "quantize", tiny_llama, "-o", folder / "out", "--calibration", folder / "text.txt",
        "--max-calib-samples", 4, "--max-calib-seq-len", 64, "--group-size", 32, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if " so far" not in line]
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
    small = ("--max-calib-samples", 2, "--max-calib-seq-len", 64)
    result = run("quantize", tiny_llama, "-o", tmp_path / "out", "--keep-lm-head", *small)
    assert result.returncode == 0, result.stderr
    assert "q_proj" in result.stdout
    assert "head" not in result.stdout
    assert "builtin: 2 blocks, 128 tokens" in result.stdout


def test_quantize_shows_the_bits_of_each_kind_where_they_differ(tiny_llama: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny_llama, "-o", tmp_path / "out", "--method", "rtn", "--target-bits", 5.25)
    assert result.returncode == 0, result.stderr
    assert "mean bits" in result.stdout
    assert "stored bits per quantized weight, 5.25 allowed" in result.stdout


def test_generate_streams_text_and_gives_json(quantized: tuple[Path, dict[str, object]]) -> None:
    text = run_process("generate", quantized[0], "The", "--max-new-tokens", 8)
    assert text.returncode == 0, text.stderr
    document = json.loads(run("generate", quantized[0], "The", "--max-new-tokens", 8, "--json").stdout)
    assert document["text"] + "\n" == text.stdout


def test_generate_takes_every_filter_and_says_why_it_ended(quantized: tuple[Path, dict[str, object]]) -> None:
    arguments = ["generate", quantized[0], "The", "--max-new-tokens", 8, "--temperature", 0.9, "--top-k", 40]
    arguments += ["--top-p", 0.9, "--min-p", 0.05, "--repetition-penalty", 1.1, "--seed", 3]
    whole = json.loads(run(*arguments, "--json").stdout)
    assert (whole["finish_reason"], whole["new_tokens"]) == ("length", 8)
    assert whole["tokens_per_second"] > 0
    stop = whole["text"][4:6]
    cut = json.loads(run(*arguments, "--stop", "never there", "--stop", stop, "--json").stdout)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def chatty(quantized: tuple[Path, dict[str, object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(quantized[0], folder)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_chat_answers_every_line_of_a_pipe(chatty: Path) -> None:
    arguments = ["chat", chatty, "--max-new-tokens", 6, "--system", "Crows.", "--temperature", 1, "--seed", 1]
    result = run(*arguments, "--json", stdin="One\n\nTwo\n/reset\nOne\n/exit\nThree\n")
    assert result.returncode == 0, result.stderr
    first, second, again = map(json.loads, result.stdout.splitlines())
    assert first["text"] == again["text"]
    assert second["prompt_tokens"] > first["prompt_tokens"] == again["prompt_tokens"]
    assert result.stderr.count("halfbyte: cut off after 6 tokens") == 3
    plain = run_process(*arguments, stdin="One\n")
    assert plain.stdout == first["text"] + "\n"


def test_chat_says_when_the_context_is_full(chatty: Path) -> None:
    result = run("chat", chatty, "--context", 40, stdin="One\nTwo\n")
    assert result.returncode == 2
    cut, refused = result.stderr.splitlines()
    assert cut == "halfbyte: cut off: the context of 40 tokens is full; /reset begins anew"
    assert refused.startswith("halfbyte: the context is full: ")


def test_chat_without_a_template_or_text_is_one_line(quantized: tuple[Path, dict[str, object]], chatty: Path) -> None:
    result = run("chat", quantized[0], stdin="One\n")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "its tokenizer has no chat template, so it cannot chat" in result.stderr
    binary = run("chat", chatty, stdin=b"\xff\n")
    assert binary.returncode == 2
    assert binary.stderr == "halfbyte: standard input: not UTF-8 text (byte 0); convert it first\n"


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(chatty: Path) -> None:
    with Terminal("chat", chatty, "--max-new-tokens", 100_000, "--context", 200_000) as terminal:
        terminal.read_until("> ")
        terminal.write("One\n")
        terminal.read_until("One\r\n")
        terminal.read_some()
        terminal.write("\x03")
        terminal.read_until("halfbyte: stopped\r\n")
        terminal.read_until("> ")
        assert terminal.press_until_it_ends("\x04") == 0


def test_at_a_terminal_ctrl_c_at_the_prompt_leaves(chatty: Path) -> None:
    with Terminal("chat", chatty) as terminal:
        terminal.read_until("> ")
        assert terminal.press_until_it_ends("\x03") == 0


class Terminal:
    """A whole process behind a pseudo-terminal."""

    def __init__(self, *arguments: object):
        pty = pytest.importorskip("pty")
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "halfbyte", *map(str, arguments)])
        self._seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def read_some(self) -> None:
        assert select.select([self._fd], [], [], 120)[0], f"nothing came after {self._seen!r}"
        self._seen += os.read(self._fd, 4096).decode(errors="replace")

    def read_until(self, text: str) -> None:
        while text not in self._seen:
            self.read_some()
        self._seen = self._seen.partition(text)[2]

    def press_until_it_ends(self, key: str) -> int:
        """A Ctrl-C in the instant before Python waits for keys is noticed with the next key only."""
        deadline = time.monotonic() + 120
        with suppress(OSError):  # the end of what a terminal has to say
            while time.monotonic() < deadline:
                self.write(key)
                while select.select([self._fd], [], [], 15)[0] and os.read(self._fd, 4096):
                    pass
        pid, self._pid = self._pid, 0
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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


def test_drafting_says_what_it_did(quantized: tuple[Path, dict[str, object]]) -> None:
    common = ["The crow", "--max-new-tokens", 12]
    plain = run("generate", quantized[0], *common)
    drafted = run("generate", quantized[0], *common, "--draft", "ngram", "--draft-length", 3)
    assert drafted.stdout == plain.stdout
    assert drafted.stderr.startswith("draft ngram: ")
    document = json.loads(run("generate", quantized[0], *common, "--draft", "ngram", "--json").stdout)
    assert {"drafted", "accepted", "emitted", "acceptance_rate", "tokens_per_pass"} <= set(document["speculation"])
    demo = ["demo", "speculative", "--model", quantized[0], "--draft", "ngram", "--prompt", "The crow sat and sat and"]
    found = run(*demo, "--max-new-tokens", 16)
    assert "the same text without the draft: yes" in found.stdout
    assert "tokens/s" in found.stdout
    assert json.loads(run(*demo, "--max-new-tokens", 16, "--json").stdout)["same_tokens"] is True


def test_bench_phases(quantized: tuple[Path, dict[str, object]]) -> None:
    common = ["bench", "phases", quantized[0], "--threads", 2, "--context", "2,5", "--steps", 2]
    document = json.loads(run(*common, "--json").stdout)
    assert [(r["context"], r["phase"]) for r in document["results"]][::13] == [
        (2, "embedding"), (2, "whole step"), (5, "head"),
    ]  # fmt: skip
    table = run(*common).stdout
    assert "whole step" in table
    assert "100.0%" in table


def test_bench_measures_samplers_without_a_model() -> None:
    cells = ["--batch", "1,3", "--drafts", 2, "--vocabulary", 500, "--threads", 1, "--seconds", 0]
    document = json.loads(run("bench", "sampler", *cells, "--json").stdout)
    assert [(r["batch"], r["implementation"]) for r in document["results"]] == [
        (batch, name) for batch in (1, 3) for name in ("reference", "vectorized", "native")
    ]
    for result in document["results"]:
        assert 2 * 500 * 4 * result["batch"] >= result["bytes_read"] >= 500 * 4 * result["batch"]
        assert result["floor_share"] == pytest.approx(result["floor_seconds"] / result["seconds"])
    assert "floor µs" in run("bench", "sampler", *cells).stdout


def test_the_sampler_demo_finds_every_implementation_right_and_the_wrong_one_wrong() -> None:
    document = json.loads(run("demo", "sampler", "--threads", 1, "--seconds", 0, "--json").stdout)
    assert document["equal_sequences"]["native"] == {"equal": 96, "of": 96}
    assert [fit["fits"] for fit in document["fits"]] == [True, True, True, False]
    assert len(document["speeds"]) == 9


def test_backends_says_what_is_picked_and_why() -> None:
    document = json.loads(run_process("backends", "--json", HALFBYTE_ISA="portable", HALFBYTE_THREADS="1").stdout)
    assert (document["tier"], document["threads"]) == ("portable", 1)
    assert [kernel["kernel"] for kernel in document["kernels"] if kernel["picked"]] == ["native"]
    assert "native" in run("backends").stdout


def test_doctor_finds_nothing_wrong_here_and_says_what_is_elsewhere() -> None:
    document = json.loads(run("doctor", "--json").stdout)
    assert document["problems"] == []
    result = run_process("doctor", HALFBYTE_ISA="mmx")
    assert result.returncode == 2
    assert "HALFBYTE_ISA=mmx: no such tier" in result.stdout


def test_models_list_names_the_sample() -> None:
    assert json.loads(run("models", "list", "--json").stdout)[0]["name"] == "sample:smollm2-135m"
    assert "sample:smollm2-135m" in run("models", "list").stdout


def test_the_version() -> None:
    assert run_process("--version").stdout == f"halfbyte {halfbyte.__version__}\n"


@pytest.mark.parametrize(
    "verb",
    [
        *("quantize", "generate", "chat", "eval", "backends", "doctor", "models list", "models pull"),
        *("bench decode", "bench prefill", "bench kernels", "bench phases", "bench sampler", "demo sampler"),
        "demo speculative",
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
        (["generate", "nowhere", ""], "prompt: empty; give at least one character"),
        (["generate", "nowhere", "hi", "--temperature", "-1"], "temperature: expected 0 or more"),
        (["generate", "nowhere", "hi", "--head-bits", "few"], "--head-bits few: expected auto, 16, 8, 6 or 4"),
        (["generate", "nowhere", "hi", "--min-p", "2"], "--min-p: expected a number in [0, 1]"),
        (["generate", "nowhere", "hi", "--stop", ""], "stop: expected strings of at least one character"),
        (["chat", "nowhere", "--repetition-penalty", "0"], "--repetition-penalty: expected more than 0"),
        (["eval", "nowhere", "--data", "none.txt"], "data none.txt: cannot be read"),
        (["quantize", "nowhere", "-o", "out"], "nowhere: no such folder"),
        (["quantize", "nowhere@awq-l2", "-o", "out"], "try: halfbyte quantize nowhere -o out --method awq-l2"),
        (["quantize", "nowhere", "-o", "out", "--bits", "5"], "bits: "),
        (["quantize", "nowhere", "-o", "out", "--method", "rtn", "--propagate"], "propagate: method rtn looks at no"),
        (["quantize", "nowhere", "-o", "out", "--bits", "3", "--target-bits", "4"], "--bits: --target-bits chooses"),
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
        (["bench", "sampler", "--acceptance", "0.5"], "acceptance: expected one of 0.3, 0.7, 0.95, got 0.5"),
        (["bench", "sampler", "--batch", "0"], "--batch 0: expected whole numbers from 1 on"),
        (["bench", "kernels", "nowhere", "--head-bits", "few"], "--head-bits few: expected auto"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("halfbyte: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forced_tier_this_cpu_lacks_is_one_line(quantized: tuple[Path, dict[str, object]]) -> None:
    result = run_process("generate", quantized[0], "The", HALFBYTE_ISA="mmx")
    assert result.returncode == 2
    assert result.stderr == (
        "halfbyte: HALFBYTE_ISA=mmx: no such tier; known are amx, avx512_vnni, avx_vnni, avx2, neon, portable\n"
    )


def test_a_cache_is_chosen_by_name(quantized: tuple[Path, dict[str, object]]) -> None:
    settings = ["--max-new-tokens", 4, "--cache"]
    assert run("generate", quantized[0], "The", *settings, "int8").returncode == 0
    result = run("generate", quantized[0], "The", *settings, "int4")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "halfbyte: --cache: expected auto, fp16 or int8, got 'int4'\n"


def test_a_reader_that_leaves_early_is_no_error(quantized: tuple[Path, dict[str, object]]) -> None:
    command = f"{sys.executable} -m halfbyte quantize --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
