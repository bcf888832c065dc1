"""What speculation gains: the same prompts with and without a draft, in turn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import ConfigError
from halfbyte.generation.loop import Generation
from halfbyte.generation.model import Model
from halfbyte.generation.prompts import Prompt
from halfbyte.generation.speculation import Speculation

# An output whose end says one thing again and again tells nothing about drafts of other texts.
LOOP_TOKENS, LOOP_NGRAM, LOOP_TIMES = 64, 16, 3


@dataclass(frozen=True)
class SpeculationSpeed:
    """One prompt, continued with a draft and without.

    Attributes:
        prompt_tokens: its length.
        new_tokens: with the draft.
        plain_seconds_per_token: after the first token.
        seconds_per_token: the same with the draft.
        total_ratio: time of the whole call without the draft over that with it, both prompts included.
        same_tokens: whether both texts are the same.
        loops: whether the text with the draft ends in a loop: its last 64 tokens hold 16 in a row three times.
        counters: what the draft did.
        text: with the draft.
    """

    prompt_tokens: int
    new_tokens: int
    plain_seconds_per_token: float
    seconds_per_token: float
    total_ratio: float
    same_tokens: bool
    loops: bool
    counters: Speculation
    text: str

    @property
    def speed_up(self) -> float:
        """Of decoding, the prompt not counted."""
        return self.plain_seconds_per_token / self.seconds_per_token

    @property
    def predicted(self) -> float | None:
        """What acceptance and cost make of it: tokens a pass over its cost in plain steps; None without a draft."""
        counters = self.counters
        if not counters.passes or counters.tokens_per_pass is None:
            return None
        spent = counters.draft_seconds + counters.verify_seconds + counters.sampler_seconds
        emitted = counters.emitted + counters.plain_passes
        return emitted / (spent / self.plain_seconds_per_token)

    @property
    def sampler_share(self) -> float:
        """Of the time in the loop, what the rejection sampler takes."""
        counters = self.counters
        return counters.sampler_seconds / (counters.draft_seconds + counters.verify_seconds + counters.sampler_seconds)


def measure_speculation(
    model: Model,
    prompts: Sequence[Prompt],
    draft: str | Path,
    *,
    draft_length: int | Literal["auto"] = "auto",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    rounds: int = 1,
) -> Iterator[SpeculationSpeed]:
    """Continue prompts one by one, each without and with a draft, in turn.

    Args:
        model: the target.
        prompts: to continue.
        draft: see `Model.generate`.
        draft_length: likewise.
        max_new_tokens: of each text.
        temperature: of both.
        rounds: of both for each prompt; the faster of each kind counts.

    Yields:
        One for each prompt whose texts have at least two tokens.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "return_details": True}
    for number, prompt in enumerate(prompts):
        pairs: list[tuple[Generation, Generation]] = []
        for _ in range(rounds):
            seed = number if temperature else None
            plain = model.generate(prompt, seed=seed, **settings)
            drafted = model.generate(prompt, seed=seed, draft=draft, draft_length=draft_length, **settings)
            pairs.append((plain, drafted))
        plain = min((pair[0] for pair in pairs), key=_seconds_per_token)
        drafted = min((pair[1] for pair in pairs), key=_seconds_per_token)
        if min(plain.new_tokens, drafted.new_tokens) < 2:
            continue
        assert drafted.speculation is not None
        yield SpeculationSpeed(
            prompt_tokens=plain.prompt_tokens,
            new_tokens=drafted.new_tokens,
            plain_seconds_per_token=_seconds_per_token(plain),
            seconds_per_token=_seconds_per_token(drafted),
            total_ratio=_seconds(plain) / plain.new_tokens / (_seconds(drafted) / drafted.new_tokens),
            same_tokens=plain.token_ids == drafted.token_ids,
            loops=ends_in_a_loop(drafted.token_ids),
            counters=drafted.speculation,
            text=drafted.text,
        )


def ends_in_a_loop(token_ids: Sequence[int]) -> bool:
    """Whether the last 64 tokens hold some 16 in a row three times."""
    last = tuple(token_ids[-LOOP_TOKENS:])
    counts = Counter(last[n : n + LOOP_NGRAM] for n in range(len(last) - LOOP_NGRAM + 1))
    return max(counts.values(), default=0) >= LOOP_TIMES


def article_openings(text: str, count: int) -> list[str]:
    """The beginnings of the first articles of a WikiText file, headings included.

    Raises:
        ConfigError: there are not so many.
    """
    starts = [match.start() for match in re.finditer(r"^ = [^=\n]+ = $", text, re.MULTILINE)]
    if len(starts) < count:
        raise ConfigError(f"articles: expected at least {count}, found {len(starts)}; is this a WikiText file?")
    return [text[start : start + 2000].lstrip() for start in starts[:count]]


def _seconds(generation: Generation) -> float:
    return generation.prefill_seconds + generation.decode_seconds


def _seconds_per_token(generation: Generation) -> float:
    return generation.decode_seconds / max(generation.new_tokens - 1, 1)
