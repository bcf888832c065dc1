"""Compiling at run time: NVRTC needs neither a GPU nor a driver, only cuda-core."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from halfbyte.errors import UnsupportedError
from halfbyte.kernels import cuda_build
from halfbyte.kernels.cuda_build import compile_cubin, compiler_version, source_folder
from halfbyte.kernels.cuda_launch import GEOMETRIES, SOURCE
from halfbyte.kernels.cuda_ops import KERNELS as DECODER_KERNELS

MACROS = {"W4A16_TYPE": "Half", "W4A16_PAIR": "0", "W4A16_ZEROS": "1"}
ELF = b"\x7fELF"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that is only asked for its version, and notes what it is given; for tests of the cache alone."""
    calls: list[str] = []

    def note(source: str, macros: object, arch: str) -> bytes:
        calls.append(f"{source} {arch}")
        return ELF + arch.encode()

    monkeypatch.setattr(cuda_build, "compiler_version", lambda: "13.0")
    monkeypatch.setattr(cuda_build, "_compile", note)
    return calls


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.cubin"))


def test_compiled_once(cache: Path, compiled: list[str]) -> None:
    first = compile_cubin(SOURCE, MACROS, "sm_80")
    assert first == compile_cubin(SOURCE, MACROS, "sm_80")
    assert len(compiled) == len(entries(cache)) == 1
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("change", ["arch", "macros", "version", "source"])
def test_whatever_matters_is_in_the_key(
    change: str, cache: Path, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in source_folder().iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cuda_build, "source_folder", lambda: sources)
    compile_cubin(SOURCE, MACROS, "sm_80")
    if change == "version":
        monkeypatch.setattr(cuda_build, "compiler_version", lambda: "13.1")
    if change == "source":  # a header, not the file itself
        header = sources / "w4a16_layout.cuh"
        header.write_text(header.read_text() + "//\n")
    macros = MACROS | {"W4A16_PAIR": "1"} if change == "macros" else MACROS
    compile_cubin(SOURCE, macros, "sm_90" if change == "arch" else "sm_80")
    assert len(compiled) == len(entries(cache)) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
def test_damaged_entry_is_made_anew(cache: Path, compiled: list[str], damage: Callable[[Path], None]) -> None:
    whole = compile_cubin(SOURCE, MACROS, "sm_80")
    (entry,) = entries(cache)
    kept = entry.read_bytes()
    damage(entry)
    assert compile_cubin(SOURCE, MACROS, "sm_80") == whole
    assert len(compiled) == 2
    assert entry.read_bytes() == kept


def test_works_without_a_place_to_keep_it(tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "no folder"
    file.write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(file))
    assert compile_cubin(SOURCE, MACROS, "sm_80").startswith(ELF)
    assert compile_cubin(SOURCE, MACROS, "sm_80").startswith(ELF)
    assert len(compiled) == 2


RACER = """
import os, sys, time
from pathlib import Path
from types import ModuleType
from halfbyte.kernels import cuda_build
cuda_build.compiler_version = lambda: "13.0"
def compile(source, macros, arch):
    open(sys.argv[1] + "/calls", "a").write("x")
    time.sleep(1)
    return b"code"
cuda_build._compile = compile
folder = Path(sys.argv[1])
(folder / f"{os.getpid()}.ready").touch()
while len(list(folder.glob("*.ready"))) < 2:
    time.sleep(0.01)
assert cuda_build.compile_cubin("w4a16_gemm.cu", {}, "sm_80") == b"code"
"""


def test_two_processes_compile_once(cache: Path, tmp_path: Path) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path)]) for _ in range(2)]
    assert [racer.wait(timeout=600) for racer in racers] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_missing_compiler_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    with pytest.raises(UnsupportedError, match=r'needs cuda-core and NVRTC .*pip install "halfbyte\[gpu-cu12\]"'):
        compiler_version.__wrapped__()


def test_cuda_core_of_another_time_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.5 there was nothing in `cuda.core` but `experimental`."""
    modules = {name: ModuleType(name) for name in ("cuda", "cuda.bindings", "cuda.core")}
    modules["cuda.bindings"].__dict__["nvrtc"] = None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(
        UnsupportedError, match=r"needs cuda-core and NVRTC \(cannot import name 'ObjectCode'.*; install"
    ):
        compiler_version.__wrapped__()


class TestNvrtc:
    """With the real compiler."""

    @pytest.fixture(autouse=True)
    def _needs_nvrtc(self) -> None:
        pytest.importorskip("cuda.core", reason="needs cuda-core: pip install 'halfbyte[gpu-cu13]'")

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
    def test_compiles_every_entry_point(self, cache: Path, arch: str) -> None:
        code = compile_cubin(SOURCE, MACROS, arch)
        assert code.startswith(ELF)
        assert all(geometry.name.encode() in code for geometry in GEOMETRIES)
        assert len(entries(cache)) == 1

    @pytest.mark.parametrize("type_", ["Half", "BFloat"])
    @pytest.mark.usefixtures("cache")
    def test_compiles_the_kernels_between_products(self, type_: str) -> None:
        for name, (source, _) in DECODER_KERNELS.items():
            code = compile_cubin(source, {"DECODER_TYPE": type_}, "sm_90")
            assert name.encode() in code

    def test_unknown_architecture_is_named(self, cache: Path) -> None:
        with pytest.raises(UnsupportedError, match=r"NVRTC \d+\.\d+ cannot compile it for sm_999"):
            compile_cubin(SOURCE, MACROS, "sm_999")
        assert not entries(cache)

    def test_errors_of_the_source_are_shown(self, cache: Path) -> None:
        with pytest.raises(UnsupportedError, match=r"-DW4A16_TYPE=Quarter(.|\n)*Quarter"):
            compile_cubin(SOURCE, MACROS | {"W4A16_TYPE": "Quarter"}, "sm_80")
