"""Tokens per second: prefill and decoding measured apart, as medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.errors import ConfigError
from halfbyte.generation.loop import generate_tokens
from halfbyte.generation.model import Model
from halfbyte.progress import progress_bar
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
        prefill_seconds: of each, to the first new token.
        decode_seconds: of each, for the others.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


def measure_throughput(model: Model, *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 3) -> Throughput:
    """Time greedy generation on a fixed pseudo-random prompt (speed does not depend on which tokens they are).

    Args:
        model: loaded.
        prompt_tokens: length of the prompt, at least 1.
        new_tokens: at least 2: the first belongs to the prefill.
        repeats: measurements to take the median of.
    """
    return measure_throughputs([model], prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)[0]


def measure_throughputs(
    models: Sequence[Model], *, prompt_tokens: int = 128, new_tokens: int = 32, repeats: int = 3, progress: bool = False
) -> list[Throughput]:
    """The same of several models, in turn in every round: what slows the machine down for a while slows all of them.

    Args:
        models: loaded.
        prompt_tokens: length of the prompt, at least 1.
        new_tokens: at least 2: the first belongs to the prefill.
        repeats: rounds to take the medians of.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: a number too small.
    """
    if prompt_tokens < 1 or new_tokens < 2 or repeats < 1:
        raise ConfigError(
            "throughput: expected prompt_tokens >= 1, new_tokens >= 2 and repeats >= 1, "
            f"got {prompt_tokens}, {new_tokens}, {repeats}"
        )
    prompts = [_prompt(model, prompt_tokens) for model in models]
    runs: list[list[tuple[float, float]]] = [[] for _ in models]
    with progress_bar("Timing", (repeats + 1) * len(models), enabled=progress, unit="runs") as ticker:
        for _ in range(repeats + 1):
            for model, prompt, times in zip(models, prompts, runs, strict=True):
                times.append(_time_once(model, prompt, new_tokens))
                ticker.advance()
    results = []
    for times in runs:
        prefill, decode = zip(*times[1:], strict=True)
        results.append(
            Throughput(
                prompt_tokens / statistics.median(prefill),
                (new_tokens - 1) / statistics.median(decode),
                prompt_tokens,
                new_tokens,
                repeats,
                prefill,
                decode,
            )
        )
    return results


def _prompt(model: Model, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(model.engine.vocabulary, (tokens,), generator=generator).tolist()
    return ids


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
