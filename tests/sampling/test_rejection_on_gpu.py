"""The kernel for NVIDIA GPUs where there is one: the launch itself, and a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rejection_cases import random_case, seeded

import halfbyte

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
FILTERS: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.9, "min_p": 0.01}]


@pytest.mark.parametrize(("batch", "vocabulary"), [(1, 32_000), (3, 50_257), (600, 1000), (2, 1 << 18)])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_tokens_are_the_references(batch: int, vocabulary: int, filters: dict[str, Any]) -> None:
    ids, q, logits, uniforms = random_case(batch, 3, vocabulary, vocabulary)
    case = ids, q, torch.softmax(logits, dim=-1), uniforms
    expected = halfbyte.rejection_sample(*case[:3], uniforms=uniforms, implementation="reference", **filters)
    there = [tensor.cuda() for tensor in case]
    for _ in range(3):  # records are left at zero
        found = halfbyte.rejection_sample(*there[:3], uniforms=there[3], implementation="cuda", **filters)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


def test_a_captured_graph_repeats_it_with_other_numbers() -> None:
    ids, q, logits, uniforms = random_case(5, 3, 32_000, 1)
    case = [ids, q, torch.softmax(logits, dim=-1), uniforms]
    static = [tensor.cuda() for tensor in case]

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        return halfbyte.rejection_sample(*static[:3], uniforms=static[3], implementation="cuda", top_k=50)

    sample()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sample()
    for seed in range(3):
        static[3].copy_(torch.rand(5, 4, generator=seeded(seed)))
        graph.replay()
        expected = halfbyte.rejection_sample(*case[:3], uniforms=static[3].cpu(), implementation="reference", top_k=50)
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])
