"""Calibration text → blocks of tokens.

Long documents are cut into blocks, never dropped, and no block spans two documents. `seed` chooses which blocks are
kept when there are more than asked for.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import CalibrationError
from halfbyte.quantization.calibration_chat import chat_tokens
from halfbyte.quantization.calibration_sources import (
    Calibration,
    Document,
    Documents,
    builtin_documents,
    read_documents,
)

__all__ = [
    "MIN_BLOCK_TOKENS",
    "Calibration",
    "CalibrationSet",
    "Documents",
    "build_calibration_set",
    "builtin_documents",
    "read_documents",
    "split_text",
]

# A block shorter than this tells less about activations than its padding-free forward pass costs.
MIN_BLOCK_TOKENS = 16
# Tokenizers may take quadratic time or crash on one giant line, so longer texts reach them in pieces.
PIECE_CHARACTERS = 100_000
# Tokenizing this takes seconds. Of more text a part is chosen, in which every wanted token has 32 characters.
TOKENIZED_CHARACTERS = 8_000_000
CHARACTERS_PER_TOKEN = 32
# Before " word", or after a line's end and before a word: places where no usual tokenizer joins the two sides.
CUT = re.compile(r"(?<=\S)(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")
CUT_WITHIN = 2_000


@dataclass(frozen=True)
class CalibrationSet:
    """Token blocks, ready for the model.

    Attributes:
        blocks: int64 [tokens] each, at most `max_calib_seq_len` long, in the order they are used.
        source: what the text was: "builtin", a file or data set, "list of N strings", "self".
        masks: bool [tokens] for each block: whether the activations of a token count in the statistics (all tokens
            run through the model). None when all count.
        skipped: documents of which nothing is long enough for a block.
    """

    blocks: tuple[torch.Tensor, ...]
    source: str
    masks: tuple[torch.Tensor, ...] | None = None
    skipped: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return sum(len(block) for block in self.blocks)

    @property
    def counted(self) -> int:
        """Tokens whose activations count."""
        return self.tokens if self.masks is None else sum(int(mask.sum()) for mask in self.masks)

    @property
    def sha256(self) -> str:
        """Hash of the token ids, block boundaries and masks: equal hashes mean equal calibration."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(len(block).to_bytes(8, "little"))
            digest.update(block.numpy().tobytes())
        for mask in self.masks or ():
            digest.update(mask.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the manifest records of it."""
        return {
            "source": self.source,
            "blocks": len(self.blocks),
            "tokens": self.tokens,
            "counted_tokens": self.counted,
            "skipped_documents": self.skipped,
            "sha256": self.sha256,
        }


def build_calibration_set(
    tokenizer: Any,
    calibration: Calibration,
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
        CalibrationError: no text, too little for a single block, or conversations the chat template refuses.
    """
    if max_calib_samples < 1 or max_calib_seq_len < MIN_BLOCK_TOKENS:
        raise CalibrationError(
            f"max_calib_samples must be at least 1 and max_calib_seq_len at least {MIN_BLOCK_TOKENS}, "
            f"got {max_calib_samples} and {max_calib_seq_len}"
        )
    documents = read_documents(calibration)
    source, assistant_only = documents.source, documents.assistant_only
    limit = max(TOKENIZED_CHARACTERS, CHARACTERS_PER_TOKEN * max_calib_samples * max_calib_seq_len)
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
    tokens = counted = skipped = 0
    for document, where in _affordable(documents, limit, seed):
        if isinstance(document, str):
            ids = _text_tokens(tokenizer, document)
            mask = torch.ones(len(ids), dtype=torch.bool)
        else:
            ids, mask = chat_tokens(tokenizer, document, assistant_only=assistant_only, where=where)
        cut = zip(torch.split(ids, max_calib_seq_len), torch.split(mask, max_calib_seq_len), strict=True)
        useful = [(block, counts) for block, counts in cut if len(block) >= MIN_BLOCK_TOKENS and counts.any()]
        blocks += useful
        tokens, counted, skipped = tokens + len(ids), counted + int(mask.sum()), skipped + (not useful)
    if not blocks:
        silent = "" if counted or not tokens else ", none of them the assistant's"
        raise CalibrationError(
            f"calibration {source}: {tokens} tokens{silent}, too little to calibrate on; "
            f"give text of at least {MIN_BLOCK_TOKENS} tokens in one document"
        )
    # Full blocks first: they say more for the same pass. Python's generator is stable across versions.
    random.Random(seed).shuffle(blocks)
    blocks.sort(key=lambda block: len(block[0]) < max_calib_seq_len)
    del blocks[max_calib_samples:]
    masked = assistant_only and any(not isinstance(document, str) for document in documents)
    masks = tuple(mask for _, mask in blocks) if masked else None
    return CalibrationSet(tuple(block for block, _ in blocks), source, masks, skipped)


def _affordable(documents: Documents, limit: int, seed: int) -> Iterator[tuple[Document, str]]:
    """The documents with their names; of too much text, pieces that the seed chooses."""
    named = [(document, f"calibration {documents.source}, document {i + 1}") for i, document in enumerate(documents)]
    if sum(_characters(document) for document in documents) <= limit:
        yield from named
        return
    pieces: list[tuple[Document, str]] = []
    for document, where in named:
        parts = split_text(document) if isinstance(document, str) else [document]
        pieces += [(part, where) for part in parts]
    random.Random(seed).shuffle(pieces)
    for piece, where in pieces:
        if limit <= 0:
            return
        limit -= _characters(piece)
        yield piece, where


def _characters(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(str(message)) for message in document)


def _text_tokens(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 [tokens]; special tokens, such as one that opens a text, stand at its beginning only."""
    pieces = []
    for index, piece in enumerate(split_text(text)):
        ids = tokenizer(piece, verbose=False, add_special_tokens=index == 0)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
    return torch.cat(pieces)


def split_text(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most `limit` characters that make up the text, at least one, cut between words where that can be."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        near = max(start + 1, end - CUT_WITHIN)
        cuts = [match.start() for match in CUT.finditer(text, near, end + 1)]
        cut = cuts[-1] if cuts else end
        yield text[start:cut]
        start = cut
    yield text[start:]
