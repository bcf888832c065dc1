"""The bootstrap on losses whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.evaluation.bootstrap import MIN_WINDOWS, bootstrap_mean

WINDOWS = 16


def paired_losses(effect: float, seed: int, windows: int = WINDOWS) -> np.ndarray:
    """Differences of two models over windows, with heavier tails than a normal distribution's."""
    return effect + 0.02 * np.random.default_rng(seed).standard_t(5, size=windows)


@pytest.mark.parametrize(("windows", "trials"), [(6, 600), (16, 300)])
def test_noise_is_called_significant_as_seldom_as_promised(windows: int, trials: int) -> None:
    noise = (paired_losses(0.0, n, windows) for n in range(trials))
    found = [bootstrap_mean(losses, [511] * windows, test=True, resamples=800) for losses in noise]
    wrong = sum(estimate.p_value < 0.05 for estimate in found if estimate.p_value is not None)
    covered = sum(estimate.low <= 0 <= estimate.high for estimate in found if estimate.low is not None)  # type: ignore[operator]
    # Four standard deviations of the count.
    assert 0 < wrong <= 0.05 * trials + 4 * math.sqrt(trials * 0.05 * 0.95)
    assert covered + wrong == trials


def test_a_difference_is_found_nearly_always() -> None:
    found = [bootstrap_mean(paired_losses(0.04, n), [511] * WINDOWS, test=True, resamples=800) for n in range(100)]
    assert sum(estimate.p_value < 0.05 for estimate in found if estimate.p_value is not None) >= 95
    assert sum(estimate.low <= 0.04 <= estimate.high for estimate in found if estimate.low is not None) >= 88  # type: ignore[operator]


def test_the_sign_does_not_matter() -> None:
    losses, tokens = paired_losses(0.01, 1), [511] * WINDOWS
    one, other = (bootstrap_mean(sign * losses, tokens, test=True) for sign in (1, -1))
    assert one.p_value == other.p_value
    assert (one.low, one.high) == (-other.high, -other.low)  # type: ignore[operator]


def test_pairing_finds_what_the_spread_over_windows_would_hide() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(3.0, 0.5, size=WINDOWS)
    second = first + generator.normal(0.01, 0.003, size=WINDOWS)
    tokens = [511] * WINDOWS
    one, other = bootstrap_mean(first, tokens), bootstrap_mean(second, tokens)
    assert one.high is not None
    assert one.low is not None
    assert one.low < other.value < one.high
    paired = bootstrap_mean(second - first, tokens, test=True)
    assert paired.p_value is not None
    assert paired.p_value < 0.001


def test_windows_count_by_their_tokens() -> None:
    assert bootstrap_mean([1.0, 4.0], [30, 10]).value == pytest.approx(1.75)
    long = bootstrap_mean([1.0] * 6 + [9.0], [1000] * 6 + [1])
    assert long.high is not None
    assert 1.001 < long.high < 1.1


def test_no_difference_at_all_and_the_same_one_everywhere() -> None:
    none = bootstrap_mean([0.0] * 8, [5] * 8, test=True)
    assert (none.value, none.low, none.high, none.p_value) == (0.0, 0.0, 0.0, 1.0)
    always = bootstrap_mean([0.25] * 8, [5] * 8, test=True)
    assert (always.low, always.high) == (0.25, 0.25)
    assert always.p_value == pytest.approx(1 / 10_001)


def test_too_few_windows_give_a_mean_alone() -> None:
    few = bootstrap_mean([1.0] * (MIN_WINDOWS - 1), [5] * (MIN_WINDOWS - 1), test=True)
    assert (few.value, few.low, few.high, few.p_value) == (1.0, None, None, None)


def test_the_same_seed_gives_the_same_interval() -> None:
    losses, tokens = paired_losses(0.01, 3), [511] * WINDOWS
    assert bootstrap_mean(losses, tokens, test=True) == bootstrap_mean(losses, tokens, test=True)
    assert bootstrap_mean(losses, tokens, seed=1) != bootstrap_mean(losses, tokens, seed=2)


def test_perplexity_is_the_exponential_of_all_of_it() -> None:
    loss = bootstrap_mean(3 + paired_losses(0.0, 4), [511] * WINDOWS)
    perplexity = loss.exp()
    assert perplexity.value == math.exp(loss.value)
    assert loss.low is not None
    assert perplexity.low == math.exp(loss.low)
    assert perplexity.p_value is None
