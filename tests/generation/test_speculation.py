"""Speculation changes no token of greedy decoding, and no probability of sampling."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfbyte
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.evaluation.chi_square import chi_square
from halfbyte.generation import drafting, speculation
from halfbyte.generation.draft_sources import make_drafter
from halfbyte.sampling.filters import SamplingParameters, filtered_probabilities
from tests.conftest import make_llama

QUANTIZED = "quantized"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of six layers in 16 bits, and its 4-bit copy."""
    folder = make_llama(tmp_path_factory.mktemp("six"), num_hidden_layers=6)
    copy = tmp_path_factory.mktemp("copy") / "copy"
    halfbyte.quantize(folder, copy, halfbyte.QuantConfig(method="rtn", group_size=32), progress=False)
    return folder, copy


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> halfbyte.Model:
    return halfbyte.load(folders[0])


@pytest.fixture(scope="module")
def drafts(folders: tuple[Path, Path]) -> dict[str, str]:
    return {QUANTIZED: str(folders[1]), "ngram": "ngram", "skip": "skip"}


@pytest.mark.parametrize("draft", [QUANTIZED, "ngram", "skip"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text("abc the crow", min_size=1, max_size=60),
    tokens=st.integers(1, 30),
    length=st.one_of(st.integers(1, 9), st.just("auto")),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_greedy_tokens_are_those_of_plain_decoding(
    model: halfbyte.Model, drafts: dict[str, str], draft: str, prompt: str, tokens: int, length: Any, penalty: float
) -> None:
    common: dict[str, Any] = {
        "max_new_tokens": tokens, "repetition_penalty": penalty, "return_details": True,
    }  # fmt: skip
    plain = model.generate(prompt, **common)
    found = model.generate(prompt, draft=drafts[draft], draft_length=length, **common)
    assert (found.token_ids, found.text, found.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)


@pytest.mark.parametrize("draft", [QUANTIZED, "ngram", "skip"])
def test_a_batch_is_as_its_prompts_alone(model: halfbyte.Model, drafts: dict[str, str], draft: str) -> None:
    prompts = ["The crow", "a", "the the the the the the the the", "crow and crow and crow and"]
    common: dict[str, Any] = {"max_new_tokens": 25, "return_details": True}
    plain = model.generate(prompts, **common)
    found = model.generate(prompts, draft=drafts[draft], draft_length=3, **common)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    counters = found[0].speculation
    assert counters is found[3].speculation
    assert counters.drafted >= counters.accepted >= counters.emitted - counters.passes > 0


@pytest.mark.parametrize("draft", [QUANTIZED, "skip"])
def test_the_same_seed_repeats_a_sampled_text(model: halfbyte.Model, drafts: dict[str, str], draft: str) -> None:
    common: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 20, "draft": drafts[draft]}
    for length in (3, "auto"):
        texts = [model.generate("The", seed=seed, draft_length=length, **common) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


def test_a_stream_and_its_stop_string_end_like_plain_ones(model: halfbyte.Model, drafts: dict[str, str]) -> None:
    whole = model.generate("The", max_new_tokens=40)
    stop = whole[10:14]
    plain = model.generate("The", max_new_tokens=40, stop=stop, return_details=True)
    stream = model.generate("The", max_new_tokens=40, stop=stop, draft=drafts[QUANTIZED], draft_length=5, stream=True)
    assert "".join(stream) == plain.text
    assert stream.generation is not None
    assert (stream.generation.token_ids, stream.generation.finish_reason) == (plain.token_ids, "stop")


def test_streams_of_one_model_do_not_meet(model: halfbyte.Model, drafts: dict[str, str]) -> None:
    prompts = ["The crow", "counted the acorns"]
    expected = [model.generate(prompt, max_new_tokens=30) for prompt in prompts]
    for draft in drafts.values():
        streams = [model.generate(p, max_new_tokens=30, draft=draft, draft_length=3, stream=True) for p in prompts]
        texts = ["", ""]
        for pieces in itertools.zip_longest(*streams, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert texts == expected


def test_an_end_of_sequence_token_inside_a_draft_ends_it(
    model: halfbyte.Model, drafts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.generate("The", max_new_tokens=20, return_details=True).token_ids
    last = next(n for n in range(3, 20) if ids[n] not in ids[:n])
    monkeypatch.setattr(model, "stop_ids", frozenset({ids[last]}))
    for draft in drafts.values():
        found = model.generate("The", max_new_tokens=20, draft=draft, draft_length=7, return_details=True)
        assert (found.token_ids, found.finish_reason) == (ids[:last], "stop")


def test_counters_add_up(never_ending: halfbyte.Model, drafts: dict[str, str]) -> None:
    model = never_ending
    found = model.generate("The", max_new_tokens=40, draft=drafts[QUANTIZED], draft_length=4, return_details=True)
    counters = found.speculation
    assert counters is not None
    assert counters.emitted + counters.plain_passes + 1 == found.new_tokens
    assert counters.acceptance_rate == counters.accepted / counters.drafted
    assert counters.emitted <= counters.accepted + counters.passes
    assert counters.tokens_per_pass == counters.emitted / counters.passes
    assert sum(counters.proposed_at) == counters.drafted
    assert sum(counters.accepted_at) == counters.accepted
    assert counters.proposed_at[0] == counters.passes
    assert counters.acceptance_by_position == sorted(counters.acceptance_by_position, reverse=True)
    assert min(counters.draft_seconds, counters.verify_seconds, counters.sampler_seconds) > 0


def test_a_repeating_text_is_copied(model: halfbyte.Model) -> None:
    """With a penalty below 1 a model says again what it said."""
    common: dict[str, Any] = {"max_new_tokens": 60, "repetition_penalty": 0.2, "return_details": True}
    found = model.generate("crow crow crow crow", draft="ngram", draft_length=8, **common)
    assert found.token_ids == model.generate("crow crow crow crow", **common).token_ids
    assert found.speculation is not None
    assert found.speculation.accepted > 20


def test_through_transformers_it_is_the_same_up_to_near_ties(folders: tuple[Path, Path]) -> None:
    model = halfbyte.load(folders[0], backend="transformers")
    plain = model.generate("The crow", max_new_tokens=24, return_details=True).token_ids
    found = model.generate(
        "The crow", max_new_tokens=24, draft=str(folders[1]), draft_length=3, return_details=True
    ).token_ids
    where = next((n for n, pair in enumerate(zip(plain, found, strict=True)) if pair[0] != pair[1]), None)
    if where is not None:
        logits = model.logits([*model.encode("The crow").tolist(), *plain[:where]])[-1]
        assert abs(float(logits[plain[where]] - logits[found[where]])) < 0.05 * float(logits.std())


# Three tokens, each among the three most likely: 27 outcomes. The logits of a random model are small.
SAMPLING: dict[str, Any] = {"temperature": 0.12, "top_k": 3}
PROMPT, DRAWS = "The crow", 4000


@pytest.fixture(scope="module")
def exact(model: halfbyte.Model) -> dict[tuple[int, ...], float]:
    parameters = SamplingParameters(**SAMPLING)
    outcomes: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, probability in outcomes.items():
            row = filtered_probabilities(model.logits([*model.encode(PROMPT).tolist(), *tokens])[-1], parameters)
            for token in row.nonzero().flatten().tolist():
                longer[(*tokens, token)] = probability * float(row[token])
        outcomes = longer
    assert len(outcomes) == 27
    return outcomes


def misfit(model: halfbyte.Model, draft: str, exact: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its limit: above 1 the distribution is another."""
    places = {tokens: place for place, tokens in enumerate(exact)}
    counts = torch.zeros(len(places), dtype=torch.int64)
    batch = 200
    for first in range(0, DRAWS, batch):
        found = model.generate(
            [PROMPT] * batch, max_new_tokens=4, seed=first, draft=draft, draft_length=2, return_details=True, **SAMPLING
        )
        for one in found:
            place = places.get(one.token_ids[:3])
            if place is None:
                return float("inf")
            counts[place] += 1
    statistic, limit = chi_square(counts, torch.tensor(list(exact.values())))
    return statistic / limit


@pytest.fixture
def never_ending(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> halfbyte.Model:
    monkeypatch.setattr(model, "stop_ids", frozenset())
    return model


@pytest.mark.parametrize("draft", [QUANTIZED, "ngram", "skip"])
def test_sampled_texts_have_the_distribution_of_the_target(
    never_ending: halfbyte.Model, drafts: dict[str, str], draft: str, exact: dict[tuple[int, ...], float]
) -> None:
    assert misfit(never_ending, drafts[draft], exact) < 1


def accept_always(*arguments: Any, uniforms: torch.Tensor, **options: Any) -> Any:
    """As where u is 0 everywhere (vllm-project/vllm-ascend#13730)."""
    uniforms = uniforms.clone()
    uniforms[:, :-1] = 0
    return halfbyte.rejection_sample(*arguments, uniforms=uniforms, **options)


def draft_taken_for_certain(ids: torch.Tensor, _: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    """What is accepted with min(1, p/q) is refilled as if q had been one-hot."""
    probabilities = torch.full((*ids.shape, target.shape[-1]), 0.4)
    return halfbyte.rejection_sample(ids, probabilities, target, **options)


@pytest.mark.parametrize("mutant", [accept_always, draft_taken_for_certain])
def test_a_wrong_sampler_is_caught(
    never_ending: halfbyte.Model,
    drafts: dict[str, str],
    exact: dict[tuple[int, ...], float],
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[..., Any],
) -> None:
    monkeypatch.setattr(speculation, "rejection_sample", mutant)
    assert misfit(never_ending, drafts[QUANTIZED], exact) > 1


def test_a_draft_drawn_from_other_probabilities_is_caught(
    never_ending: halfbyte.Model,
    drafts: dict[str, str],
    exact: dict[tuple[int, ...], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The draft's argmax, passed with its softmax (jaymody/speculative-sampling#3)."""

    def argmax_with_softmax(logits: torch.Tensor, parameters: Any, _: Any, probabilities: torch.Tensor) -> int:
        probabilities[:] = filtered_probabilities(logits, parameters)
        return int(probabilities.argmax())

    monkeypatch.setattr(drafting, "draw_with_probabilities", argmax_with_softmax)
    assert misfit(never_ending, drafts[QUANTIZED], exact) > 1


def test_the_copy_is_made_once_and_kept(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    model = halfbyte.load(folders[0])
    settings: dict[str, Any] = {"max_new_tokens": 12, "return_details": True}
    found = model.generate("The", draft="int4", draft_length=3, **settings)
    assert found.token_ids == model.generate("The", **settings).token_ids
    assert found.speculation is not None
    assert found.speculation.drafted > 0
    (copy,) = (tmp_path / "quantized").iterdir()
    before = (copy / "config.json").stat().st_mtime_ns
    make_drafter(halfbyte.load(folders[0]), "int4")
    assert (copy / "config.json").stat().st_mtime_ns == before


def test_what_cannot_draft_says_why(
    folders: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, model: halfbyte.Model
) -> None:
    quantized = halfbyte.load(folders[1])
    with pytest.raises(UnsupportedError, match="is quantized already"):
        quantized.generate("The", draft="int4")
    with pytest.raises(UnsupportedError, match="2 layers, too few"):
        halfbyte.load(tiny_llama).generate("The", draft="skip")
    with pytest.raises(UnsupportedError, match="does not run"):
        halfbyte.load(tiny_llama, backend="transformers").generate("The", draft="skip")
    with pytest.raises(halfbyte.HalfbyteError, match="no such folder"):
        model.generate("The", draft="nothing-there")
    for length in (0, 33, 2.5, "many"):
        with pytest.raises(ConfigError, match="draft_length: expected auto or 1 to 32"):
            model.generate("The", draft="ngram", draft_length=length)
    other = make_llama(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="another tokenizer.*token '[qz]' is"):
        model.generate("The", draft=str(other))
