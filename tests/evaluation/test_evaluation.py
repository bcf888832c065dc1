from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.evaluation.perplexity import _windows, measure_perplexity
from halfbyte.evaluation.throughput import measure_throughput
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> halfbyte.Model:
    return halfbyte.load(tiny_llama)


def test_perplexity_is_its_definition_window_by_window(model: halfbyte.Model) -> None:
    text = TEXT[:1200]
    ids = model.tokenizer(text)["input_ids"]
    losses: list[float] = []
    for start in range(0, len(ids), 64):
        window = ids[start : start + 64]
        log_probabilities = torch.log_softmax(model.logits(window).double(), dim=-1)
        losses += [-float(log_probabilities[i, window[i + 1]]) for i in range(len(window) - 1)]
    assert halfbyte.perplexity(model, text, window=64) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_a_stride_counts_every_token_once_with_more_context(model: halfbyte.Model) -> None:
    text = TEXT[:1200]
    tokens = len(model.tokenizer(text)["input_ids"])
    result = measure_perplexity(model, text, window=64, stride=16, progress=False)
    assert result.tokens == tokens - 1
    assert len(result.window_nll) == 1 + math.ceil((tokens - 64) / 16)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(100, 30, 30), (100, 30, 7), (30, 30, 30), (31, 30, 30), (2, 9, 9)]
)
def test_windows_cover_the_text(tokens: int, window: int, stride: int) -> None:
    spans = list(_windows(tokens, window, stride))
    counted = [position for _, end, first in spans for position in range(first, end)]
    assert len(counted) == len(set(counted))
    assert all(end - start <= window and first > start for start, end, first in spans)
    unpredicted = {start for start, _, _ in spans} if stride == window else {0}
    assert set(range(tokens)) - set(counted) <= unpredicted | {tokens - 1}


def test_no_window_is_longer_than_the_context(model: halfbyte.Model) -> None:
    assert model.config.max_position_embeddings == 512
    assert measure_perplexity(model, TEXT, max_windows=1, progress=False).window == 512
    with pytest.raises(ConfigError, match="window: expected at most 512 tokens, the model's context, got 513"):
        measure_perplexity(model, TEXT, window=513)


def test_max_windows_stops_early_and_a_name_is_loaded(tiny_llama: Path) -> None:
    result = measure_perplexity(tiny_llama, TEXT, window=32, max_windows=2, progress=False)
    assert (len(result.window_nll), result.tokens) == (2, 62)


@pytest.mark.parametrize(
    ("text", "settings"),
    [("", {}), ("x", {}), (TEXT, {"window": 1}), (TEXT, {"window": 8, "stride": 9}), (TEXT, {"max_windows": 0})],
)
def test_what_cannot_be_measured_is_refused(model: halfbyte.Model, text: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        measure_perplexity(model, text, progress=False, **settings)


def test_throughput_reports_what_it_did(model: halfbyte.Model) -> None:
    result = measure_throughput(model, prompt_tokens=8, new_tokens=4, repeats=2)
    assert (result.prompt_tokens, result.new_tokens, result.repeats) == (8, 4, 2)
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
    with pytest.raises(ConfigError, match="new_tokens"):
        measure_throughput(model, new_tokens=1)
