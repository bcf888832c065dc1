"""Compiles `native_check.cpp`, the checks of the core that need no Python, with the tiers a processor can have."""

import os
import subprocess
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native/cpu"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"]
# Processor → what CMakeLists.txt defines for it, and its tiers with the flags of each.
TIERS = {
    "x86_64": (
        "HALFBYTE_X86_TIERS",
        {
            "tier_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
            "tier_avx_vnni.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
            "tier_avx512_vnni.cpp": AVX512,
            "tier_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8"],
        },
    ),
    "aarch64": ("HALFBYTE_ARM_TIERS", {"tier_neon.cpp": ["-march=armv8.2-a+dotprod"]}),
}


def compile_all(commands: Sequence[tuple[Path, Sequence[str]]], folder: Path) -> list[str]:
    """Each source with its command, as many at a time as there are cores; the objects in `folder`, in order."""

    def build(item: tuple[Path, Sequence[str]]) -> str:
        source, command = item
        target = str(folder / f"{source.stem}.o")
        subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, commands))


def build_check(
    compiler: str, machine: str, flags: Sequence[str], folder: Path, *, plain: Collection[str] = ()
) -> Path:
    """`folder`/check. A tier that is not of `machine` is left out; one named in `plain` gets none of `flags`."""
    define, tiers = TIERS.get(machine, ("HALFBYTE_NO_TIERS", {}))
    others = {name for _, of_machine in TIERS.values() for name in of_machine} - set(tiers)
    common = ["-std=c++17", "-ffp-contract=off", f"-I{NATIVE}", f"-D{define}"]
    commands = []
    for source in [*sorted(NATIVE.glob("*.cpp")), HERE / "native_check.cpp"]:
        if source.name not in others:
            chosen = ["-O0"] if source.stem.removeprefix("tier_") in plain else flags
            commands.append((source, [compiler, *common, *chosen, *tiers.get(source.name, [])]))
    objects = compile_all(commands, folder)
    subprocess.run([compiler, *common, *flags, *objects, "-pthread", "-o", str(folder / "check")], check=True)
    return folder / "check"
