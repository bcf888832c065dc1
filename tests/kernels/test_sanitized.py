"""The native core under the address and undefined-behaviour sanitizers."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native/cpu"
X86 = platform.machine() in ("x86_64", "AMD64")
TIER_FLAGS = {
    "tier_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "tier_avx512_vnni.cpp": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c",
        "-DHALFBYTE_AVX512_INTRINSICS=<immintrin.h>",
    ],
}  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_tier_runs_clean(tmp_path: Path) -> None:
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-ffp-contract=off",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    flags += [f"-I{NATIVE}"] + (["-DHALFBYTE_X86_TIERS"] if X86 else [])
    sources = [path for path in sorted(NATIVE.glob("*.cpp")) if X86 or path.name not in TIER_FLAGS]
    objects = []
    for source in [*sources, HERE / "native_check.cpp"]:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = ["g++", *flags, *TIER_FLAGS.get(source.name, []), "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    subprocess.run(["g++", *flags, *objects, "-pthread", "-o", str(tmp_path / "check")], check=True)
    run = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
