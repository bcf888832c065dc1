"""Tiers on a scalar model of their intrinsics: most machines that run these tests lack the instructions.

What this cannot show is speed, nor that the compiler and the CPU do what the intrinsics' documentation says.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import HERE, NATIVE, TIERS

from halfbyte import _native

AVX2 = TIERS["x86_64"][1]["tier_avx2.cpp"]


def run_check(source: str, flags: list[str], folder: Path) -> None:
    """Compile `source`, which includes a tier and its model, against the rest of the core, and run it."""
    program = folder / "check"
    rest = [
        path for path in sorted(NATIVE.glob("*.cpp")) if path.name != "isa.cpp" and not path.name.startswith("tier_")
    ]
    sources = [HERE / source, *rest]
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{NATIVE}", f"-I{HERE}"]
    subprocess.run(["g++", *common, *flags, *map(str, sources), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the tier against the model")
def test_avx512_vnni(tmp_path: Path) -> None:
    run_check("avx512_check.cpp", [], tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the tier against the model")
def test_amx(tmp_path: Path) -> None:
    run_check("amx_check.cpp", [], tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the tier against the model")
@pytest.mark.skipif("avx2" not in _native.available_tiers(), reason="all but one instruction of the tier is AVX2")
def test_avx_vnni(tmp_path: Path) -> None:
    run_check("avx_vnni_check.cpp", AVX2, tmp_path)
