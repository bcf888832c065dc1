"""A draft's token is drawn from the distribution that is handed on with it."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import CheckpointError
from halfbyte.evaluation.chi_square import chi_square
from halfbyte.sampling.filters import SamplingParameters, filtered_probabilities
from halfbyte.sampling.rejection import draw_with_probabilities

SETTINGS = [
    SamplingParameters(1.0),
    SamplingParameters(0.6),
    SamplingParameters(1.3, top_k=7),
    SamplingParameters(1.0, top_p=0.8),
    SamplingParameters(0.9, min_p=0.1),
    SamplingParameters(0.8, top_k=12, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("parameters", SETTINGS)
@pytest.mark.parametrize("vocabulary", [1, 40, 5000])
def test_the_distribution_is_that_of_plain_sampling(parameters: SamplingParameters, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(vocabulary, generator=generator)
    row = torch.empty(vocabulary)
    token = draw_with_probabilities(logits, parameters, generator, row)
    torch.testing.assert_close(row, filtered_probabilities(logits, parameters), rtol=1e-4, atol=1e-7)
    assert row[token] > 0


@pytest.mark.parametrize("parameters", SETTINGS)
def test_tokens_follow_it(parameters: SamplingParameters) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(30, generator=generator)
    counts, row = torch.zeros(30, dtype=torch.int64), torch.empty(30)
    for _ in range(20_000):
        counts[draw_with_probabilities(logits, parameters, generator, row)] += 1
    statistic, limit = chi_square(counts, row)
    assert statistic < limit


def test_a_target_with_more_ids_gets_zeros_for_them() -> None:
    row = torch.full((12,), 7.0)
    token = draw_with_probabilities(torch.zeros(8), SamplingParameters(1.0), torch.Generator(), row)
    assert token < 8
    assert row[8:].tolist() == [0.0] * 4
    assert float(row[:8].sum()) == pytest.approx(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_logits_are_an_error(value: float) -> None:
    logits = torch.zeros(8)
    logits[3] = value
    for bad in (logits, torch.full((8,), float("-inf"))):
        with pytest.raises(CheckpointError, match="logits"):
            draw_with_probabilities(bad, SamplingParameters(0.7), torch.Generator(), torch.empty(8))
