"""The rejection samplers at work on synthetic distributions: the same tokens, the right distribution, the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.evaluation.chi_square import chi_square
from halfbyte.evaluation.sampler import SamplerSpeed, measure_samplers, synthetic_case, using_threads
from halfbyte.sampling.rejection import IMPLEMENTATIONS, rejection_sample

# Settings under which all implementations are compared.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
)


@dataclass(frozen=True)
class Fit:
    """How well drawn tokens fit the target.

    Attributes:
        sampler: what drew them.
        draws: how many.
        chi_square: Pearson's statistic.
        limit: what an honest sampler exceeds once in 10^7 runs.
    """

    sampler: str
    draws: int
    chi_square: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the statistic is below the limit."""
        return self.chi_square < self.limit


def count_equal_tokens(*, seed: int = 0) -> dict[str, tuple[int, int]]:
    """For each implementation: sequences with exactly the reference's tokens, and sequences in all."""
    found = dict.fromkeys(IMPLEMENTATIONS, (0, 0))
    for number, settings in enumerate(SETTINGS):
        case = synthetic_case(16, 4, 3000, 0.7, seed=seed + number)
        uniforms = torch.rand(16, 5, generator=torch.Generator().manual_seed(seed + number))
        arguments = (case.draft_ids, case.draft_probs, case.target)
        tokens = {
            name: rejection_sample(*arguments, uniforms=uniforms, implementation=name, **settings)[0]
            for name in IMPLEMENTATIONS
        }
        for name, (equal, total) in found.items():
            same = int((tokens[name] == tokens["reference"]).all(1).sum())
            found[name] = (equal + same, total + len(uniforms))
    return found


def fit_to_target(*, seed: int = 0) -> list[Fit]:
    """First tokens of every implementation against the exact target, vocabulary 12; last, a sampler that is wrong."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, generator=source)
    p, q = torch.softmax(logits, dim=-1), torch.softmax(logits + torch.randn(12, generator=source), dim=-1)
    fits = []
    for name in (*IMPLEMENTATIONS, "accepting every draft"):
        rows = 4000 if name == "reference" else 40_000
        ids = torch.multinomial(q, rows, replacement=True, generator=source)[:, None]
        tokens = ids
        if name in IMPLEMENTATIONS:
            target, draft = p.expand(rows, 2, -1), q.expand(rows, 1, -1)
            tokens, _ = rejection_sample(ids, draft, target, generator=source, implementation=name)
        statistic, limit = chi_square(torch.bincount(tokens[:, 0], minlength=12), p)
        fits.append(Fit(name, rows, statistic, limit))
    return fits


def measure_demo(threads: int, *, seconds: float = 0.25) -> list[SamplerSpeed]:
    """Times of all implementations at batch 1, 16 and 64: vocabulary 32,000, four drafts, seven of ten stand."""
    results = []
    with using_threads(threads):
        for batch in (1, 16, 64):
            case = synthetic_case(batch, 4, 32_000, 0.7)
            results += measure_samplers(case, acceptance=case.acceptance, threads=threads, seconds=seconds)
    return results
