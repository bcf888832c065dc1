"""A Hugging Face tokenizer as entries of a GGUF file: byte-level BPE, as Llama 3, Qwen, SmolLM and GPT-2 have it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.checkpoints.gguf_vocabulary import CONTROL, ENDS_OF_TURN, NORMAL, PATTERNS, UNUSED, USER_DEFINED
from halfbyte.checkpoints.reader import read_json_object
from halfbyte.errors import UnsupportedError

# How the text is cut before BPE → what llama.cpp calls it.
_BY_REGEX = {pattern: name for name, pattern in PATTERNS.items()}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says of a tokenizer.

    Attributes:
        pre: llama.cpp's name for how text is cut before BPE.
        tokens: of every id, as byte-level BPE spells them.
        types: `NORMAL`, `CONTROL`, `USER_DEFINED` or `UNUSED`, of every id.
        merges: "left right", in order.
        ids: "bos", "eos", "eot", "pad", "unk" → id, of those there are.
        add_bos: whether a text begins with the first of them.
        chat_template: Jinja, or None.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    add_bos: bool
    chat_template: str | None


def read_gguf_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: of the checkpoint.
        vocab_size: rows of its embedding; ids beyond the tokenizer's become unused tokens.

    Raises:
        UnsupportedError: no byte-level BPE, or one that llama.cpp has no name for.
        HalfbyteError: the folder has no tokenizer.
    """
    loaded = load_tokenizer(folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(f"{folder}: its tokenizer has no tokenizer.json, of which a GGUF file is made")
    document = json.loads(backend.to_str())
    model = document["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError(f"{folder}: its tokenizer is no byte-level BPE; only those are written to GGUF files")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    added = {entry["id"]: entry for entry in document["added_tokens"]}
    for text, index in {**model["vocab"], **{entry["content"]: index for index, entry in added.items()}}.items():
        if index >= vocab_size:
            raise UnsupportedError(f"{folder}: its tokenizer has an id {index}, the embedding {vocab_size} rows")
        tokens[index], types[index] = text, NORMAL
    for index, entry in added.items():
        types[index] = CONTROL if entry["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = _special_ids(folder, loaded, tokens)
    first = loaded("a")["input_ids"]
    return GgufTokenizer(
        _pre(document.get("pre_tokenizer"), folder),
        tokens,
        types,
        merges,
        ids,
        bool(first) and first[0] == ids.get("bos"),
        loaded.chat_template if isinstance(loaded.chat_template, str) else None,
    )


def _pre(document: Any, folder: Path) -> str:
    parts = document["pretokenizers"] if (document or {}).get("type") == "Sequence" else [document or {}]
    match [part.get("type") for part in parts]:
        case ["ByteLevel"] if parts[0]["use_regex"]:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        case ["Split", "ByteLevel"] if not parts[1]["use_regex"]:
            name = _BY_REGEX.get(parts[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise UnsupportedError(
        f"{folder}: its tokenizer cuts text in a way that is not known here by llama.cpp's names; known are gpt-2, "
        f"smollm, {', '.join(_BY_REGEX.values())}"
    )


def _special_ids(folder: Path, loaded: Any, tokens: list[str]) -> dict[str, int]:
    found = {name: getattr(loaded, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    ends: list[int] = []
    if (folder / "generation_config.json").is_file():
        listed = read_json_object(folder / "generation_config.json").get("eos_token_id")
        ends = [listed] if isinstance(listed, int) else [end for end in listed or [] if isinstance(end, int)]
    if found["eos"] is None and ends:
        found["eos"] = ends[0]
    turns = (end for end in ends if end < len(tokens) and tokens[end] in ENDS_OF_TURN and end != found["eos"])
    found["eot"] = next(turns, None)
    return {name: index for name, index in found.items() if index is not None}
