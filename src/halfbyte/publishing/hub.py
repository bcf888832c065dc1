"""A checkpoint onto the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from halfbyte.checkpoints.sources import HUB_NAME
from halfbyte.errors import ConfigError, OutputError
from halfbyte.publishing.card import Compared
from halfbyte.publishing.saving import save_checkpoint


def push_checkpoint(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    max_shard_size: int | str = "5GB",
    comparison: Compared | None = None,
    progress: bool = True,
) -> str:
    """Save a copy as `save_checkpoint` does and upload it; weights the repository had before are replaced.

    Args:
        folder: the checkpoint.
        repo_id: "organisation/name"; made if there is none.
        private: of a new repository; None for what the organisation has as its default.
        token: of the hub; None for `HF_TOKEN`, or that of `hf auth login`.
        commit_message: None for one that says what is uploaded.
        max_shard_size: see `save_checkpoint`.
        comparison: likewise.
        progress: show bars on a terminal.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: no name, no token, or the hub is switched off (`HF_HUB_OFFLINE`).
        OutputError: the hub refuses or cannot be reached.
        HalfbyteError: see `save_checkpoint`.
    """
    import huggingface_hub

    if not HUB_NAME.fullmatch(repo_id):
        raise ConfigError(f"repo_id {repo_id!r}: expected organisation/name")
    if huggingface_hub.constants.is_offline_mode():
        raise ConfigError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it")
    if token is None and huggingface_hub.get_token() is None:
        raise ConfigError(f"{repo_id}: no token of the hub; `hf auth login`, set HF_TOKEN, or pass token=")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="halfbyte-push-") as scratch:
        copy = save_checkpoint(
            folder,
            Path(scratch) / repo_id.rpartition("/")[2],
            max_shard_size=max_shard_size,
            comparison=comparison,
            name=repo_id,
            progress=progress,
        )
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=copy,
                commit_message=commit_message or "Upload a checkpoint quantized with halfbyte",
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
        except Exception as error:  # the hub library raises its own, its transport's and the system's errors
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OutputError(f"{repo_id}: the hub did not take it ({reason:.300})") from error
    return str(address)
