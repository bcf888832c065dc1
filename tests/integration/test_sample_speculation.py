"""On a real model: two tokens behind a prompt are distributed as the target's, whatever drafts; and mistakes show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.evaluation.chi_square import chi_square
from halfbyte.generation import speculation
from halfbyte.sampling.filters import SamplingParameters, filtered_probabilities

pytestmark = [pytest.mark.sample, pytest.mark.slow]

# Two tokens out of four each: 16 outcomes. The end repeats, so that there is something to copy.
PROMPT = "one two three one two three one two"
SAMPLING: dict[str, Any] = {"temperature": 1.3, "top_k": 4}
BATCH, DRAWS = 100, 1200


@pytest.fixture(scope="module")
def model(sample_folder: Path) -> halfbyte.Model:
    return halfbyte.load(sample_folder)


@pytest.fixture(scope="module")
def copy(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit copy, quickly made."""
    folder = tmp_path_factory.mktemp("copy") / "rtn"
    halfbyte.quantize(sample_folder, folder, halfbyte.QuantConfig(method="rtn"), progress=False)
    return folder


@pytest.fixture(scope="module")
def exact(model: halfbyte.Model) -> dict[tuple[int, ...], float]:
    parameters, prompt = SamplingParameters(**SAMPLING), model.encode(PROMPT).tolist()
    outcomes = {}
    first = filtered_probabilities(model.logits(prompt)[-1], parameters)
    for one in first.nonzero().flatten().tolist():
        second = filtered_probabilities(model.logits([*prompt, one])[-1], parameters)
        for two in second.nonzero().flatten().tolist():
            outcomes[one, two] = float(first[one] * second[two])
    assert len(outcomes) == 16
    return outcomes


def misfit(model: halfbyte.Model, draft: str | Path, exact: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its limit: above 1 the distribution is another."""
    places = {tokens: place for place, tokens in enumerate(exact)}
    counts, drafted = torch.zeros(len(places), dtype=torch.int64), 0
    for first in range(0, DRAWS, BATCH):
        found = model.generate(
            [PROMPT] * BATCH, max_new_tokens=4, seed=first, draft=draft, draft_length=2, return_details=True, **SAMPLING
        )
        for one in found:
            place = places.get(one.token_ids[:2])
            if place is None:
                return float("inf")
            counts[place] += 1
        assert found[0].speculation is not None
        drafted += found[0].speculation.drafted
    assert drafted >= DRAWS / 10
    statistic, limit = chi_square(counts, torch.tensor(list(exact.values())))
    return statistic / limit


@pytest.mark.parametrize("draft", ["copy", "ngram", "skip"])
def test_two_tokens_are_distributed_as_the_targets(
    model: halfbyte.Model, copy: Path, exact: dict[tuple[int, ...], float], draft: str
) -> None:
    assert misfit(model, copy if draft == "copy" else draft, exact) < 1


def accept_always(ids: torch.Tensor, _: Any, target: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([ids, target[:, -1:].argmax(dim=-1)], dim=1), torch.full((len(ids),), ids.shape[1] + 1)


def test_accepting_always_is_caught(
    model: halfbyte.Model, exact: dict[tuple[int, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "rejection_sample", accept_always)
    assert misfit(model, "skip", exact) > 1
