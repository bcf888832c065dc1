"""The tokenizer of a GGUF file as tokenizer.json: byte-level BPE, and SentencePiece's BPE of Llama 2 and Gemma."""

from __future__ import annotations

from typing import Any

from halfbyte.checkpoints.gguf_reader import GgufFile
from halfbyte.checkpoints.header import shown
from halfbyte.checkpoints.writer import CheckpointWriter
from halfbyte.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How text is cut before BPE, by llama.cpp's names for it.
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "qwen2": LLAMA3_PATTERN.replace("{1,3}", "")}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "default": "gpt-2"}
# Ends of a turn, where a chat template has one beside the end of a text.
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
# SentencePiece's own limit is 16 unless a training asks for more; trying all cuts takes the square of it.
MAX_PIECE = 1024
_SPACE = "▁"
_PREFIX = "tokenizer.ggml"


def write_vocabulary(file: GgufFile, config: dict[str, Any], writer: CheckpointWriter) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        file: opened.
        config: config.json, for the special ids and the length of the context.
        writer: of the folder.

    Raises:
        UnsupportedError: another kind of tokenizer, or a way to cut text that is not known here.
        CheckpointError: the entries contradict each other.
    """
    tokens = file.texts(f"{_PREFIX}.tokens")
    if len(tokens) > config["vocab_size"]:
        raise CheckpointError(f"{file.path}: has {len(tokens):,} tokens, the embedding {config['vocab_size']:,} rows")
    types = [int(kind) for kind in file.numbers(f"{_PREFIX}.token_type", len(tokens))]
    ids = _special_ids(file, len(tokens))
    if ids["unk"] is None and UNKNOWN in types:
        ids["unk"] = types.index(UNKNOWN)
    model = file.text(f"{_PREFIX}.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(f"{file.path}: tokenizer {shown(model)}: gpt2 (byte-level BPE) and llama are read")
    try:
        build = _byte_level if model == "gpt2" else _sentence_piece
        tokenizer, adds_bos = build(file, tokens, types)
        _finish(file, tokenizer, tokens, types, ids, adds_bos)
    except (UnsupportedError, CheckpointError):
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions, of merges that name no token
        reason = shown((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise CheckpointError(f"{file.path}: its tokenizer cannot be built ({reason})") from error
    writer.add_text("tokenizer.json", tokenizer.to_str(pretty=False))
    named = {f"{name}_token": None if index is None else tokens[index] for name, index in ids.items() if name != "eot"}
    template = "tokenizer.chat_template"
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": file.text(template) if template in file.metadata else None,
    }
    writer.add_json("tokenizer_config.json", document)
    ends = {ids["eos"], ids["eot"], *(index for index, text in enumerate(tokens) if text in ENDS_OF_TURN)}
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "pad")}
    writer.add_json(
        "generation_config.json", {**generation, "eos_token_id": sorted(end for end in ends if end is not None)}
    )


def _special_ids(file: GgufFile, count: int) -> dict[str, int | None]:
    """By their short names; None of those that the file does not have."""
    ids: dict[str, int | None] = {}
    for name, long in {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding", "unk": "unknown"}.items():
        key = f"{_PREFIX}.{long}_token_id"
        ids[name] = index = file.whole(key) if key in file.metadata else None
        if index is not None and index >= count:
            raise CheckpointError(f"{file.path}: metadata {key}: {index:,} is none of its {count:,} tokens")
    return ids


def _finish(
    file: GgufFile, tokenizer: Any, tokens: list[str], types: list[int], ids: dict[str, int | None], adds_bos: bool
) -> None:
    """Tokens that are never cut, and what comes before and behind a text."""
    from tokenizers import AddedToken, processors

    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    first = ids["bos"] if file.flag(f"{_PREFIX}.add_bos_token", adds_bos) else None
    last = ids["eos"] if file.flag(f"{_PREFIX}.add_eos_token", False) else None
    ends = [(tokens[index], index) for index in (first, last) if index is not None]
    if ends:
        single = [f"{tokens[first]}:0"] if first is not None else []
        single += ["$A:0", *([f"{tokens[last]}:0"] if last is not None else [])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)


def _byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = file.text(f"{_PREFIX}.pre", "gpt-2")
    pre = _ALIASES.get(pre, pre)
    if pre not in (*PATTERNS, "smollm", "gpt-2"):
        raise UnsupportedError(
            f"{file.path}: cuts text the way that llama.cpp calls {shown(pre)}; known here are gpt-2, smollm, "
            f"{', '.join(PATTERNS)}"
        )
    pairs = [merge.partition(" ") for merge in file.texts(f"{_PREFIX}.merges")]
    merges = [(left, right) for left, _, right in pairs]
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    # Llama 3's words that are tokens are never cut, whatever the merges say.
    whole = pre == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in PATTERNS)
    parts: list[Any] = [byte_level]
    if pre == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif pre in PATTERNS:
        parts = [pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated"), byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else byte_level
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole


def _sentence_piece(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Spaces are written ▁, a text begins with one, and what is no token falls apart into bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.numbers(f"{_PREFIX}.scores", len(tokens))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    pieces = {token: index for index, token in enumerate(tokens)}
    wanted = [index for index, kind in enumerate(types) if kind == NORMAL]
    merges = _merges(tokens, scores, wanted, pieces)
    model = models.BPE(vocab=pieces, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.flag(f"{_PREFIX}.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _merges(tokens: list[str], scores: list[float], wanted: list[int], pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first.

    SentencePiece merges the two neighbours whose union scores highest; BPE by rank does the same with these merges.
    """
    found: list[tuple[float, int, str, str]] = []
    for index in wanted:
        piece = tokens[index]
        if len(piece) > MAX_PIECE:
            raise ValueError(f"a token of {len(piece):,} characters")
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[index], index, left, right))
    return [(left, right) for _, _, left, right in sorted(found, key=lambda merge: merge[:2])]
