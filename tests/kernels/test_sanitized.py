"""The native core under the address and undefined-behaviour sanitizers."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import build_check

from halfbyte import _native


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_tier_runs_clean(tmp_path: Path) -> None:
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    # Unoptimized: with sanitizers the optimizer takes minutes, and what it removes is not looked at.
    flags = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    idle = set(_native.known_tiers()) - set(_native.available_tiers())
    check = build_check("g++", machine, flags, tmp_path, plain=idle)
    run = subprocess.run([str(check)], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
