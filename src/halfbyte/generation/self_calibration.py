"""Calibration text that the model writes itself, for when no text like its training data is at hand.

Sampled at temperature 1, the model's text has the distribution it was trained towards, so its activations are the ones
that matter (Williams, Chrysostomou and Aletras 2024, "Self-calibration for Language Model Quantization and Pruning").
`quantization` may not call this room, so `quantize` here is the public one: it has the text written and hands it down.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte.checkpoints.cache import cache_folder
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import resolve_model
from halfbyte.device.cpu import has_bf16_arithmetic
from halfbyte.errors import CalibrationError, ConfigError
from halfbyte.generation.model import Model, load
from halfbyte.progress import progress_bar
from halfbyte.quantization import pipeline
from halfbyte.quantization.budget import parse_bytes
from halfbyte.quantization.calibration import MIN_BLOCK_TOKENS, Documents, builtin_documents
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.identity import model_hash, versions
from halfbyte.quantization.report import QuantizationReport

# Documents written side by side: a step of decoding reads all weights, whether for one document or for these.
BATCH = 32
# Text that is tokenized again rarely has just as many tokens: these more make sure that a block is filled.
SPARE_TOKENS = 32
# Raised whenever the same model and seed come to write another text, so that the kept one is not used.
WRITER = 1


@functools.wraps(pipeline.quantize)
def quantize(  # noqa: D103 - the docstring is the pipeline's
    model: str | Path,
    output_dir: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: Any = "builtin",
    **options: Any,
) -> QuantizationReport:
    if calibration == "self":
        calibration = Documents("self", lambda: _kept_text(model, options))
    return pipeline.quantize(model, output_dir, config, calibration=calibration, **options)


def _kept_text(model: str | Path, options: dict[str, Any]) -> list[str]:
    """What the model writes, or wrote: kept in the cache, so that an interrupted run goes on with the same text."""
    parameters = inspect.signature(pipeline.quantize).parameters
    option = {name: options.get(name, parameters[name].default) for name in parameters}
    folder = resolve_model(model)
    checkpoint = Checkpoint.open(folder)
    request = {
        "tokens": option["max_calib_samples"] * option["max_calib_seq_len"],
        "document_tokens": option["max_calib_seq_len"],
        "seed": option["seed"],
    }
    identity = {"writer": WRITER, "model": model_hash(checkpoint), **request, **versions()}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "calibration" / f"{key[:32]}.json"
    try:
        documents = json.loads(path.read_text(encoding="utf-8"))["documents"]
        if isinstance(documents, list) and all(isinstance(document, str) for document in documents):
            return documents
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: write it
    _check_budget(checkpoint, option["memory_budget"])
    device = str(option["device"]).partition(",")[0]
    writer = _in_fast_dtype(load(folder, device=device, backend="transformers"))
    documents = write_calibration_text(writer, **request, progress=option["progress"])
    _keep(path, {**identity, "documents": documents})
    return documents


def _check_budget(checkpoint: Checkpoint, budget: int | str | None) -> None:
    """To write, a model must be whole in memory, other than to be quantized."""
    needed = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
    if budget is not None and parse_bytes(budget) < needed:
        raise ConfigError(
            f"memory_budget: to write its calibration text the model must be in memory whole, {needed / 1e9:.1f} GB; "
            'give more, or another calibration than "self"'
        )


def _in_fast_dtype(model: Model) -> Model:
    """In fp32 on a CPU whose 16-bit products are emulated, which is tens of times slower, if there is room for it."""
    needed = 4 * sum(parameter.numel() for parameter in model.network.parameters())
    if (
        model.device.type == "cpu"
        and not model.quantized
        and not has_bf16_arithmetic()
        and needed < psutil.virtual_memory().available // 2
    ):
        model.network.float()
    return model


def _keep(path: Path, document: dict[str, Any]) -> None:
    """Into the cache, or not at all: without it an interrupted run writes the text again."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def write_calibration_text(
    model: Model, *, tokens: int, seed: int, document_tokens: int = 512, progress: bool = True
) -> list[str]:
    """Have a model write documents, sampled at temperature 1.

    Every other document begins with what the model itself begins with, the others with the first token of a sentence
    of the built-in text, so that not all are alike. Chat models go on after their end-of-turn token with the next
    turn, others with the next document; two such tokens in a row end a document.

    Args:
        model: unquantized, best.
        tokens: how many to write in all, about.
        seed: the same seed writes the same text, on one kind of machine with one number of threads.
        document_tokens: in a document at most; the context window bounds it, too.
        progress: show a bar with an ETA on a terminal.

    Returns:
        Documents with their special tokens spelled out, without the one that the tokenizer itself puts first.

    Raises:
        CalibrationError: numbers out of range, or a model whose logits are not finite.
    """
    if tokens < 1 or document_tokens < MIN_BLOCK_TOKENS:
        raise CalibrationError(
            f"calibration self: expected at least 1 token in documents of at least {MIN_BLOCK_TOKENS}, "
            f"got {tokens} and {document_tokens}"
        )
    window = getattr(model.network.config.get_text_config(), "max_position_embeddings", None) or document_tokens
    length = min(document_tokens + SPARE_TOKENS, window)
    generator = torch.Generator().manual_seed(seed)
    openings = _openings(model, seed)
    wanted = -(-tokens // min(length, document_tokens))
    documents: list[str] = []
    with progress_bar("Writing calibration text", wanted * length, enabled=progress, unit="tokens") as ticker:
        while len(documents) < wanted:
            count = min(BATCH, wanted - len(documents))
            first = [openings[(len(documents) + row) % len(openings)] for row in range(count)]
            rows = _write(model, first, length, generator, lambda: ticker.advance(count))  # noqa: B023 - called in here
            documents += [_text(model, row) for row in rows]
    return documents


def _openings(model: Model, seed: int) -> list[list[int]]:
    """Pairs of the token that opens a text and either nothing yet (-1) or the first token of a sentence."""
    tokenizer = model.tokenizer
    sentences = re.findall(r"^([A-Z][a-z]+) [a-z]", "\n".join(builtin_documents()), re.MULTILINE)
    firsts = {tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in sorted(set(sentences))}
    words = sorted(firsts)
    random.Random(seed).shuffle(words)
    start = _start_token(tokenizer)
    if start is None:
        return [[word, -1] for word in words]
    return [opening for word in words for opening in ([start, -1], [start, word])]


def _start_token(tokenizer: Any) -> int | None:
    """What stands before a text in training: the beginning-of-sequence token, or the end of the text before."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if start is None else int(start)


@torch.inference_mode()
def _write(
    model: Model, openings: Sequence[Sequence[int]], length: int, generator: torch.Generator, advance: Any
) -> list[list[int]]:
    """Token ids of one document for each opening, at most `length` each."""
    from transformers import DynamicCache

    network, stops = model.network, torch.tensor(sorted(model.stop_ids), dtype=torch.int64)
    usable = len(model.tokenizer)  # embeddings may be padded beyond it, with rows that mean nothing
    cache = DynamicCache(config=network.config)
    written = torch.tensor([[first] for first, _ in openings])
    forced = torch.tensor([second for _, second in openings])
    ended = torch.full((len(openings),), length)
    for position in range(1, length):
        step = written[:, -1:].to(model.device)
        logits = network(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        probabilities = torch.softmax(logits[:, :usable].float().cpu(), dim=-1)
        if not torch.isfinite(probabilities).all():
            raise CalibrationError("calibration self: the model's logits are not finite, so it cannot write")
        token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        if position == 1:
            token = torch.where(forced >= 0, forced, token)
        twice = torch.isin(token, stops) & torch.isin(written[:, -1], stops) & (position > 1)
        ended = torch.where(twice & (ended == length), position, ended)
        written = torch.cat([written, token[:, None]], dim=1)
        advance()
        if bool((ended < length).all()):
            break
    return [row[:end].tolist() for row, end in zip(written, ended.tolist(), strict=True)]


def _text(model: Model, ids: list[int]) -> str:
    """Text that is tokenized to the ids again, as far as the tokenizer allows."""
    tokenizer = model.tokenizer
    opened = tokenizer("a")["input_ids"][0] == ids[0]
    stand_in = tokenizer.bos_token_id is None and ids[0] == tokenizer.eos_token_id
    kept = ids[1:] if opened or stand_in else ids
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
