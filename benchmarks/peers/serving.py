"""What every contestant of benchmarks/cpu_decode.py answers: lines of JSON on standard input and output.

A contestant holds one model in a process of its own and computes only between a request and its answer. Otherwise it
waits in a read, so that all of them can be alive at once and take turns. This file needs nothing but numpy: it runs in
the peers' environments.

    {"do": "describe"}                                   → what a step reads, and which versions answer
    {"do": "threads", "count": 2}                        → from now on
    {"do": "start", "sequences": 4, "capacity": 528}     → empty sequences
    {"do": "fill", "prompts": [[ids], …]}                → what decoding begins behind
    {"do": "decode", "steps": [[id of each], …]}         → seconds of each step; then back to behind the prompts
    {"do": "prefill", "prompts": [[ids], …]}             → seconds to the logits of the last tokens; then empty again
    {"do": "score", "windows": FILE}                     → perplexity of windows of token ids, each alone
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Contestant(Protocol):
    """One model that can be stepped."""

    def describe(self) -> dict[str, Any]:
        """weight_bytes: of the matrices a step reads; cache_bytes: of a position of a sequence; versions."""

    def set_threads(self, count: int) -> None:
        """Compute with so many; where the sequences are is kept."""

    def start(self, sequences: int, capacity: int) -> None:
        """Empty sequences with room for so many tokens each; what was before may go."""

    def step(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens to every sequence, equally many; the logits of the last of each can be read afterwards."""

    def mark(self) -> None:
        """Remember where the sequences are."""

    def rewind(self) -> None:
        """Go back there; to the start where nothing was marked."""

    def logits(self, ids: Sequence[int]) -> Any:
        """Of every position of a sequence by itself: float32 [tokens, vocabulary]."""


def serve(make: Callable[[], Contestant]) -> None:
    """Load, then answer until standard input ends.

    What libraries print goes to standard error, native ones included: standard output is for answers.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    contestant = make()
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        answer(_ACTIONS[request.pop("do")](contestant, **request) or {})


def _decode(contestant: Contestant, steps: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The first step is not counted: it pays for what the contestant before it left in the caches."""
    seconds = []
    for step in steps:
        tokens = [[token] for token in step]
        start = time.perf_counter()
        contestant.step(tokens)
        seconds.append(time.perf_counter() - start)
    contestant.rewind()
    return {"seconds": seconds[1:]}


def _fill(contestant: Contestant, prompts: Sequence[Sequence[int]]) -> None:
    if prompts[0]:
        contestant.step(prompts)
    contestant.mark()


def _prefill(contestant: Contestant, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    start = time.perf_counter()
    contestant.step(prompts)
    seconds = time.perf_counter() - start
    contestant.rewind()
    return {"seconds": seconds}


def _score(contestant: Contestant, windows: str) -> dict[str, Any]:
    total, counted = 0.0, 0
    for ids in json.loads(Path(windows).read_text(encoding="utf-8")):
        logits = np.asarray(contestant.logits(ids), dtype=np.float32)[:-1]
        highest = logits.max(axis=1)
        wanted = logits[np.arange(len(ids) - 1), ids[1:]] - highest
        logits -= highest[:, None]
        np.exp(logits, out=logits)
        total += float((np.log(logits.sum(axis=1, dtype=np.float64)) - wanted).sum())
        counted += len(ids) - 1
    return {"perplexity": float(np.exp(total / counted)), "tokens": counted}


_ACTIONS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "describe": lambda contestant: contestant.describe(),
    "threads": lambda contestant, count: contestant.set_threads(count),
    "start": lambda contestant, sequences, capacity: contestant.start(sequences, capacity),
    "fill": _fill,
    "decode": _decode,
    "prefill": _prefill,
    "score": _score,
}
