"""Decoding and prefill on the CPU: halfbyte in bf16 and 4 bits beside llama.cpp and OpenVINO, in turn in one run.

    python benchmarks/cpu_decode.py --data ../shared/data
    python benchmarks/cpu_decode.py --data ../shared/data --int4 smollm2-4bit --llama-cpp llama/bin/python \
        --openvino openvino/bin/python --folder /tmp/peers

Everyone computes with models made from the same weights and is given the same token ids, of the WikiText-2 test text.
Each is a process of its own that sleeps between its turns (peers/serving.py); the CPU time it takes there is printed,
for it would disturb the others. A turn is `--steps` steps of one token a sequence, the first of them not counted;
medians are over all steps of all rounds. `share` is the bytes a step must read (weights, output head, keys and values)
over the time it took, as a share of the bandwidth that is measured in the same run, with the same threads, on a buffer
as large as the weights.

A fast model may be a worse one: perplexity of the first windows of the text, each window alone, stands beside the
speed. A comparison counts only where ours in 4 bits is no worse than the peer's plus 1 %.

The peers live in environments of their own, because they want other versions of what halfbyte needs:

    python -m venv llama && llama/bin/pip install llama-cpp-python
    python -m venv openvino && openvino/bin/pip install torch==2.13.0 openvino nncf optimum-intel

llama-cpp-python has no wheels on PyPI: it builds llama.cpp from source, a quarter of an hour on two cores, for the CPU
it is built on. Where that has AMX, its build with AMX can crash; CMAKE_ARGS="-DGGML_AMX_INT8=OFF" leaves it out. A
torchvision that does not fit the torch beside it breaks optimum-intel, which does not need it: openvino/bin/pip
uninstall torchvision.

Prints tables, then one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers.live import Live
from peers.llama_gguf import step_bytes, write_gguf

from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.cli.render import megabytes, print_table
from halfbyte.device.cpu import cpu_info, read_bandwidth

PEERS = Path(__file__).parent / "peers"
OURS = "halfbyte int4"
LLAMA_KINDS = ("BF16", "Q4_0", "Q4_1", "Q4_K_M")
GROUP_SIZE = 64
# How much worse than a peer's model ours may be for the comparison to count.
TOLERANCE = 0.01


def has_package(python: str, package: str) -> bool:
    """Whether that interpreter has it; asked without importing it, which takes seconds."""
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    try:
        return subprocess.run([python, "-c", question], check=False).returncode == 0
    except OSError as error:
        raise SystemExit(f"{python}: {error.strerror}") from error


def make(output: Path, command: Sequence[str | Path]) -> Path:
    """Run a command that writes `output`, unless it is there already."""
    if not output.exists():
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if run.returncode or not output.exists():
            raise RuntimeError(f"{' '.join(map(str, command))}: exit code {run.returncode}\n{run.stderr[-4000:]}")
    return output


def ours(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Name → command of halfbyte's contestants."""
    quantized = (
        resolve_model(options.int4)
        if options.int4
        else make(
            folder / "int4",
            [
                *(sys.executable, "-m", "halfbyte", "quantize", model, "-o", folder / "int4"),
                *("--method", options.method, "--group-size", str(GROUP_SIZE)),
                *("--calibration", options.data / "c4_calibration_sample.txt"),
            ],
        )
    )
    driver = PEERS / "run_halfbyte.py"
    commands = {"halfbyte bf16": [sys.executable, driver, model], OURS: [sys.executable, driver, quantized]}
    if options.transformers:
        commands["transformers bf16"] = [sys.executable, driver, model, "--backend", "transformers"]
        commands["transformers int4"] = [sys.executable, driver, quantized, "--backend", "transformers"]
    return commands


