"""The plain decoding loop: one token per step over the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch

from halfbyte.runtime.engine import Session
from halfbyte.sampling.filters import SamplingParameters, choose_token


def generate_tokens(
    session: Session,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    parameters: SamplingParameters,
    generator: torch.Generator,
    stop_ids: Set[int],
) -> Iterator[int]:
    """Yield new token ids one by one; a stop id ends the sequence and is not yielded.

    Args:
        session: an empty sequence of a model.
        prompt: token ids, at least one.
        max_new_tokens: how many to yield at most.
        parameters: how each is chosen.
        generator: the source of randomness, on the CPU.
        stop_ids: end-of-sequence ids; empty to always run to `max_new_tokens`.
    """
    step = prompt
    for _ in range(max_new_tokens):
        token = choose_token(session.step(step), parameters, generator)
        if token in stop_ids:
            return
        yield token
        step = [token]
