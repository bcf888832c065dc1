"""What comes out is distributed as the target, by chi-square against the exact distribution; and the test has teeth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rejection_cases import IMPLEMENTATIONS, assert_distributed, assert_not_distributed, draw, seeded

import halfbyte
from halfbyte.sampling.filters import SamplingParameters, filtered_probabilities

ROWS = {"reference": 1000, "vectorized": 20_000, "native": 20_000}  # the loop takes 50 µs a row
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.4, "top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def filtered(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    rows = [filtered_probabilities(row, SamplingParameters(**{"temperature": 1.0, **options})) for row in logits]
    return torch.stack(rows)


def case(vocabulary: int, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target logits [2, V], target probabilities after the filters [2, V], draft probabilities [V] after the same."""
    logits = 1.5 * torch.randn(2, vocabulary, generator=seeded(vocabulary))
    draft = logits[:1] + 0.8 * torch.randn(1, vocabulary, generator=seeded(vocabulary + 1))
    return logits, filtered(logits, options), filtered(draft, options)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("vocabulary", [5, 50])
def test_the_first_token_and_the_one_behind_it_follow_the_target(
    implementation: str, options: dict[str, Any], certain: bool, vocabulary: int
) -> None:
    logits, p, q = case(vocabulary, options)
    rows = ROWS[implementation]
    ids = torch.full((rows, 1), int(p[0].argsort()[-2])) if certain else draw(q.expand(rows, 1, -1), 3)
    found, counts = halfbyte.rejection_sample(
        ids,
        None if certain else q.expand(rows, 1, -1),
        logits.expand(rows, 2, -1),
        uniforms=torch.rand(rows, 2, generator=seeded(4)),
        logits=True,
        implementation=implementation,
        **options,
    )
    assert_distributed(found[:, 0], p[0])
    assert_distributed(found[counts == 2, 1], p[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("certain", [False, True])
def test_two_tokens_follow_the_joint_distribution(implementation: str, certain: bool) -> None:
    """Both models look at the token before: row x of a matrix is the distribution behind token x."""
    vocabulary, rows = 6, ROWS[implementation]
    first = torch.softmax(torch.randn(vocabulary, generator=seeded(1)), dim=-1)
    then = torch.softmax(1.5 * torch.randn(vocabulary, vocabulary, generator=seeded(2)), dim=-1)
    draft_first = torch.softmax(torch.randn(vocabulary, generator=seeded(3)), dim=-1)
    draft_then = torch.softmax(torch.randn(vocabulary, vocabulary, generator=seeded(4)), dim=-1)
    one = torch.full((rows,), 2) if certain else draw(draft_first.expand(rows, -1), 5)
    two = (one + 1) % vocabulary if certain else draw(draft_then[one], 6)
    q = torch.stack([draft_first.expand(rows, -1), draft_then[one]], dim=1)
    target = torch.stack([first.expand(rows, -1), then[one], then[two]], dim=1)
    found, counts = halfbyte.rejection_sample(
        torch.stack([one, two], dim=1), None if certain else q, target,
        uniforms=torch.rand(rows, 3, generator=seeded(7)), implementation=implementation,
    )  # fmt: skip
    follow = draw(then[found[:, 0]], 8)  # what the target would draw next where there is but one token
    second = torch.where(counts >= 2, found[:, 1], follow)
    assert_distributed(found[:, 0] * vocabulary + second, (first[:, None] * then).reshape(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_drafts_are_accepted_as_often_as_the_distributions_overlap(implementation: str) -> None:
    """Σ min(p, q) (Leviathan et al. 2023, theorem 3.5): six standard deviations are allowed."""
    _, p, q = case(20, {})
    rows = ROWS[implementation]
    _, counts = halfbyte.rejection_sample(
        draw(q.expand(rows, 1, -1), 3), q.expand(rows, 1, -1), p.expand(rows, 2, -1),
        uniforms=torch.rand(rows, 2, generator=seeded(4)), implementation=implementation,
    )  # fmt: skip
    overlap = float(torch.minimum(p[0], q).sum())
    assert abs(float((counts == 2).double().mean()) - overlap) < 6 * (overlap * (1 - overlap) / rows) ** 0.5


def sketch(mutant: str, ids: torch.Tensor, q: torch.Tensor, p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token of each row [B], for one draft and one pair of distributions; with a mistake on demand."""
    u = torch.zeros_like(uniforms[:, 0]) if mutant == "u is always 0" else uniforms[:, 0]
    accepted = u * q[ids] < p[ids]
    if mutant == "everything is accepted":
        accepted = torch.ones_like(accepted)
    residual = p if mutant == "rejected drafts are replaced from p" else (p - q).clamp(min=0)
    below = residual.double().cumsum(0)
    drawn = torch.searchsorted(below, uniforms[:, 1].double() * below[-1], right=True)
    return torch.where(accepted, ids, drawn)


MUTANTS = ["u is always 0", "everything is accepted", "rejected drafts are replaced from p", "drafts from elsewhere"]


@pytest.mark.parametrize("vocabulary", [5, 50])
@pytest.mark.parametrize("mutant", ["none", *MUTANTS])
def test_mistakes_are_caught(mutant: str, vocabulary: int) -> None:
    _, p, q = case(vocabulary, {})
    rows = 40_000
    drawn_from = torch.softmax(q.log() / 3, dim=-1) if mutant == "drafts from elsewhere" else q
    ids, uniforms = draw(drawn_from.expand(rows, -1), 3), torch.rand(rows, 2, generator=seeded(4))
    tokens = sketch(mutant, ids, q, p[0], uniforms)
    if mutant != "none":
        assert_not_distributed(tokens, p[0])
        return
    assert_distributed(tokens, p[0])
    found, _ = halfbyte.rejection_sample(ids[:, None], q.expand(rows, 1, -1), p.expand(rows, 2, -1), uniforms=uniforms)
    assert int((found[:, 0] != tokens).sum()) <= 4  # the sketch rounds its sums otherwise
