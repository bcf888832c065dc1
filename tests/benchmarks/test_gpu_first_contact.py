"""The first contact with a GPU, as far as it goes without one: how steps end, and that their commands are right."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def contact(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, on a machine that seems to have a GPU."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_first_contact

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return gpu_first_contact


def python(contact: Any, code: str, **options: Any) -> Any:
    return contact.Step((sys.executable, "-c", code), **{"limit": 60, **options})


@pytest.mark.parametrize(
    ("code", "tests", "state", "reason"),
    [
        ("print('fine')", False, "passed", ""),
        ("raise SystemExit(9)", False, "failed", "exit code 9"),
        ("print('3 passed, 1 skipped in 2.1s')", True, "passed", ""),
        ("print('4 skipped in 2.1s')", True, "failed", "no test was run"),
        ("print('1 failed, 3 passed in 2.1s'); raise SystemExit(1)", True, "failed", "exit code 1"),
    ],
)
def test_how_a_step_ends(contact: Any, tmp_path: Path, code: str, tests: bool, state: str, reason: str) -> None:
    outcome = contact.run_step("one", python(contact, code, tests=tests), tmp_path / "log", 60)
    assert (outcome.state, outcome.reason) == (state, reason)
    assert bool(outcome.tail) is ("print" in code and state == "failed")
    assert f"### one: {sys.executable} -c {code}" in (tmp_path / "log").read_text()


def test_the_last_line_is_its_document(contact: Any, tmp_path: Path) -> None:
    code = "import os; print('a table'); print('{\"cells\": [' + os.environ['CELL'] + ']}')"
    step = python(contact, code, environment={"CELL": "7"})
    assert contact.run_step("bench", step, tmp_path / "log", 60).document == {"cells": [7]}
    assert contact.run_step("cut", python(contact, "print('{\"cells\": [7')"), tmp_path / "log", 60).document is None


def test_a_step_that_hangs_is_ended(contact: Any, tmp_path: Path) -> None:
    outcome = contact.run_step("hangs", python(contact, "import time; time.sleep(9999)", limit=1), tmp_path / "log", 60)
    assert (outcome.state, outcome.reason) == ("failed", "stopped after 1 s")


def test_what_a_step_has_started_ends_with_it(contact: Any) -> None:
    sleeper = "import time; time.sleep(9999)"
    code = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, '-c', {sleeper!r}]).pid, flush=True); {sleeper}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    with process.stdout:
        child = Path("/proc") / process.stdout.readline().decode().strip()
        assert child.exists()
        contact.stop(process)
        process.stdout.read()  # until nobody has it open any more: the child is gone, too
    assert process.returncode == -signal.SIGKILL


def test_what_cannot_be_begun(contact: Any, tmp_path: Path) -> None:
    missing = contact.Step(("no-such-sanitizer", "--tool"), 60)
    outcome = contact.run_step("memcheck", missing, tmp_path / "log", 60)
    assert (outcome.state, outcome.reason) == ("left out", "no-such-sanitizer is not on the PATH")
    outcome = contact.run_step("late", python(contact, "1"), tmp_path / "log", 1)
    assert (outcome.state, outcome.reason) == ("not begun", "no time is left; run it with --only")


def test_a_failure_is_noted_and_the_next_step_goes_on(
    contact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {
        "wrong": python(contact, "print('what is wrong'); raise SystemExit(1)"),
        "right": python(contact, "print('{\"found\": 1}')"),
        "absent": contact.Step(("no-such-sanitizer",), 60),
    }
    monkeypatch.setattr(contact, "STEPS", steps)
    monkeypatch.setattr(contact, "find_gpu", lambda program: torch.device("cuda", 0))
    monkeypatch.setattr(contact, "describe", lambda device: "Some GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_first_contact", "--output", str(tmp_path / "found")])
    assert contact.main() == 1
    out, error = capsys.readouterr()
    assert "    what is wrong\n" in out
    assert error == "not passed: wrong\n"
    found = json.loads((tmp_path / "found" / "first_contact.json").read_text())
    assert found["gpu"] == "Some GPU"
    assert [(one["name"], one["state"], one["document"]) for one in found["steps"]] == [
        ("wrong", "failed", None), ("right", "passed", {"found": 1}), ("absent", "left out", None),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu_first_contact", "--output", str(tmp_path), "--only", "right", "absent"])
    assert contact.main() == 0
    assert capsys.readouterr().err == "all passed\n"


def test_it_runs_every_test_for_a_gpu(contact: Any) -> None:
    """But those that need a peer as well."""
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu\b", path.read_text()) and path.parent.name not in ("interop", "benchmarks")
    }
    assert marked == set(contact.TESTS)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_every_step_says_what_it_needs(tmp_path: Path) -> None:
    """All of them for real, the sanitizer a script that runs what it is given."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\n[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 77\nshift 4\nexec "$@"\n')
    sanitizer.chmod(0o755)
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_first_contact.py", "--output", tmp_path / "found", "--seconds", "3000"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HALFBYTE_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert run.stderr.endswith("gpu_first_contact: needs an NVIDIA GPU; nothing was checked, nothing was measured\n")
    steps = json.loads((tmp_path / "found" / "first_contact.json").read_text())["steps"]
    # pytest skips all tests; `halfbyte device` shows the CPU.
    expected = dict.fromkeys(("device", "product", "tests", "memcheck", "racecheck", "synccheck"), 0)
    assert {one["name"]: one["reason"] for one in steps} == {
        one["name"]: f"needs an NVIDIA GPU (exit code {expected.get(one['name'], 2)})" for one in steps
    }
    assert len(steps) == 12
    log = (tmp_path / "found" / "first_contact.log").read_text()
    parts = {part.partition(":")[0]: part for part in log.split("\n### ")[1:]}
    for name, part in parts.items():
        assert "Traceback" not in part, name
        if "pytest" in part:
            assert re.search(r"SKIPPED.*needs an NVIDIA GPU", part), name
        elif name not in ("device", "backends"):
            assert "needs an NVIDIA GPU, and torch" in part, name
    assert "this machine has 0 CUDA devices" in parts["backends"]
