"""Tiers on a scalar model of their intrinsics: most machines that run these tests lack the instructions.

What this cannot show is speed, nor that the compiler and the CPU do what the intrinsics' documentation says.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import HERE, NATIVE, TIERS, compile_all

from halfbyte import _native
from tests.sharing import made_once

AVX2 = TIERS["x86_64"][1]["tier_avx2.cpp"]
COMMAND = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", f"-I{NATIVE}", f"-I{HERE}"]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to compile the tier against the model"
)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The core without its tiers, compiled."""
    sources = [
        path for path in sorted(NATIVE.glob("*.cpp")) if path.name != "isa.cpp" and not path.name.startswith("tier_")
    ]
    folder = made_once(
        tmp_path_factory, "core", lambda folder: compile_all([(source, COMMAND) for source in sources], folder)
    )
    return [str(folder / f"{source.stem}.o") for source in sources]


def run_check(source: str, flags: list[str], rest: list[str], folder: Path) -> None:
    """Compile `source`, which includes a tier and its model, against the rest of the core, and run it."""
    program = folder / "check"
    # A tier on its model takes longer to optimize than to run as it is.
    subprocess.run([*COMMAND, "-O0", *flags, str(HERE / source), *rest, "-pthread", "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout


@needs_compiler
def test_avx512_vnni(rest: list[str], tmp_path: Path) -> None:
    run_check("avx512_check.cpp", [], rest, tmp_path)


@needs_compiler
def test_amx(rest: list[str], tmp_path: Path) -> None:
    run_check("amx_check.cpp", [], rest, tmp_path)


@needs_compiler
@pytest.mark.skipif("avx2" not in _native.available_tiers(), reason="all but one instruction of the tier is AVX2")
def test_avx_vnni(rest: list[str], tmp_path: Path) -> None:
    run_check("avx_vnni_check.cpp", AVX2, rest, tmp_path)
