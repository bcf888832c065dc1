"""The tokenizer that belongs to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a model folder.

    Raises:
        CheckpointError: there is none, or its files are broken.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizer libraries raise whatever their parsers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({reason})") from error
