"""What quantizing costs and what it keeps: seconds, peak memory and perplexity, beside llm-compressor's.

    python benchmarks/quantize.py --data ../shared/data
    python benchmarks/quantize.py --data ../shared/data --peer peer/bin/python

DATA holds wikitext2_raw_test.txt and c4_calibration_sample.txt. Everyone quantizes the same model on the same 32 × 512
tokens of C4, to 4 bits in groups of 64 with a zero point, each run in a process of its own, so that its peak memory is
its own. Importing is not timed; loading, searching and writing the checkpoint are. Every checkpoint is then scored by
halfbyte on the first 12 windows of 1,024 tokens of the WikiText-2 test text, each window alone; the peer's, which has
no kernel here, is first decompressed to fp32 by the library that wrote it.

The peer wants other versions of transformers, so it lives in an environment of its own:

    python -m venv peer
    peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

Its defaults are used, with two exceptions: AWQ tries both families of scales, as halfbyte's does, and it computes in
fp32 (--peer-dtype), which without bf16 instructions is several times faster but takes more memory. Prints a table, then
one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.cli.render import megabytes, print_table
from halfbyte.device.cpu import cpu_info
from halfbyte.evaluation.perplexity import measure_perplexity
from halfbyte.generation.model import load
from halfbyte.quantization.calibration import CalibrationSet, build_calibration_set, read_documents
from halfbyte.quantization.config import METHODS

GROUP_SIZE = 64
PEER = "llm-compressor"
PEER_DRIVER = Path(__file__).parent / "peers" / "llm_compressor.py"
PEER_METHODS = ("rtn", "awq", "gptq")
GET_PEER = (
    "python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1, then --peer peer/bin/python"
)
# Which of ours a method of the peer is compared with: the first that was run.
COUNTERPARTS = {"rtn": ("rtn",), "awq": ("awq",), "gptq": ("gptq", "best")}


def run_alone(command: Sequence[str | Path]) -> dict[str, Any]:
    """Run a command that prints JSON last, below a shell.

    A process begins its peak with that of the one that started it (Linux keeps it through exec), which here has torch
    loaded. The shell in between is small, and what it forks begins anew.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *map(str, command)]
    run = subprocess.run(shell, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {run.returncode}\n{run.stderr[-4000:]}")
    start = 0 if run.stdout.startswith("{") else run.stdout.rstrip().rfind("\n") + 1
    result: dict[str, Any] = json.loads(run.stdout[start:])
    return result


def quantize_ours(model: Path, text: Path, method: str, folder: Path, samples: int, tokens: int) -> dict[str, Any]:
    """`halfbyte quantize` in a process of its own."""
    report = run_alone(
        [
            *(sys.executable, "-m", "halfbyte", "quantize", model, "-o", folder, "--method", method),
            *("--group-size", str(GROUP_SIZE), "--calibration", text, "--json"),
            *("--max-calib-samples", str(samples), "--max-calib-seq-len", str(tokens)),
        ]
    )
    calibration = report["calibration"] or {}
    return {
        "by": "halfbyte",
        "method": method,
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "linears": len(report["linears"]),
        "calibration_sha256": calibration.get("sha256"),
        "threads": report["threads"],
        "versions": report["versions"],
        "folder": folder,
    }


def quantize_peer(python: str, model: Path, blocks: Path, method: str, folder: Path, dtype: str) -> dict[str, Any]:
    """The driver of the peer, in the peer's interpreter."""
    report = run_alone(
        [
            *(python, PEER_DRIVER, model, folder, "--method", method, "--tokens", blocks),
            *("--group-size", str(GROUP_SIZE), "--dtype", dtype),
        ]
    )
    return {"by": PEER, "method": method, **report, "dtype": dtype, "folder": folder / "plain"}


def has_peer(python: str) -> bool:
    """Whether that interpreter has llm-compressor; asked without importing it, which takes seconds."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    try:
        return subprocess.run([python, "-c", question], check=False).returncode == 0
    except OSError as error:
        raise SystemExit(f"--peer {python}: {error.strerror}") from error


def write_blocks(calibration: CalibrationSet, file: Path) -> None:
    """The token ids, as the peer reads them."""
    file.write_text(json.dumps([block.tolist() for block in calibration.blocks]), encoding="utf-8")


def versus(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> tuple[float, str] | None:
    """How many times as long as which of our methods a run of the peer took."""
    ours = {other["method"]: other["seconds"] for other in results if other["by"] == "halfbyte"}
    rival = next((name for name in COUNTERPARTS.get(result["method"], ()) if name in ours), None)
    if result["by"] == "halfbyte" or rival is None:
        return None
    return result["seconds"] / ours[rival], rival


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=("rtn", "awq", "best"))
    parser.add_argument("--peer", default=sys.executable, help="an interpreter that has llm-compressor")
    parser.add_argument("--peer-methods", nargs="*", choices=PEER_METHODS, default=PEER_METHODS)
    parser.add_argument("--peer-dtype", default="float32", help="float32, or auto for the model's own")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="in a calibration block")
    parser.add_argument("--windows", type=int, default=12, help="of the test text")
    return parser.parse_args()


def main() -> None:
    """Quantize everything first, then score."""
    options = parse_options()
    c4 = options.data / "c4_calibration_sample.txt"
    test = (options.data / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    peer = has_peer(options.peer)
    if not peer:
        print(f"{PEER}: not in {options.peer}; its rows are left out. To get it: {GET_PEER}")
    model = resolve_model(options.model)
    calibration = build_calibration_set(
        load_tokenizer(model),
        read_documents(c4),
        max_calib_samples=options.samples,
        max_calib_seq_len=options.tokens,
        seed=0,
    )
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_blocks(calibration, folder / "blocks.json")
        for method in options.methods:
            output = folder / f"ours-{method}"
            results.append(quantize_ours(model, c4, method, output, options.samples, options.tokens))
        for method in options.peer_methods if peer else ():
            output, blocks = folder / f"peer-{method}", folder / "blocks.json"
            try:
                results.append(quantize_peer(options.peer, model, blocks, method, output, options.peer_dtype))
            except RuntimeError as error:  # hours of the other methods are not lost for it
                failed.append(method)
                print(error, file=sys.stderr)
        for result in results:
            result["perplexity"] = measure_perplexity(
                load(result.pop("folder")), test, max_windows=options.windows
            ).perplexity
            ratio = versus(result, results)
            if ratio is not None:
                result["ratio"], result["ratio_to"] = ratio
    rows = [
        (
            result["by"],
            result["method"],
            f"{result['seconds']:.1f} s",
            f"{result['ratio']:.2f} × {result['ratio_to']}" if "ratio" in result else "",
            megabytes(result["peak_memory_bytes"]),
            f"{result['perplexity']:.2f}",
        )
        for result in results
    ]
    print_table(("", "method", "time to quantize", "ratio to ours", "peak memory", "perplexity"), rows)
    document = {
        "benchmark": "quantize",
        "machine": vars(cpu_info()),
        "bits": 4,
        "group_size": GROUP_SIZE,
        "calibration": calibration.describe(),
        "windows": options.windows,
        "results": results,
        "peer_failed": failed,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
