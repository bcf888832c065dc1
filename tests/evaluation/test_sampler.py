"""What the samplers are measured with: distributions made for the purpose, and the chi-square test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluation.chi_square import chi_square
from halfbyte.evaluation.sampler import NOISE, measure_samplers, synthetic_case, take_turns, using_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with using_threads(1):
        yield


@pytest.mark.parametrize("outcomes", [2, 5, 12, 50, 300])
def test_an_honest_run_exceeds_the_limit_once_in_ten_million_or_less(outcomes: int) -> None:
    expected = torch.full((outcomes,), 1 / outcomes, dtype=torch.float64)
    _, limit = chi_square(torch.full((outcomes,), 100), expected)
    tail = float(torch.special.gammaincc(torch.tensor((outcomes - 1) / 2).double(), torch.tensor(limit / 2).double()))
    assert 1e-10 < tail < 3e-7


def test_the_statistic_is_pearsons() -> None:
    statistic, _ = chi_square(torch.tensor([44, 56]), torch.tensor([0.5, 0.5]))
    assert statistic == pytest.approx(2 * 6**2 / 50)
    assert chi_square(torch.tensor([99, 1]), torch.tensor([1.0, 0.0]))[0] == float("inf")
    together, _ = chi_square(torch.tensor([90, 4, 6]), torch.tensor([0.9, 0.04, 0.06]))  # 4 are too few to stand alone
    assert together == pytest.approx(0)


@pytest.mark.parametrize("acceptance", NOISE)
@pytest.mark.parametrize("logits", [False, True])
def test_synthetic_drafts_are_accepted_as_often_as_asked_for(acceptance: float, logits: bool) -> None:
    case = synthetic_case(4, 3, 10_000, acceptance, logits=logits)
    assert case.acceptance == pytest.approx(acceptance, abs=0.08)
    assert (case.draft_ids.shape, case.target.shape) == ((4, 3), (4, 4, 10_000))
    torch.testing.assert_close(case.draft_probs.sum(-1), torch.ones(4, 3))
    assert (case.draft_probs.gather(2, case.draft_ids[:, :, None]) > 0).all()
    assert case.nbytes == 4 * 4 * 10_000 * 7


def test_an_acceptance_nobody_tuned_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^acceptance: expected one of 0.3, 0.7, 0.95, got 0.5"):
        synthetic_case(1, 1, 8, 0.5)


def test_what_must_be_read_is_counted() -> None:
    case = synthetic_case(3, 2, 500, 0.95)
    plain = measure_samplers(case, acceptance=0.95, threads=1, seconds=0, implementations=["native"])[0]
    assert 3 * 500 * 4 <= plain.bytes_read <= 2 * 3 * 500 * 4
    filtered = measure_samplers(case, acceptance=0.95, threads=1, seconds=0, implementations=["native"], top_p=0.9)
    assert filtered[0].bytes_read > plain.bytes_read  # every position that is reached


def test_peers_take_turns() -> None:
    calls: list[str] = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 0)
    assert set(times) == {"a", "b"}
    changes = [a for a, b in itertools.pairwise(calls) if a != b]
    assert len(changes) >= 4
