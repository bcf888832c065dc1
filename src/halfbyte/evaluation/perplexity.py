"""Perplexity over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluation.likelihood import context_length
from halfbyte.generation.model import Model, load
from halfbyte.progress import progress_bar

# Tokens per window, where the model's context is not shorter.
WINDOW = 1024


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token.
        window_nll: mean negative log-likelihood (nats per token) of each window, in order.
        tokens: predicted tokens, summed over windows.
        window: tokens of context at most.
        stride: tokens between the starts of neighbouring windows.
    """

    perplexity: float
    window_nll: tuple[float, ...]
    tokens: int
    window: int
    stride: int


def perplexity(model: Model | str | Path, text: str, *, window: int | None = None) -> float:
    """Perplexity of `text`, window by window without overlap.

    Args:
        model: a loaded model, or anything `load` opens.
        text: tokenized as a whole, without special tokens.
        window: tokens per window, 1,024 or the model's context if None; a shorter last window counts too.

    Raises:
        ConfigError: fewer than two tokens of text, or a window of fewer than two or more than the model's context.
    """
    return measure_perplexity(model, text, window=window, progress=False).perplexity


def measure_perplexity(
    model: Model | str | Path,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Sliding-window perplexity with its parts.

    Every window is scored on its own; with `stride` < `window` only the tokens beyond the previous window are counted,
    so each counted token sees at least window - stride tokens of context.

    Args:
        model: a loaded model, or anything `load` opens.
        text: tokenized as a whole, without special tokens.
        window: tokens per window; 1,024 if None, or the model's context where that is shorter.
        stride: tokens to move on by; `window` if None.
        max_windows: stop after so many.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: fewer than two tokens of text, or a window or stride that cannot work.
    """
    model = model if isinstance(model, Model) else load(model)
    context = context_length(model)
    window = min(WINDOW, context) if window is None else window
    stride = window if stride is None else stride
    if window > context:
        raise ConfigError(f"window: expected at most {context:,} tokens, the model's context, got {window:,}")
    if window < 2 or not 1 <= stride <= window:
        raise ConfigError(f"window and stride: expected 2 <= window and 1 <= stride <= window, got {window}, {stride}")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows: expected at least 1, got {max_windows}")
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    if len(ids) < 2:
        raise ConfigError(f"text: expected at least two tokens to predict one from another, got {len(ids)}")

    spans = list(_windows(len(ids), window, stride))[:max_windows]
    total, counted, means = 0.0, 0, []
    with progress_bar("Perplexity", len(spans), enabled=progress, unit="windows") as ticker:
        for start, end, first in spans:
            losses = _token_losses(model, ids[start:end])[first - start - 1 :]
            total += float(losses.sum(dtype=torch.float64))
            counted += len(losses)
            means.append(float(losses.mean(dtype=torch.float64)))
            ticker.advance()
    return PerplexityResult(math.exp(total / counted), tuple(means), counted, window, stride)


def _windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first counted position) of each window; the first token of a window cannot be predicted."""
    scored = 0
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        first = max(start + 1, scored)
        if first < end:
            yield start, end, first
        scored = end
        if end == tokens:
            return


def _token_losses(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of ids[1:] given what precedes each: float32 [len(ids) - 1]."""
    logits = model.logits(ids)[:-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
