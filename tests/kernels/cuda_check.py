"""Compiles every variant of every kernel of native/cuda with nvcc, without a GPU, and looks at what came out.

    python tests/kernels/cuda_check.py                    # make cuda-check
    python tests/kernels/cuda_check.py --arch sm_90a --sass

Prints registers, shared memory, spills and blocks a multiprocessor; with --sass, and cuobjdump on the PATH, the
instructions of the inner loop, too. Exits with 1 if a variant does not compile, spills or keeps anything in local
memory, or needs more shared memory than a block may have. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from halfbyte.device.gpu_facts import known_gpu, occupancy
from halfbyte.kernels.cuda_build import source_folder
from halfbyte.kernels.cuda_launch import GEOMETRIES, SOURCE, THREADS
from halfbyte.kernels.cuda_ops import KERNELS as DECODER_KERNELS
from halfbyte.kernels.cuda_ops import norm_shared_bytes
from halfbyte.sampling import rejection_cuda

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a")
PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """An entry point, with the shape of its blocks."""

    name: str
    threads: int
    shared: int = 0


@dataclass(frozen=True)
class Variant:
    """One compilation of a file."""

    source: str
    label: str
    macros: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    looped: bool = False  # whether --sass looks for a loop with tensor core operations

    def __str__(self) -> str:
        return f"{self.source}: {self.label}"


def _w4a16(type_: str, pair: bool, zeros: bool) -> Variant:
    groups = "groups of 32" if pair else "groups of 64 and more"
    return Variant(
        SOURCE,
        f"{type_.lower()}, {groups}, {'zero points' if zeros else 'symmetric'}",
        (f"-DW4A16_TYPE={type_}", f"-DW4A16_PAIR={int(pair)}", f"-DW4A16_ZEROS={int(zeros)}"),
        tuple(Kernel(g.name, THREADS, g.shared_bytes(pair=pair, zeros=zeros)) for g in GEOMETRIES),
        looped=True,
    )


def _decoder(type_: str, source: str) -> Variant:
    """Shared memory is that of a row of 8192 channels."""
    kernels = []
    for name, (file, threads) in DECODER_KERNELS.items():
        width = 1 if name.endswith("_narrow") else 8
        shared = norm_shared_bytes(8192, width) if source == "rms_norm.cu" else 0
        kernels += [Kernel(name, threads, shared)] if file == source else []
    return Variant(source, type_.lower(), (f"-DDECODER_TYPE={type_}",), tuple(kernels))


def _rejection(dtype: torch.dtype, filtered: bool) -> Variant:
    return Variant(
        rejection_cuda.SOURCE,
        f"{rejection_cuda.TYPES[dtype].lower()}, {'logits or filters' if filtered else 'probabilities as they are'}",
        tuple(f"-D{name}={value}" for name, value in rejection_cuda.macros(dtype, filtered).items()),
        (Kernel(rejection_cuda.ENTRY, rejection_cuda.THREADS, rejection_cuda.SHARED_BYTES[filtered]),),
    )


TYPES = ("Half", "BFloat")
VARIANTS = [
    _rejection(torch.float32, False),
    *(_rejection(dtype, True) for dtype in rejection_cuda.TYPES),
    *itertools.starmap(_decoder, itertools.product(TYPES, ("rms_norm.cu", "rotate_append.cu", "gated.cu"))),
    *itertools.starmap(_w4a16, itertools.product(TYPES, (False, True), (False, True))),
]


@dataclass
class Entry:
    """What one entry point became on one architecture."""

    arch: str
    variant: str
    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int
    blocks: int
    loop: dict[str, int] = field(default_factory=dict)

    @property
    def problem(self) -> str | None:
        if self.stack or self.spills:
            return f"{self.stack} bytes of local memory, {self.spills} bytes of spills"
        limit = known_gpu(self.arch).block_shared
        if self.shared > limit:
            return f"{self.shared:,} bytes of shared memory, a block may have {limit:,}"
        return None if self.blocks else "no block fits a multiprocessor"


def compile_variant(nvcc: str, arch: str, variant: Variant, *, sass: bool = False) -> list[Entry]:
    """Every entry point of a variant.

    Raises:
        RuntimeError: it does not compile.
    """
    source = source_folder() / variant.source
    generate = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [nvcc, "-std=c++17", generate, "-cubin", "-Xptxas", "-v", *variant.macros, str(source)]
        run = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{arch}, {variant}: {run.stderr.strip()}")
        looped = variant.kernels if sass and variant.looped else ()
        loops = {kernel.name: inner_loop(cubin, kernel.name) for kernel in looped}
    found = {name: tuple(map(int, numbers)) for name, *numbers in PTXAS.findall(run.stderr)}
    entries = []
    for kernel in variant.kernels:
        if kernel.name not in found:
            raise RuntimeError(f"{arch}, {variant}: no entry point {kernel.name} in what ptxas says")
        stack, stores, loads, registers = found[kernel.name]
        blocks = occupancy(known_gpu(arch), kernel.threads, registers, kernel.shared).blocks
        loop = loops.get(kernel.name, {})
        entries.append(
            Entry(arch, str(variant), kernel.name, registers, kernel.shared, stack, stores + loads, blocks, loop)
        )
    return entries


def inner_loop(cubin: Path, kernel: str) -> dict[str, int]:
    """Instruction → how often it stands on the way once round the loop with the tensor core operations.

    What a tile of y needs once is left out: branches over a fence (its sums) are taken, and those over more than 16
    instructions none of which loads, copies or multiplies (its addresses).
    """
    run = subprocess.run(["cuobjdump", "-sass", "-fun", kernel, str(cubin)], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", run.stdout, re.MULTILINE)
    code = [(int(address, 16), bool(condition), name.split(".")[0], rest) for address, condition, name, rest in lines]
    targets = {
        address: int(rest.split("0x")[1].split()[0], 16)
        for address, _, name, rest in code
        if name == "BRA" and "0x" in rest
    }
    products = [address for address, _, name, _ in code if name == "HMMA"]
    first, last = max(
        (target, address) for address, target in targets.items() if target <= products[0] and address >= products[-1]
    )
    counts: Counter[str] = Counter()
    resume = first
    for address, condition, name, _ in code:
        if not resume <= address <= last:
            continue
        counts[name] += 1
        target = targets.get(address, 0)
        if target > address and (
            not condition or _once_a_tile([other for at, _, other, _ in code if address < at < target])
        ):
            resume = target
    return dict(counts.most_common())


def _once_a_tile(passed: list[str]) -> bool:
    if {"LDGSTS", "HMMA"} & set(passed):
        return False
    return "MEMBAR" in passed or (len(passed) > 16 and not {"LDG", "LDS", "FFMA"} & set(passed))


def check(nvcc: str, archs: Sequence[str], variants: Sequence[Variant], *, sass: bool = False) -> Iterator[Entry]:
    """Every entry point of every variant, several compilations at a time."""
    pairs = list(itertools.product(archs, variants))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for entries in pool.map(lambda pair: compile_variant(nvcc, *pair, sass=sass), pairs):
            yield from entries


def main() -> int:
    """Print the table; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one; may be repeated")
    parser.add_argument("--sass", action="store_true", help="count the instructions of the inner loops (cuobjdump)")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("cuda-check: needs nvcc on the PATH; nothing was checked", file=sys.stderr)
        return 2
    if options.sass and shutil.which("cuobjdump") is None:
        print("cuda-check: --sass needs cuobjdump on the PATH (pip install nvidia-cuda-cuobjdump)", file=sys.stderr)
        return 2
    entries = []
    print(f"{'':8}{'kernel':17}{'registers':>10}{'shared':>9}{'blocks':>8}{'spills':>8}  variant")
    try:
        for entry in check(nvcc, options.arch or ARCHS, VARIANTS, sass=options.sass):
            entries.append(entry)
            print(
                f"{entry.arch:8}{entry.kernel:17}{entry.registers:10}{entry.shared:9,}{entry.blocks:8}{entry.spills:8}"
                f"  {entry.variant}{'  ← ' + entry.problem if entry.problem else ''}"
            )
            if entry.loop:
                print("        " + ", ".join(f"{name} {count}" for name, count in entry.loop.items()))
    except RuntimeError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 1
    problems = [entry for entry in entries if entry.problem]
    print(f"{len(entries)} entry points, {len(problems)} with problems")
    print(json.dumps({"entries": [asdict(entry) for entry in entries], "problems": len(problems)}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
