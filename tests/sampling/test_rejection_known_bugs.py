"""Bugs that users of other rejection samplers reported, each as a test of this one."""

from __future__ import annotations

import pytest
import torch
from rejection_cases import IMPLEMENTATIONS, assert_distributed, assert_not_distributed, draw, random_case, seeded

import halfbyte
from halfbyte.errors import ConfigError

ROWS = {"reference": 4000, "vectorized": 40_000, "native": 40_000}
P = torch.softmax(torch.randn(12, generator=seeded(0)), dim=-1)
Q = torch.softmax(P.log() + torch.randn(12, generator=seeded(1)), dim=-1)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def first_tokens(ids: torch.Tensor, q: torch.Tensor | None, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(ids)
    found, counts = halfbyte.rejection_sample(
        ids[:, None],
        None if q is None else q.expand(rows, 1, -1),
        P.expand(rows, 2, -1),
        uniforms=torch.rand(rows, 2, generator=seeded(2)),
        implementation=implementation,
    )
    return found[:, 0], counts


def test_a_greedy_draft_is_certain_not_soft(implementation: str) -> None:
    """jaymody/speculative-sampling#3: argmax drafts with softmax probabilities give another distribution."""
    ids = torch.full((ROWS[implementation],), int(Q.argmax()))
    assert_distributed(first_tokens(ids, None, implementation)[0], P)
    assert_not_distributed(first_tokens(ids, Q, implementation)[0], P)


def test_drafts_are_weighed_not_compared_with_a_sample(implementation: str) -> None:
    """ml-explore/mlx-swift-lm#459: comparing with a sample of the target accepts Σ p q of them, not Σ min(p, q)."""
    rows = ROWS[implementation]
    _, counts = first_tokens(draw(Q.expand(rows, -1), 3), Q, implementation)
    accepted = float((counts == 2).double().mean())
    assert accepted == pytest.approx(float(torch.minimum(P, Q).sum()), abs=0.05)
    assert accepted > float((P * Q).sum()) + 0.2


def test_the_draft_must_be_weighed_by_the_numbers_it_was_drawn_from(implementation: str) -> None:
    """deepseek-ai/DeepSpec#31: drawn in bf16, accepted against fp32. The rounded tensor is refused at the door."""
    ids, q, logits, _ = random_case(1, 2, 9, 0)
    with pytest.raises(
        ConfigError, match="^draft_probs: expected float32, got bfloat16; draw from and pass the same float32"
    ):
        halfbyte.rejection_sample(ids, q.bfloat16(), logits.softmax(-1), implementation=implementation)


def test_drafts_of_a_beam_search_need_the_target_alone(implementation: str) -> None:
    """apple/ml-recurrent-drafter#6: a beam's tokens were not drawn, so they are accepted with p itself."""
    beam = torch.tensor([3, 7, 5]).repeat(ROWS[implementation] // 3)
    tokens, counts = first_tokens(beam, None, implementation)
    for token in (3, 7, 5):
        assert_distributed(tokens[beam == token], P)
        assert float((counts[beam == token] == 2).double().mean()) == pytest.approx(float(P[token]), abs=0.06)


def test_drawn_drafts_passed_as_certain_cost_acceptance_not_exactness(implementation: str) -> None:
    """vllm#40149: `draft_probs=None` for drafts that were drawn. Σ p q are accepted then; the tokens still follow p."""
    rows = ROWS[implementation]
    tokens, counts = first_tokens(draw(Q.expand(rows, -1), 3), None, implementation)
    assert_distributed(tokens, P)
    assert float((counts == 2).double().mean()) == pytest.approx(float((P * Q).sum()), abs=0.05)


def test_uniform_numbers_differ_from_call_to_call(implementation: str) -> None:
    """vllm-project/vllm-ascend#13730: u fixed at 0 accepts everything the target can say."""
    rows = ROWS[implementation]
    ids = draw(Q.expand(rows, -1), 3)[:, None]
    arguments = (ids, Q.expand(rows, 1, -1), P.expand(rows, 2, -1))
    found, counts = halfbyte.rejection_sample(*arguments, implementation=implementation)
    assert 0.1 < float((counts == 1).double().mean()) < 0.9
    assert_distributed(found[:, 0], P)
    always = halfbyte.rejection_sample(*arguments, uniforms=torch.zeros(rows, 2), implementation=implementation)
    assert (always[1] == 2).all()
    assert_not_distributed(always[0][:, 0], P)


def test_a_draft_row_of_nan_is_an_error_not_token_0(implementation: str) -> None:
    """vllm#41834: the token that had just been rejected came out."""
    q = torch.full((1, 1, 12), float("nan"))
    with pytest.raises(ConfigError, match=r"^draft_probs\[0, 0, 0\]: expected probabilities from 0 to 1 .* got nan"):
        halfbyte.rejection_sample(
            torch.zeros(1, 1, dtype=torch.int64), q, P.expand(1, 2, -1), implementation=implementation
        )


@pytest.mark.parametrize("logits", [False, True])
def test_a_target_row_of_nan_is_an_error_not_an_id_outside(implementation: str, logits: bool) -> None:
    """vllm#50183, #53029, #45060: the id was the size of the vocabulary, and the crash came far away."""
    target = P.log().repeat(3, 2, 1) if logits else P.repeat(3, 2, 1)
    target[1, 1] = float("nan")
    ids, uniforms = torch.full((3, 1), int(P.argmax())), torch.zeros(3, 2)
    with pytest.raises(ConfigError, match=r"^target_probs\[1, 1, 0\]: expected .* got nan"):
        halfbyte.rejection_sample(ids, None, target, uniforms=uniforms, logits=logits, implementation=implementation)


def test_what_lies_behind_the_first_rejection_is_never_looked_at(implementation: str) -> None:
    """vllm#41258 asks for the residual to be computed once, at the first rejection."""
    ids, q, logits, uniforms = random_case(1, 3, 12, 4)
    target = torch.softmax(logits, dim=-1)
    uniforms[0, 1] = 1 - 2**-24
    target[0, 1, ids[0, 1]] /= 4  # rejected there
    uniforms[0, 0] = 0
    clean = halfbyte.rejection_sample(ids, q, target, uniforms=uniforms, implementation=implementation)
    target[0, 2:], q[0, 2:] = float("nan"), float("nan")
    found = halfbyte.rejection_sample(ids, q, target, uniforms=uniforms, implementation=implementation)
    assert found[1].tolist() == clean[1].tolist() == [2]
    assert torch.equal(found[0], clean[0])


def test_accepted_drafts_are_counted(implementation: str) -> None:
    """llama.cpp#25908: who cannot see the acceptance cannot see why it is slow. It is the count less one."""
    ids, q, logits, uniforms = random_case(50, 4, 12, 5)
    found, counts = halfbyte.rejection_sample(
        ids, q, logits.softmax(-1), uniforms=uniforms, implementation=implementation
    )
    assert torch.equal((found >= 0).sum(1), counts)
    for row in range(50):
        accepted = int(counts[row]) - 1
        assert torch.equal(found[row, :accepted], ids[row, :accepted])
