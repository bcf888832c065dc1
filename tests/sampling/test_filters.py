from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import ConfigError
from halfbyte.sampling.filters import SamplingParameters, choose_token, filtered_probabilities

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_temperature_0_takes_the_most_likely_token_and_the_lowest_id_on_a_tie() -> None:
    assert choose_token(LOGITS, SamplingParameters(), generator()) == 1


def test_temperature_divides_the_logits() -> None:
    expected = torch.softmax(LOGITS / 0.5, dim=-1)
    torch.testing.assert_close(filtered_probabilities(LOGITS, SamplingParameters(0.5)), expected)


def test_top_k_keeps_exactly_k_and_lower_ids_win_ties() -> None:
    kept = filtered_probabilities(LOGITS, SamplingParameters(1.0, top_k=1))
    assert kept.tolist() == [0, 1, 0, 0, 0]
    assert (filtered_probabilities(LOGITS, SamplingParameters(1.0, top_k=3)) > 0).tolist() == [0, 1, 1, 1, 0]


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        found = filtered_probabilities(logits, SamplingParameters(1.0, top_p=top_p))
        assert int((found > 0).sum()) == kept
        torch.testing.assert_close(found[:kept], logits.exp()[:kept] / logits.exp()[:kept].sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_what_is_left_is_a_distribution_with_the_same_order(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(32, generator=generator(seed)) * 3
    before = logits.clone()
    found = filtered_probabilities(logits, SamplingParameters(temperature, top_k, top_p))
    assert torch.equal(logits, before)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    kept = found > 0
    assert kept[logits.argmax()]
    assert 1 <= int(kept.sum()) <= (top_k or 32)
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square with 2 degrees of freedom: above 18.4 once in 10,000 honest runs, and the seed is fixed."""
    parameters = SamplingParameters(1.5, top_k=3)
    expected = filtered_probabilities(LOGITS, parameters)
    source, draws = generator(), 6000
    counts = torch.bincount(torch.tensor([choose_token(LOGITS, parameters, source) for _ in range(draws)]), minlength=5)
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    assert float(((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()) < 18.4


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_values_out_of_range_are_refused_by_name(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: expected"):
        SamplingParameters(**bad)
