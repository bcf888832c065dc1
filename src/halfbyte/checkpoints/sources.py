"""MODEL, as a user writes it, → a folder on this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from halfbyte.checkpoints.gguf_copy import SUFFIX, gguf_folder, is_gguf
from halfbyte.checkpoints.sample import SAMPLES, is_pulled, pull_sample, sample_folder
from halfbyte.errors import ModelNotFoundError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
# Folders of a repository hold other formats of the same weights, and so does Mistral's "consolidated" file.
HUB_LEFT_OUT = ["*/*", "consolidated*.safetensors"]
HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class ModelEntry:
    """A model halfbyte knows by name.

    Attributes:
        name: as given to any command.
        description: for people.
        cached: whether it is on this machine.
        path: where it is, or will be.
        bytes: of its weights.
    """

    name: str
    description: str
    cached: bool
    path: Path
    bytes: int


def list_models() -> list[ModelEntry]:
    """The sample models."""
    return [
        ModelEntry(f"sample:{name}", sample.description, is_pulled(name), sample_folder(name), sample.weight_bytes)
        for name, sample in SAMPLES.items()
    ]


def resolve_model(model: str | Path, *, progress: bool = True) -> Path:
    """The folder of a model, fetched first if need be.

    Args:
        model: an existing folder (which always wins), a GGUF file, "sample:NAME", or a hub name "organisation/name".
            A GGUF file's folder has its weights as floats; `quantization.on_the_fly.model_folder` gives codes.
        progress: show bars on a terminal.

    Raises:
        ModelNotFoundError: none of these readings leads anywhere.
        CheckpointError: a fetched sample is not what was expected, or a GGUF file is broken.
        UnsupportedError: a GGUF file of a model that is not read.
        OutputError: a sample or a GGUF file's folder cannot be written to the cache.
    """
    text = str(model)
    path = Path(os.path.expanduser(text))  # noqa: PTH111  (Path's raises where there is no home)
    if os.path.isdir(path):  # noqa: PTH112  (Path's raises for names no folder can have)
        return path
    if is_gguf(path):
        return gguf_folder(path, progress=progress)
    if os.path.isfile(path):  # noqa: PTH113
        raise ModelNotFoundError(f"{text}: is a file; expected a Hugging Face model folder or a {SUFFIX} file")
    if text.lower().endswith(SUFFIX):
        raise ModelNotFoundError(f"{text}: no such file")
    if text.startswith("sample:"):
        return pull_sample(text.removeprefix("sample:"), progress=progress)
    samples = ", ".join(f"sample:{name}" for name in SAMPLES)
    if isinstance(model, Path) or not HUB_NAME.fullmatch(text):
        name = text if text.isprintable() else ascii(text)
        raise ModelNotFoundError(
            f"{name}: no such folder, and no hub name (organisation/name); {_meant(text, samples)}"
        )
    return _from_hub(text, samples, progress)


def _meant(text: str, samples: str) -> str:
    """The name that was perhaps meant, or those of the samples."""
    near = get_close_matches(text, [*_model_folders(), *SAMPLES], n=1, cutoff=0.75)
    if not near:
        return f"samples: {samples}"
    return f"did you mean {f'sample:{near[0]}' if near[0] in SAMPLES else near[0]}?"


def _model_folders() -> list[str]:
    """Models right here."""
    try:
        return [path.parent.name for path in Path().glob("*/config.json")]
    except OSError:
        return []


def _from_hub(name: str, samples: str, progress: bool) -> Path:
    """A snapshot from the Hugging Face hub, or from its cache when the hub is offline."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def snapshot(local: bool) -> Path:
        with _hub_bars(progress and sys.stderr.isatty()):
            return Path(
                huggingface_hub.snapshot_download(
                    name,
                    allow_patterns=HUB_PATTERNS,
                    ignore_patterns=HUB_LEFT_OUT,
                    etag_timeout=HUB_TIMEOUT_SECONDS,
                    local_files_only=local,
                )
            )

    try:
        try:
            # snapshot_download asks this, too, but without a limit: a hub that accepts and is silent would hang it.
            huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        except Exception:
            with suppress(Exception):  # nothing in the cache either: the hub's reason is the one to tell
                return snapshot(local=True)
            raise
        return snapshot(local=False)
    except Exception as error:  # the hub library raises its own, its transport's and the system's errors
        if isinstance(error, GatedRepoError):
            reason = "it is gated: accept its terms on its page, then `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has none of that name, or it is private: `hf auth login`"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{name}: no such folder here, and the hub did not give it ({reason}); samples: {samples}"
        raise ModelNotFoundError(message) from error


@contextmanager
def _hub_bars(wanted: bool) -> Iterator[None]:
    """The hub library draws its bars into pipes, too, unless told otherwise."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
