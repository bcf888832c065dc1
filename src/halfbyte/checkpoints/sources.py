"""MODEL, as a user writes it, → a folder on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoints.sample import SAMPLES, pull_sample, sample_folder
from halfbyte.errors import ModelNotFoundError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class ModelEntry:
    """A model halfbyte knows by name.

    Attributes:
        name: as given to any command.
        description: for people.
        cached: whether it is on this machine.
        path: where it is, or will be.
    """

    name: str
    description: str
    cached: bool
    path: Path


def list_models() -> list[ModelEntry]:
    """The sample models."""
    return [
        ModelEntry(
            f"sample:{name}",
            sample.description,
            (sample_folder(name) / "config.json").is_file(),
            sample_folder(name),
        )
        for name, sample in SAMPLES.items()
    ]


def resolve_model(model: str | Path, *, progress: bool = True) -> Path:
    """The folder of a model, fetched first if need be.

    Args:
        model: an existing folder (which always wins), "sample:NAME", or a hub name "organisation/name".
        progress: show bars on a terminal.

    Raises:
        ModelNotFoundError: none of these readings leads anywhere.
        CheckpointError: a fetched sample is not what was expected.
    """
    text = str(model)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{text}: is a file; expected a Hugging Face model folder")
    if text.startswith("sample:"):
        return pull_sample(text.removeprefix("sample:"), progress=progress)
    samples = ", ".join(f"sample:{name}" for name in SAMPLES)
    if isinstance(model, Path) or not HUB_NAME.fullmatch(text):
        raise ModelNotFoundError(f"{text}: no such folder, and no hub name (organisation/name); samples: {samples}")
    return _from_hub(text, samples)


def _from_hub(name: str, samples: str) -> Path:
    """A snapshot from the Hugging Face hub, or from its cache when offline."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=HUB_PATTERNS, etag_timeout=HUB_TIMEOUT_SECONDS)
        )
    except Exception as error:  # the hub library raises its own, its transport's and the system's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"{name}: no such folder here, and the hub did not give a model of that name ({reason}); samples: {samples}"
        ) from error
