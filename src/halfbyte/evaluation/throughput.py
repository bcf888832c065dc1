"""Tokens per second: prefill and decoding measured apart, as medians."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from halfbyte.errors import ConfigError
from halfbyte.generation.loop import generate_tokens
from halfbyte.generation.model import Model
from halfbyte.sampling.filters import SamplingParameters


@dataclass(frozen=True)
class Throughput:
    """Medians over the repeats.

    Attributes:
        prefill_tokens_per_second: prompt tokens over the time to the first new token.
        decode_tokens_per_second: new tokens after the first over their time, one sequence.
        prompt_tokens: length of the prompt.
        new_tokens: tokens generated, the first included.
        repeats: measurements; one more before them warms up and is not counted.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    repeats: int


def measure_throughput(model: Model, *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 3) -> Throughput:
    """Time greedy generation on a fixed pseudo-random prompt (speed does not depend on which tokens they are).

    Args:
        model: loaded.
        prompt_tokens: length of the prompt, at least 1.
        new_tokens: at least 2: the first belongs to the prefill.
        repeats: measurements to take the median of.
    """
    if prompt_tokens < 1 or new_tokens < 2 or repeats < 1:
        raise ConfigError(
            "throughput: expected prompt_tokens >= 1, new_tokens >= 2 and repeats >= 1, "
            f"got {prompt_tokens}, {new_tokens}, {repeats}"
        )
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.engine.vocabulary, (prompt_tokens,), generator=generator).tolist()
    runs = [_time_once(model, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    return Throughput(
        prompt_tokens / statistics.median(prefill for prefill, _ in runs),
        (new_tokens - 1) / statistics.median(decode for _, decode in runs),
        prompt_tokens,
        new_tokens,
        repeats,
    )


def _time_once(model: Model, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token and seconds for the rest."""
    start = time.perf_counter()
    tokens = generate_tokens(
        model.engine.session(len(prompt) + new_tokens),
        prompt,
        max_new_tokens=new_tokens,
        parameters=SamplingParameters(),
        generator=torch.Generator(),
        stop_ids=frozenset(),
    )
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - start, time.perf_counter() - first
