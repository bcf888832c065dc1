"""The first things to do on a GPU, in one command: is it right, does a sanitizer find anything, how fast is it.

    python benchmarks/gpu_first_contact.py [--output build/first-contact] [--seconds 1500] [--only tests memcheck ...]

Every step is a process of its own and may take so long; one that fails is noted, and the next goes on. The folder gets
first_contact.json (of each step the command, how it ended, seconds, and the JSON document of a benchmark's last line)
and first_contact.log (all that was printed), both after every step, so that what was found outlives a machine that is
taken away. compute-sanitizer is left out where it is not installed. Exits with 0 if no step failed, 1 if one did, 2
where there is no GPU: the steps then only show that their commands are right.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_common import describe, find_gpu

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.cuda_build import compiler_version

ROOT = Path(__file__).parents[1]
NEEDS_GPU = "needs an NVIDIA GPU"
# All that have tests for a GPU: where a machine has little more than torch, others cannot even be collected.
KERNEL_TESTS = ("tests/kernels/test_w4a16_on_gpu.py", "tests/sampling/test_rejection_on_gpu.py")
TESTS = (*KERNEL_TESTS, "tests/runtime/test_decoder_on_gpu.py", "tests/device/test_timing.py")
# A sanitizer slows everything down: small shapes, no graphs.
SMALL = "100-200 or 600-1000"
PACKAGES = ("torch", "triton", "transformers", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy")
LEAST_SECONDS = 10.0


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        command: as on the command line, in the repository's root.
        limit: seconds it may take.
        tests: whether it is pytest, which calls it a success if all tests were skipped.
        environment: what it needs besides.
    """

    command: tuple[str, ...]
    limit: float
    tests: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def _halfbyte(*arguments: str) -> Step:
    return Step((sys.executable, "-m", "halfbyte", *arguments), 120)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *arguments)


def _sanitizer(tool: str, **environment: str) -> Step:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_pytest("-x", *KERNEL_TESTS, "-k", SMALL))
    return Step(command, 240, tests=True, environment=environment)


def _benchmark(name: str, *arguments: str) -> Step:
    return Step((sys.executable, f"benchmarks/{name}.py", *arguments), 300)


# A later one tells nothing where an earlier one fails.
STEPS = {
    "device": _halfbyte("device"),
    "backends": _halfbyte("backends", "--device", "cuda"),
    "product": Step(_pytest("-x", TESTS[0], "-k", "64-64"), 180, tests=True),
    "tests": Step(_pytest(*TESTS), 420, tests=True),
    # Each tensor in memory of its own: in torch's pools one that is read beyond its end is not noticed.
    "memcheck": _sanitizer("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    "racecheck": _sanitizer("racecheck"),
    "synccheck": _sanitizer("synccheck"),
    "w4a16": _benchmark("gpu_w4a16", "--rounds", "20"),
    "rejection": _benchmark("gpu_rejection", "--rounds", "20"),
    "decode-8": _benchmark("gpu_decode", "--layers", "8", "--batches", "1", "8"),
    "decode": _benchmark("gpu_decode"),
    "w4a16-bf16": _benchmark("gpu_w4a16", "--rounds", "20", "--dtype", "bf16"),
}


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        name: of the step.
        command: that was run.
        state: "passed", "failed", "left out" or "not begun".
        reason: why it did not pass.
        seconds: it took.
        document: what a benchmark found.
        tail: the end of what it printed.
    """

    name: str
    command: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    document: Any = None
    tail: tuple[str, ...] = ()


def run_step(name: str, step: Step, log: Path, seconds: float) -> Outcome:
    """Run it for as many seconds as it may take, or as there are; what it prints is appended to the log."""
    command = " ".join(step.command)
    if shutil.which(step.command[0]) is None:
        return Outcome(name, command, "left out", f"{step.command[0]} is not on the PATH")
    if seconds < LEAST_SECONDS:
        return Outcome(name, command, "not begun", "no time is left; run it with --only")
    start, limit = time.perf_counter(), min(step.limit, seconds)
    with log.open("ab") as file:
        file.write(f"\n### {name}: {command}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    taken = time.perf_counter() - start
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    reason = _why_not(step, code, limit, text)
    state = "failed" if reason else "passed"
    return Outcome(name, command, state, reason, taken, _last_document(lines), tuple(lines[-15:]) if reason else ())


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it and what it has started; what hangs in the driver is not waited for."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAST_SECONDS)


def _why_not(step: Step, code: int | None, limit: float, text: str) -> str:
    """Why a step did not pass; empty if it did."""
    if code is None:
        return f"stopped after {limit:.0f} s"
    if not torch.cuda.is_available():
        return f"{NEEDS_GPU} (exit code {code})"
    if code:
        return f"exit code {code}"
    return "no test was run" if step.tests and not re.search(r"\b[1-9]\d* passed\b", text) else ""


def _last_document(lines: Sequence[str]) -> Any:
    try:
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    except ValueError:
        return None


def facts(device: torch.device | None) -> dict[str, Any]:
    """What the numbers were found on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        nvrtc = compiler_version()
    except UnsupportedError as error:
        nvrtc = str(error)
    gpu = NEEDS_GPU if device is None else describe(device)
    return {"gpu": gpu, "python": platform.python_version(), "nvrtc": nvrtc, "packages": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "first-contact", help="a folder")
    parser.add_argument("--seconds", type=float, default=1500, help="that all steps together may take")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    options = parser.parse_args()
    device = find_gpu("gpu_first_contact")
    options.output.mkdir(parents=True, exist_ok=True)
    log, document = options.output / "first_contact.log", options.output / "first_contact.json"
    log.write_bytes(b"")
    about, outcomes = facts(device), list[Outcome]()
    print(json.dumps(about, indent=1))
    end = time.perf_counter() + options.seconds
    for name in [name for name in STEPS if name in options.only]:
        outcome = run_step(name, STEPS[name], log, end - time.perf_counter())
        outcomes.append(outcome)
        document.write_text(json.dumps({**about, "steps": [asdict(one) for one in outcomes]}, indent=1))
        print(f"{name:12}{outcome.state:10}{outcome.seconds:7.0f} s  {outcome.reason}", flush=True)
        if device is not None:
            print("".join(f"    {line}\n" for line in outcome.tail), end="")
    bad = [outcome.name for outcome in outcomes if outcome.state in ("failed", "not begun")]
    if device is None:
        print(f"gpu_first_contact: {NEEDS_GPU}; nothing was checked, nothing was measured", file=sys.stderr)
        return 2
    print(f"not passed: {', '.join(bad)}" if bad else "all passed", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