def llama_cpp(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Name → command of llama.cpp's formats, all made from one bf16 file."""
    driver, source = PEERS / "run_llama_cpp.py", folder / "BF16.gguf"
    if not source.exists():
        write_gguf(model, source)
    commands = {}
    for kind in options.llama_kinds:
        file = folder / f"{kind}.gguf"
        make(file, [options.llama_cpp, driver, source, "--quantize", kind, file])
        commands[f"llama.cpp {kind}"] = [options.llama_cpp, driver, file]
    return commands


def openvino(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Name → command of OpenVINO's 4 bits."""
    driver, output = PEERS / "run_openvino.py", folder / "openvino-int4"
    make(output, [options.openvino, driver, model, "--export", output, "--group-size", str(GROUP_SIZE)])
    return {"OpenVINO int4": [options.openvino, driver, output]}


class Contest:
    """Live contestants and what was measured of them.

    Attributes:
        facts: name → what it is: bytes read, versions, perplexity, idle CPU time.
        results: of decoding and prefill, a document for each contestant in each cell.
        failed: name → how it ended.
    """

    def __init__(self, commands: dict[str, list[str | Path]], ids: list[int], stack: ExitStack):
        self._ids = ids
        self._live: dict[str, Live] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.results: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        for name, command in commands.items():
            try:
                self._live[name] = stack.enter_context(Live(name, command))
            except RuntimeError as error:
                self._drop(name, error)
        for name, answer in self._everyone("describe").items():
            if "weight_bytes" not in answer:
                answer["weight_bytes"] = step_bytes(Path(commands[name][-1]))
            self.facts[name] = answer

    def _drop(self, name: str, error: RuntimeError) -> None:
        """The others go on: hours are not lost for one."""
        self._live.pop(name, None)
        self.failed[name] = str(error)
        print(error, file=sys.stderr)

    def _everyone(self, action: str, **arguments: Any) -> dict[str, dict[str, Any]]:
        answers = {}
        for name, live in list(self._live.items()):
            try:
                answers[name] = live.ask(action, **arguments)
            except RuntimeError as error:
                self._drop(name, error)
        return answers

    def score(self, windows: Path, threads: int) -> None:
        """Perplexity of everyone's model on the same windows."""
        self._everyone("threads", count=threads)
        for name, answer in self._everyone("score", windows=str(windows)).items():
            self.facts[name]["perplexity"] = answer["perplexity"]

    def _part(self, sequences: int, tokens: int) -> list[list[int]]:
        """So many pieces of the text, one after the other, from its start again where it ends."""
        count = len(self._ids)
        return [[self._ids[(s * tokens + i) % count] for i in range(tokens)] for s in range(sequences)]

    def decode(self, context: int, batch: int, threads: Sequence[int], steps: int, rounds: int) -> None:
        """One cell: everyone fills its context once, with all threads, then takes turns with each number of them."""
        text = self._part(batch, context + steps + 1)
        columns = [[row[i] for row in text] for i in range(context, context + steps + 1)]
        self._everyone("threads", count=max(threads))
        self._everyone("start", sequences=batch, capacity=context + steps + 1)
        self._everyone("fill", prompts=[row[:context] for row in text])
        positions = context + 1 + steps // 2
        for count in threads:
            cell = {"what": "decode", "context": context, "batch": batch, "threads": count}
            for name, answers in self._turns(count, rounds, lambda: self._everyone("decode", steps=columns)).items():
                seconds = statistics.median(s for answer in answers for s in answer["seconds"])
                weights = self.facts[name]["weight_bytes"]
                read = weights + batch * positions * self.facts[name]["cache_bytes"]
                bandwidth = read_bandwidth(weights, threads=count)
                speed = {"tokens_per_second": batch / seconds, "seconds": seconds, "bytes_read": read}
                share = {"bandwidth": bandwidth, "bandwidth_share": read / seconds / bandwidth}
                self.results.append({**cell, "engine": name, **speed, **share})

    def prefill(self, tokens: int, threads: Sequence[int], rounds: int) -> None:
        """Prompts one at a time, from an empty cache to the logits of the last token; the first round warms up."""
        prompts = self._part(1, tokens)
        self._everyone("start", sequences=1, capacity=tokens)
        for count in threads:
            cell = {"what": "prefill", "context": tokens, "batch": 1, "threads": count}
            turns = self._turns(count, rounds + 1, lambda: self._everyone("prefill", prompts=prompts))
            for name, answers in turns.items():
                seconds = statistics.median(answer["seconds"] for answer in answers[1:])
                speed = {"tokens_per_second": tokens / seconds, "seconds": seconds}
                self.results.append({**cell, "engine": name, **speed})

    def _turns(
        self, threads: int, rounds: int, turn: Callable[[], dict[str, dict[str, Any]]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Everyone's answers, one for each round; of those who lasted."""
        self._everyone("threads", count=threads)
        answers: dict[str, list[dict[str, Any]]] = {}
        for _ in range(rounds):
            for name, answer in turn().items():
                answers.setdefault(name, []).append(answer)
        return {name: given for name, given in answers.items() if name in self._live}

    def finish(self) -> None:
        """Ratios to ours, which comparisons count, and how quietly everyone waited."""
        cells = {
            (r["what"], r["context"], r["batch"], r["threads"]): r["tokens_per_second"]
            for r in self.results
            if r["engine"] == OURS
        }
        for result in self.results:
            ours = cells.get((result["what"], result["context"], result["batch"], result["threads"]))
            if ours is not None:
                result["ours_ratio"] = ours / result["tokens_per_second"]
        own = self.facts.get(OURS, {}).get("perplexity")
        for name, facts in self.facts.items():
            if own is not None and "perplexity" in facts:
                facts["counts"] = own <= facts["perplexity"] * (1 + TOLERANCE)
            if name in self._live:
                facts["idle_cpu_seconds"] = self._live[name].idle_seconds


def print_facts(contest: Contest) -> None:
    rows = []
    for name, facts in contest.facts.items():
        perplexity = f"{facts['perplexity']:.3f}" if "perplexity" in facts else ""
        counts = {True: "yes", False: "no: ours is worse", None: ""}[None if name == OURS else facts.get("counts")]
        idle = f"{facts['idle_cpu_seconds']:.2f} s" if "idle_cpu_seconds" in facts else "ended"
        rows.append((name, megabytes(facts["weight_bytes"]), f"{facts['cache_bytes']:,} B", perplexity, counts, idle))
    columns = ("engine", "weights a step reads", "cache a token", "perplexity", "comparison counts", "CPU while idle")
    print_table(columns, rows)


def print_results(contest: Contest, what: str) -> None:
    rows = []
    for result in sorted(contest.results, key=lambda r: (r["threads"], r["context"], r["batch"])):
        if result["what"] == what:
            row = [*(str(result[key]) for key in ("threads", "context", "batch", "engine"))]
            row += [
                f"{result['tokens_per_second']:.1f}",
                f"{result['ours_ratio']:.2f}" if "ours_ratio" in result else "",
            ]
            if "bandwidth" in result:
                row.append(f"{result['bytes_read'] / result['seconds'] / 1e9:.1f}")
                row.append(f"{result['bandwidth_share']:.0%} of {result['bandwidth'] / 1e9:.1f}")
            rows.append(row)
    columns = ("threads", "context", "batch", "engine", "tok/s", f"{OURS} ÷ it", "GB/s", "share")
    if rows:
        print_table(columns[: len(rows[0])], rows, what)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="sample:smollm2-135m", help="a Llama; llama.cpp's file is made from it")
    parser.add_argument("--int4", help="a 4-bit checkpoint of it; made with --method otherwise")
    parser.add_argument("--method", default="awq")
    parser.add_argument("--llama-cpp", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--llama-kinds", nargs="*", choices=LLAMA_KINDS, default=LLAMA_KINDS)
    parser.add_argument("--openvino", default=sys.executable, help="an interpreter that has openvino and optimum-intel")
    parser.add_argument("--transformers", action="store_true", help="run both of ours in transformers, too")
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help="as the tables name them")
    parser.add_argument("--folder", type=Path, help="where models are made, and kept; a temporary folder otherwise")
    parser.add_argument("--contexts", type=int, nargs="*", default=[0, 512, 2048])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a prompt; 0 for none")
    parser.add_argument("--steps", type=int, default=16, help="counted in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=12, help="of 1,024 tokens, for the perplexity; 0 for none")
    return parser.parse_args()


def prepare(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, list[str | Path]]:
    """Everyone's model, and the command that runs it; peers that are not there are left out, and said."""
    commands = ours(options, model, folder)
    for package, python, add in (
        ("llama_cpp", options.llama_cpp, llama_cpp),
        ("openvino", options.openvino, openvino),
    ):
        if not has_package(python, package):
            print(f"{package}: not in {python}; its rows are left out. How to get it: --help")
            continue
        try:
            commands |= add(options, model, folder)
        except RuntimeError as error:
            print(error, file=sys.stderr)
    unknown = set(options.only or ()) - set(commands)
    if unknown:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(commands)}")
    return {name: command for name, command in commands.items() if not options.only or name in options.only}


def main() -> None:
    options = parse_options()
    model = resolve_model(options.model)
    text = (options.data / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(model)(text, add_special_tokens=False, verbose=False)["input_ids"]
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        contest = Contest(prepare(options, model, folder), ids, stack)
        if options.windows:
            windows = folder / "windows.json"
            windows.write_text(json.dumps([ids[i * 1024 : (i + 1) * 1024] for i in range(options.windows)]))
            contest.score(windows, max(options.threads))
        for context in options.contexts:
            for batch in options.batches:
                contest.decode(context, batch, options.threads, options.steps, options.rounds)
        if options.prefill:
            contest.prefill(options.prefill, options.threads, options.rounds)
        contest.finish()
    print_facts(contest)
    for what in ("decode", "prefill"):
        print_results(contest, what)
    document = {
        "benchmark": "cpu_decode",
        "machine": vars(cpu_info()),
        "rounds": options.rounds,
        "steps": options.steps,
        "windows": options.windows,
        "engines": contest.facts,
        "results": contest.results,
        "failed": contest.failed,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
