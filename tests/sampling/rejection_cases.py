"""What the tests of the rejection samplers share: the implementations, random cases, Pearson's chi-square."""

from __future__ import annotations

import torch

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


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Pearson's statistic of counts [V] against probabilities [V], and what it exceeds once in 10^7 honest runs.

    Outcomes expected fewer than 5 times are thrown together (Cochran 1954); the limit is Wilson and Hilferty's (1931).
    """
    total = float(counts.sum())
    mass = expected.double() / expected.double().sum() * total
    assert int(counts[mass == 0].sum()) == 0, "a token that has no probability"
    rare = mass < 5
    seen, wanted = counts[~rare].double(), mass[~rare]
    if float(mass[rare].sum()) >= 5:
        seen = torch.cat([seen, counts[rare].sum().double()[None]])
        wanted = torch.cat([wanted, mass[rare].sum()[None]])
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = max(len(wanted) - 1, 1)
    part = 2 / (9 * freedom)
    return statistic, freedom * (1 - part + 5.2 * part**0.5) ** 3


def assert_distributed(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    statistic, limit = chi_square(torch.bincount(tokens.reshape(-1), minlength=len(expected)), expected)
    assert statistic < limit


def assert_not_distributed(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """The test has teeth: what is wrong exceeds the limit by far."""
    statistic, limit = chi_square(torch.bincount(tokens.reshape(-1), minlength=len(expected)), expected)
    assert statistic > 3 * limit
