"""The native core on AArch64: cross-compiled and run in an emulator, with the neon tier and on a CPU that lacks it."""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from native_build import build_check

from tests.sharing import made_once

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("needs a cross compiler, aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    flags = ["-O1", "-static", "-Wno-psabi"]
    return made_once(tmp_path_factory, "aarch64", partial(build_check, COMPILER, "aarch64", flags)) / "check"


@pytest.mark.parametrize(("cpu", "tiers"), [("max", ["neon", "portable"]), ("cortex-a57", ["portable"])])
def test_tiers_in_an_emulator(check: Path, cpu: str, tiers: list[str]) -> None:
    if EMULATOR is None:
        pytest.skip("needs an emulator, qemu-aarch64 (Debian: qemu-user)")
    command = [EMULATOR, "-cpu", cpu, str(check)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.stdout.split() == [*tiers, "0", "failures"]
