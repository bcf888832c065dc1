"""The last word of a passage, guessed: LAMBADA (Paperno et al. 2016), scored as lm-evaluation-harness does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.errors import ConfigError
from halfbyte.evaluation.likelihood import encode_pair, score_continuations
from halfbyte.generation.model import Model, load
from halfbyte.progress import progress_bar


@dataclass(frozen=True)
class LastWordResult:
    """What was measured.

    Attributes:
        accuracy: share of passages whose last word greedy decoding writes, every token of it.
        accuracy_stderr: standard error of it; 0 for one passage.
        perplexity: exp of the mean negative log-likelihood of the last word, all of its tokens together.
        perplexity_stderr: standard error of it, by the delta method.
        passages: how many.
    """

    accuracy: float
    accuracy_stderr: float
    perplexity: float
    perplexity_stderr: float
    passages: int


def measure_last_word(
    model: Model | str | Path,
    passages: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> LastWordResult:
    """How well a model guesses the last word of passages, given all that stands before it.

    The word is what follows the last space, with that space, as in lm-evaluation-harness's task lambada_openai.

    Args:
        model: a loaded model, or anything `load` opens.
        passages: at least two words each.
        limit: only the first so many.
        batch_size: passages that go through the model together.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: no passage, or one without a last word.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1, got {limit}")
    passages = passages[:limit]
    if not passages:
        raise ConfigError("passages: none; expected at least one text")
    parts = [passage.rpartition(" ") for passage in passages]
    for number, (context, _, word) in enumerate(parts, start=1):
        if not context.strip() or not word.strip():
            raise ConfigError(f"passage {number}: expected at least two words, got {passages[number - 1]!r:.60}")
    model = model if isinstance(model, Model) else load(model)
    pairs = [encode_pair(model.tokenizer, context, f" {word}") for context, _, word in parts]
    logprobs, hits = np.empty(len(pairs)), np.empty(len(pairs))
    with progress_bar("Guessing last words", len(pairs), enabled=progress, unit="passages") as ticker:
        for number, found in score_continuations(model, pairs, batch_size=batch_size):
            logprobs[number], hits[number] = found.logprob, found.greedy
            ticker.advance()
    perplexity = math.exp(-float(logprobs.mean()))
    return LastWordResult(float(hits.mean()), _stderr(hits), perplexity, perplexity * _stderr(logprobs), len(passages))


def _stderr(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
