"""What the tests of the rejection samplers share: the implementations, random cases, two assertions."""

from __future__ import annotations

import torch

from halfbyte.evaluation.chi_square import chi_square

IMPLEMENTATIONS = ["reference", "vectorized", "native"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(probabilities: torch.Tensor, seed: int) -> torch.Tensor:
    """One id from each row [..., V]."""
    vocabulary = probabilities.shape[-1]
    below = probabilities.double().reshape(-1, vocabulary).cumsum(-1)
    points = torch.rand(len(below), 1, generator=seeded(seed), dtype=torch.float64) * below[:, -1:]
    ids = torch.searchsorted(below, points, right=True).clamp(max=vocabulary - 1)
    return ids.reshape(probabilities.shape[:-1])


def random_case(
    batch: int, drafts: int, vocabulary: int, seed: int, *, spread: float = 2.0, noise: float = 0.7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft ids, draft probabilities, target logits and uniform numbers."""
    source = seeded(seed)
    logits = spread * torch.randn(batch, drafts + 1, vocabulary, generator=source)
    shift = noise * torch.randn(batch, drafts, vocabulary, generator=source)
    q = torch.softmax(logits[:, :drafts] + shift, dim=-1)
    return draw(q, seed + 1), q, logits, torch.rand(batch, drafts + 1, generator=source)


def assert_distributed(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    statistic, limit = chi_square(torch.bincount(tokens.reshape(-1), minlength=len(expected)), expected)
    assert statistic < limit


def assert_not_distributed(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """The test has teeth: what is wrong exceeds the limit by far."""
    statistic, limit = chi_square(torch.bincount(tokens.reshape(-1), minlength=len(expected)), expected)
    assert statistic > 3 * limit
