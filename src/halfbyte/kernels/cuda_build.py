"""CUDA sources to machine code: NVRTC compiles them for the GPU that was found, and the disk keeps the result.

No wheel per CUDA version and GPU: the sources of native/cuda ship as they are and need no header but their own.
Compiling needs cuda-core (an extra) and the NVRTC that comes with it, but neither a GPU nor a driver nor a toolkit.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from halfbyte.checkpoints.cache import cache_folder
from halfbyte.errors import UnsupportedError

# cp.async and mma with bf16 appeared there.
MIN_CAPABILITY = (8, 0)
OPTIONS = {"std": "c++17", "lineinfo": True}
_DIGEST_BYTES = hashlib.sha256().digest_size


def compile_cubin(source: str, macros: Mapping[str, str], arch: str) -> bytes:
    """Machine code of a file of native/cuda, from the cache where it is there.

    One process compiles at a time, the others wait and read what it wrote. An entry that is damaged is compiled anew;
    where nothing can be written, nothing is kept.

    Args:
        source: name of the file.
        macros: what to define, and as what.
        arch: as in "sm_90".

    Raises:
        UnsupportedError: the compiler is missing, does not know `arch`, or refuses the source.
    """
    folder = cache_folder() / "cuda"
    entry = folder / f"{_key(source, macros, arch)}.cubin"
    code = _read(entry)
    if code is not None:
        return code
    try:
        with _locked(entry.with_suffix(".lock")):
            code = _read(entry)
            if code is None:
                code = _compile(source, macros, arch)
                _write(entry, code)
    except OSError:
        return _compile(source, macros, arch)
    return code


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    return gpu_missing(device) or compiler_missing()


def gpu_missing(device: torch.device) -> str | None:
    """Why a device is no GPU for CUDA C++ of Ampere and later, or None if it is one."""
    if torch.version.hip is not None:
        return "written in CUDA C++, and this torch is for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return (
            f"needs compute capability {needed} (Ampere) for cp.async and bf16; "
            f"{torch.cuda.get_device_name(device)} has {found}"
        )
    return None


@functools.cache
def compiler_missing() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    try:
        compiler_version()
    except UnsupportedError as error:
        return str(error)
    return None


@functools.cache
def compiler_version() -> str:
    """Of NVRTC: "13.0".

    Raises:
        UnsupportedError: it, or cuda-core, is missing.
    """
    major = (torch.version.cuda or "13").partition(".")[0]
    install = f'install them with: pip install "halfbyte[gpu-cu{major}]"'
    try:
        from cuda.bindings import nvrtc
        from cuda.core import ObjectCode, Program, Stream, launch  # noqa: F401  older ones have them elsewhere
    except ImportError as error:
        raise UnsupportedError(f"needs cuda-core and NVRTC ({error}); {install}") from error
    try:
        status, *numbers = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise UnsupportedError(f"NVRTC cannot be loaded ({_first_line(error)}); {install}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise UnsupportedError(f"NVRTC does not answer ({status}); {install}")
    return ".".join(map(str, numbers))


def source_folder() -> Path:
    """Where the sources are: in the installed package, or in the clone it was installed from.

    Raises:
        UnsupportedError: in neither.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "cuda", package.parents[1] / "native" / "cuda"):
        if folder.is_dir():
            return folder
    raise UnsupportedError(f"the CUDA sources are missing from {package}; reinstall halfbyte")


def _key(source: str, macros: Mapping[str, str], arch: str) -> str:
    """SHA-256 of all that the machine code depends on."""
    digest = hashlib.sha256()
    for path in sorted(source_folder().iterdir()):
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(repr((source, sorted(macros.items()), arch, sorted(OPTIONS.items()), compiler_version())).encode())
    return digest.hexdigest()


def _compile(source: str, macros: Mapping[str, str], arch: str) -> bytes:
    version = compiler_version()
    from cuda.core import Program, ProgramOptions

    folder = source_folder()
    options = ProgramOptions(
        name=source, arch=arch, include_path=[str(folder)], define_macro=list(macros.items()), **OPTIONS
    )
    try:
        return bytes(Program((folder / source).read_text(), "c++", options).compile("cubin").code)
    except Exception as error:  # what cuda-core raises has no public base of its own
        defined = " ".join(f"-D{name}={value}" for name, value in macros.items())
        raise UnsupportedError(
            f"{source}: NVRTC {version} cannot compile it for {arch} ({defined}): {error}".strip()
        ) from error


def _read(entry: Path) -> bytes | None:
    """The machine code of an entry; None if it is not there or not what was written."""
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() else None


def _write(entry: Path, code: bytes) -> None:
    """Under another name first: a reader sees all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(hashlib.sha256(code).digest() + code)
            file.flush()
            Path(file.name).replace(entry)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the system lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
