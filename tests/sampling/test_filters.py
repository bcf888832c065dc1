from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.sampling.filters import SamplingParameters, choose_token, filtered_probabilities, penalised
from halfbyte.sampling.sampler import Sampler, sequence_generator

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_temperature_0_takes_the_most_likely_token_and_the_lowest_id_on_a_tie() -> None:
    assert choose_token(LOGITS, SamplingParameters(), generator()) == 1


def test_temperature_divides_the_logits() -> None:
    expected = torch.softmax(LOGITS / 0.5, dim=-1)
    torch.testing.assert_close(filtered_probabilities(LOGITS, SamplingParameters(0.5)), expected)


def test_a_tiny_temperature_is_greedy_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    for temperature in (1e-30, 1e-300):
        found = filtered_probabilities(torch.tensor([1.0, 3.0, 2.0]), SamplingParameters(temperature))
        assert found.tolist() == [0, 1, 0]
    assert not recwarn.list


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


def test_top_p_on_a_whole_vocabulary_is_that_of_a_full_sort() -> None:
    for spread in (0.01, 1.0, 4.0):
        logits = torch.randn(49152, generator=generator()) * spread
        probabilities = torch.softmax(logits.double(), dim=-1)
        ordered = probabilities.sort(descending=True).values
        for top_p in (1e-9, 0.5, 0.9, 0.999):
            count = int((ordered.cumsum(0) - ordered < top_p).sum())
            found = int((filtered_probabilities(logits, SamplingParameters(1.0, top_p=top_p)) > 0).sum())
            assert abs(found - count) <= count // 1000  # what fp32 leaves open


def test_equal_logits_are_kept_from_the_lowest_id_on() -> None:
    found = filtered_probabilities(torch.zeros(1000), SamplingParameters(1.0, top_p=0.25))
    assert found.nonzero()[:, 0].tolist() == list(range(250))
    assert filtered_probabilities(torch.zeros(7), SamplingParameters(1.0, top_p=1e-12)).tolist() == [1] + [0] * 6


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for min_p, kept in ((0.0, 4), (0.09, 4), (0.11, 3), (0.31, 2), (0.61, 1), (1.0, 1)):
        assert int((filtered_probabilities(logits, SamplingParameters(1.0, min_p=min_p)) > 0).sum()) == kept


def test_the_penalty_makes_what_was_seen_less_likely_whatever_its_sign() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0])
    found = penalised(logits, np.array([1, 0, 0, 9]), 2.0)
    assert found.tolist() == [1, -4, 2, -2]
    assert logits.tolist() == [2, -2, 2, -2]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    penalty=st.floats(0.5, 2),
)
def test_order_and_result_are_those_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> None:
    """transformers' own list of processors, made from its own `GenerationConfig`."""
    from transformers import GenerationConfig, GenerationMixin, LlamaConfig

    logits, seen = torch.randn(32, generator=generator(seed)) * 3, torch.tensor([3, 1, 4, 1, 5])

    class Mixin(GenerationMixin):
        config = LlamaConfig()

    parameters = SamplingParameters(temperature, top_k, top_p, min_p, penalty)
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k or 0, top_p=1.0 if top_p is None else top_p, min_p=min_p,
        repetition_penalty=penalty,
    )  # fmt: skip
    config._eos_token_tensor = None
    processors = Mixin()._get_logits_processor(config, input_ids_seq_length=5)
    expected = torch.softmax(processors(seen[None], logits[None].clone())[0], dim=-1)
    found = filtered_probabilities(penalised(logits, seen.numpy(), penalty), parameters)
    torch.testing.assert_close(found, expected)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(1e-30, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_what_is_left_is_a_distribution_with_the_same_order(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    logits = torch.randn(32, generator=generator(seed)) * 3
    before = logits.clone()
    found = filtered_probabilities(logits, SamplingParameters(temperature, top_k, top_p, min_p))
    assert torch.equal(logits, before)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    kept = found > 0
    assert kept[logits.argmax()]
    assert 1 <= int(kept.sum()) <= (top_k or 32)
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        (SamplingParameters(1.5, top_k=3), 18.4),  # 2 degrees of freedom
        (SamplingParameters(1.0), 23.5),  # 4
        (SamplingParameters(2.0, top_p=0.9), 21.1),  # 3
        (SamplingParameters(2.0, min_p=0.2), 21.1),
        (SamplingParameters(2.0, top_k=4, top_p=0.95, min_p=0.5), 18.4),
    ],
)
def test_draws_follow_the_distribution(parameters: SamplingParameters, limit: float) -> None:
    """Pearson's chi-square: above the limit once in 10,000 honest runs, and the seed is fixed."""
    expected = filtered_probabilities(LOGITS, parameters)
    source, draws = generator(), 6000
    counts = torch.bincount(torch.tensor([choose_token(LOGITS, parameters, source) for _ in range(draws)]), minlength=5)
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    assert float(((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()) < limit


def test_draws_over_a_whole_vocabulary_follow_the_distribution() -> None:
    """Ten bins of about equal probability, 9 degrees of freedom: above 33.7 once in 10,000 honest runs."""
    logits, parameters = torch.randn(49152, generator=generator(1)), SamplingParameters(1.0)
    below = filtered_probabilities(logits, parameters).double().cumsum(0)
    bins = (below * 10).long().clamp(max=9)
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, below.diff(prepend=torch.zeros(1)))
    source, draws = generator(), 2000
    counts = torch.bincount(bins[[choose_token(logits, parameters, source) for _ in range(draws)]], minlength=10)
    assert float(((counts - draws * expected) ** 2 / (draws * expected)).sum()) < 33.7


def test_one_number_is_drawn_for_a_token_and_none_for_a_greedy_one() -> None:
    source, expected = generator(), generator()
    choose_token(LOGITS, SamplingParameters(), source)
    assert torch.equal(source.get_state(), expected.get_state())
    choose_token(LOGITS, SamplingParameters(1.0, 3, 0.9, 0.1), source)
    torch.rand((), generator=expected, dtype=torch.float64)
    assert torch.equal(source.get_state(), expected.get_state())


def test_the_greedy_sampler_does_not_repeat_itself_under_a_penalty() -> None:
    sampler = Sampler(SamplingParameters(repetition_penalty=2.0), generator(), [1])
    assert [sampler.choose(LOGITS) for _ in range(4)] == [3, 2, 1, 1]  # 3, 2, then 1.5 for 1 and 3, 1 for 0 and 2
    assert [Sampler(SamplingParameters(), generator(), [1]).choose(LOGITS) for _ in range(2)] == [1, 1]


def test_a_sequence_of_several_has_the_generator_of_one_with_its_seed() -> None:
    first, second, alone = sequence_generator(5), sequence_generator(5, 1), sequence_generator(6)
    assert torch.equal(second.get_state(), alone.get_state())
    assert not torch.equal(first.get_state(), second.get_state())
    assert not torch.equal(sequence_generator(None).get_state(), sequence_generator(None, 1).get_state())
    assert sequence_generator(-1, 1).initial_seed() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(temperature: float, value: float) -> None:
    logits = LOGITS.clone()
    logits[2] = value
    with pytest.raises(CheckpointError, match="^logits: "):
        choose_token(logits, SamplingParameters(temperature), generator())


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ],
)
def test_values_out_of_range_are_refused_by_name(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: expected"):
        SamplingParameters(**bad)
