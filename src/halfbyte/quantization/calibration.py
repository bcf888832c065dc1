"""Calibration text → blocks of tokens.

Long documents are cut into blocks, never dropped, and no block spans two documents. `seed` chooses which blocks are
kept when there are more than asked for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import CalibrationError

# A block shorter than this tells less about activations than its padding-free forward pass costs.
MIN_BLOCK_TOKENS = 16
HELD_OUT_EVERY = 5
# Shorter runs of text (a heading, "Changed in version 3.8") recur without meaning that the prose does.
PARAGRAPH_CHARACTERS = 80


@dataclass(frozen=True)
class CalibrationSet:
    """Token blocks, ready for the model.

    Attributes:
        blocks: int64 [tokens] each, at most `max_calib_seq_len` long, in the order they are used.
        source: what the text was: "builtin", a file name, or "list of N strings".
    """

    blocks: tuple[torch.Tensor, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return sum(len(block) for block in self.blocks)

    @property
    def sha256(self) -> str:
        """Hash of the token ids and block boundaries: equal hashes mean equal calibration."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(len(block).to_bytes(8, "little"))
            digest.update(block.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the manifest records of it."""
        return {"source": self.source, "blocks": len(self.blocks), "tokens": self.tokens, "sha256": self.sha256}


def builtin_documents(split: str = "calibration") -> list[str]:
    """Prose that ships with Python itself: the language reference, one topic a document.

    Args:
        split: "calibration", or "heldout" for about a fifth that shares no paragraph with it.
    """
    from pydoc_data.topics import topics

    families = _families([topics[name] for name in sorted(topics)])
    held_out = split == "heldout"
    return [
        document
        for index, family in enumerate(sorted(families, key=len))
        for document in family
        if (index % HELD_OUT_EVERY == 0) == held_out
    ]


def _families(documents: Sequence[str]) -> list[list[str]]:
    """Documents that share a paragraph stand together: pydoc prints the same section under several topics."""
    families: list[tuple[list[str], set[str]]] = []
    for document in dict.fromkeys(documents):
        paragraphs = {text for part in document.split("\n\n") if len(text := part.strip()) >= PARAGRAPH_CHARACTERS}
        related = [family for family in families if family[1] & paragraphs]
        families = [family for family in families if not family[1] & paragraphs]
        members = [member for family in related for member in family[0]] + [document]
        families.append((members, paragraphs.union(*(family[1] for family in related))))
    return [members for members, _ in families]


def read_documents(calibration: str | Path | Sequence[str]) -> tuple[list[str], str]:
    """The documents and a name for them.

    Args:
        calibration: "builtin", the path of a UTF-8 text file (one document), or a sequence of strings.

    Raises:
        CalibrationError: no such file, not text, or nothing but white space.
    """
    if isinstance(calibration, (str, Path)):
        if str(calibration) == "builtin":
            return builtin_documents(), "builtin"
        path = Path(calibration)
        if not path.is_file():
            raise CalibrationError(f'calibration {str(calibration)!r}: no such file; give a text file or "builtin"')
        try:
            documents, source = [path.read_text(encoding="utf-8")], path.name
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"calibration {path}: not UTF-8 text (byte {error.start}); convert it first"
            ) from None
        except OSError as error:
            raise CalibrationError(f"calibration {path}: cannot be read ({error.strerror})") from None
    else:
        documents, source = list(calibration), f"list of {len(calibration)} strings"
        for index, document in enumerate(documents):
            if not isinstance(document, str):
                raise CalibrationError(f"calibration[{index}]: expected a string, got {type(document).__name__}")
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"calibration {source}: empty; give text of at least {MIN_BLOCK_TOKENS} tokens")
    return documents, source


def build_calibration_set(
    tokenizer: Any,
    calibration: str | Path | Sequence[str],
    *,
    max_calib_samples: int,
    max_calib_seq_len: int,
    seed: int,
) -> CalibrationSet:
    """Tokenize, cut into blocks, choose.

    Args:
        tokenizer: the model's (Hugging Face).
        calibration: see `read_documents`.
        max_calib_samples: how many blocks to keep at most.
        max_calib_seq_len: tokens in a block at most.
        seed: which blocks are kept when there are more; the same seed keeps the same ones.

    Raises:
        CalibrationError: no text, or too little for a single block.
    """
    if max_calib_samples < 1 or max_calib_seq_len < MIN_BLOCK_TOKENS:
        raise CalibrationError(
            f"max_calib_samples must be at least 1 and max_calib_seq_len at least {MIN_BLOCK_TOKENS}, "
            f"got {max_calib_samples} and {max_calib_seq_len}"
        )
    documents, source = read_documents(calibration)
    blocks: list[torch.Tensor] = []
    tokens = 0
    for document in documents:
        ids = torch.tensor(tokenizer(document, verbose=False)["input_ids"], dtype=torch.int64)
        tokens += len(ids)
        blocks += [block for block in torch.split(ids, max_calib_seq_len) if len(block) >= MIN_BLOCK_TOKENS]
    if not blocks:
        raise CalibrationError(
            f"calibration {source}: {tokens} tokens, too little to calibrate on; "
            f"give text of at least {MIN_BLOCK_TOKENS} tokens in one document"
        )
    # Full blocks first: they say more for the same pass. Python's generator is stable across versions.
    random.Random(seed).shuffle(blocks)
    blocks.sort(key=lambda block: len(block) < max_calib_seq_len)
    return CalibrationSet(tuple(blocks[:max_calib_samples]), source)
