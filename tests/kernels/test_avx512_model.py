"""The avx512_vnni tier, on a scalar model of its intrinsics: most machines that run these tests lack the instructions.

What this cannot show is speed, nor that the compiler and the CPU do what the intrinsics' documentation says.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native/cpu"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the tier against the model")
def test_tier_on_modelled_intrinsics(tmp_path: Path) -> None:
    program = tmp_path / "check"
    sources = [
        HERE / "avx512_check.cpp",
        NATIVE / "decoder.cpp",
        NATIVE / "half_multiply.cpp",
        NATIVE / "kv_cache.cpp",
        NATIVE / "linear.cpp",
        NATIVE / "memory.cpp",
        NATIVE / "w4_matrix.cpp",
        NATIVE / "thread_pool.cpp",
    ]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{NATIVE}", f"-I{HERE}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout
