"""The plain decoding loop: one token per step over the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch

from halfbyte.sampling.filters import SamplingParameters, choose_token


@torch.inference_mode()
def generate_tokens(
    network: Any,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    parameters: SamplingParameters,
    generator: torch.Generator,
    stop_ids: Set[int],
) -> Iterator[int]:
    """Yield new token ids one by one; a stop id ends the sequence and is not yielded.

    Args:
        network: a transformers causal language model.
        prompt: int64 [tokens], at least one.
        max_new_tokens: how many to yield at most.
        parameters: how each is chosen.
        generator: the source of randomness, on the CPU.
        stop_ids: end-of-sequence ids; empty to always run to `max_new_tokens`.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=network.config)
    step = prompt.unsqueeze(0)
    for _ in range(max_new_tokens):
        logits = network(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = choose_token(logits.cpu(), parameters, generator)
        if token in stop_ids:
            return
        yield token
        step = torch.tensor([[token]], device=prompt.device)
