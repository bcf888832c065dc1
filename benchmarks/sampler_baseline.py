"""The yardstick of `rejection_sampler.py`: the rejection sampler as the paper is usually written down.

Leviathan, Kalman, Matias 2023, "Fast inference from transformers via speculative decoding", algorithm 1: sequence by
sequence, position by position, one check each, `torch.multinomial` for what is drawn. It is honest, plain PyTorch and
is not to be changed: speed-ups are only comparable as long as it stays as it is.
"""

from __future__ import annotations

import torch


def rejection_sample_loop(
    draft_ids: torch.Tensor,
    draft_probs: torch.Tensor,
    target_probs: torch.Tensor,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Tokens of each sequence: the accepted drafts, then one more.

    Args:
        draft_ids: int64 [B, K].
        draft_probs: float32 [B, K, V], what the ids were drawn from.
        target_probs: float32 [B, K + 1, V].
        generator: the source of randomness.
    """
    results = []
    for batch in range(draft_ids.shape[0]):
        tokens: list[int] = []
        for position in range(draft_ids.shape[1]):
            token = draft_ids[batch, position].item()
            p, q = target_probs[batch, position], draft_probs[batch, position]
            if torch.rand((), generator=generator).item() < (p[token] / q[token]).item():
                tokens.append(token)
                continue
            residual = torch.clamp(p - q, min=0)
            residual = residual / residual.sum()
            tokens.append(torch.multinomial(residual, 1, generator=generator).item())
            break
        else:
            tokens.append(torch.multinomial(target_probs[batch, -1], 1, generator=generator).item())
        results.append(tokens)
    return results
