"""The readers under a coverage-guided fuzzer; HALFBYTE_FUZZ_SECONDS says how long, 300 if it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_is_found(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="needs pip install atheris, which has wheels for few versions of Python")
    seconds = int(os.environ.get("HALFBYTE_FUZZ_SECONDS", "300"))
    root = Path(__file__).parents[2]
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=30", f"-artifact_prefix={tmp_path}/"]
    result = subprocess.run(
        [sys.executable, str(root / "tests" / "hostile" / "fuzz.py"), *limits],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    # What it ends with: the exception, or the number of runs.
    assert result.returncode == 0, result.stderr[-4000:]
    assert list(tmp_path.iterdir()) == []
