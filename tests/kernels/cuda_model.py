"""Kernels of native/cuda on a model of a GPU (cuda_machine.hpp): g++ compiles them, ctypes calls them."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.sharing import made_once

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "native/cuda"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
# What a change of a source must not survive: its file, a text that stands there once, and what that becomes.
Mutant = tuple[str, str, str]

NO_COMPILER = "needs g++ to compile the kernels for the model"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason=NO_COMPILER)


def build(program: Path, folder: Path, sources: Path = CUDA) -> ctypes.CDLL:
    """`program`, which includes kernels of `sources`, compiled into `folder` unless it is there."""
    target = folder / f"{program.stem}.so"
    if not target.exists():
        command = ["g++", *FLAGS, f"-I{sources}", f"-I{HERE}", "-x", "c++", str(program), "-o", str(target)]
        subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.last_error.restype = ctypes.c_char_p
    return library


def built_once(machine: type[Any], factory: pytest.TempPathFactory) -> Any:
    """A `machine` of the kernels as they are, compiled by one process of a run for all."""
    if shutil.which("g++") is None:
        pytest.skip(NO_COMPILER)
    return machine.build(made_once(factory, machine.__name__, machine.build))


def mutate(mutant: Mutant, folder: Path) -> Path:
    """A copy of the sources in `folder`, with that one thing changed."""
    file, text, replacement = mutant
    sources = shutil.copytree(CUDA, folder / "cuda")
    original = (sources / file).read_text()
    assert original.count(text) == 1
    (sources / file).write_text(original.replace(text, replacement))
    return sources
