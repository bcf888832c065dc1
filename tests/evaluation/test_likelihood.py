from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.errors import ConfigError, UnsupportedError
from halfbyte.evaluation import likelihood
from halfbyte.evaluation.last_word import measure_last_word
from halfbyte.evaluation.likelihood import context_length, encode_pair, score_continuations
from tests.conftest import TEXT, make_llama

PASSAGES = [TEXT[:90].rstrip(), TEXT[200:260].rstrip(), "one after another", TEXT[500:700].rstrip()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> halfbyte.Model:
    folder = make_llama(tmp_path_factory.mktemp("likelihood") / "fp32", dtype=torch.float32)
    return halfbyte.load(folder, backend="transformers")


def pairs(model: halfbyte.Model) -> list[tuple[list[int], list[int]]]:
    ids = model.tokenizer(TEXT[:400])["input_ids"]
    shared = [(ids[:20], ids[20 : 20 + count]) for count in (1, 5, 3)]
    return [*shared, (ids[:7], ids[7:9]), (ids[3:30], ids[30:31]), (ids[:20], [5, 6]), (ids[:1], ids[1:40])]


def expected(model: halfbyte.Model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Each token behind all that stands before it, in one pass over the whole."""
    logprobs = torch.log_softmax(model.logits(context + continuation).double(), dim=-1)
    rows = logprobs[len(context) - 1 : -1]
    return float(rows.gather(1, torch.tensor(continuation)[:, None]).sum()), rows.argmax(-1).tolist() == continuation


def check(model: halfbyte.Model, given: list[Any], rel: float = 1e-5, **settings: Any) -> None:
    found = dict(score_continuations(model, given, **settings))
    assert sorted(found) == list(range(len(given)))
    for number, (context, continuation) in enumerate(given):
        logprob, greedy = expected(model, context, continuation)
        assert found[number].logprob == pytest.approx(logprob, rel=rel)
        assert found[number].greedy == greedy


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_likelihood_is_its_definition_whatever_is_computed_together(model: halfbyte.Model, batch_size: int) -> None:
    given = pairs(model)
    context = given[0][0]
    written = []
    for _ in range(3):
        written.append(int(model.logits(context + written)[-1].argmax()))
    check(model, [*given, (context, written), (context, [*written[:2], 7])], batch_size=batch_size)


def test_the_decoder_agrees_with_itself(tiny_llama: Path) -> None:
    decoder = halfbyte.load(tiny_llama, backend="decoder", compute="a16", head_bits=16)
    check(decoder, pairs(decoder), rel=1e-4, batch_size=4)


def test_rows_of_logits_come_in_pieces(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "MOST_ROWS", 7)
    check(model, pairs(model), batch_size=3)


def test_a_context_goes_through_the_model_once(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda **given: fed.append(given["input_ids"].shape[1]) or forward(**given)
    )
    ids = model.tokenizer(TEXT[:200])["input_ids"]
    list(score_continuations(model, [(ids[:20], ids[20:23]), (ids[:20], ids[20:21]), (ids[:20], ids[20:22])]))
    assert fed == [20, 2, 1]


def test_where_nothing_can_be_taken_back_the_context_is_computed_again(
    model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.runtime.engine import SequentialBatch

    def refuse(self: SequentialBatch, sequence: int, tokens: int) -> None:
        raise UnsupportedError("rollback: no")

    monkeypatch.setattr(SequentialBatch, "rollback", refuse)
    check(model, pairs(model), batch_size=2)


def test_what_is_too_long_loses_the_beginning_of_its_context(model: halfbyte.Model) -> None:
    ids = model.tokenizer(TEXT[:400])["input_ids"]
    [(_, cut)] = score_continuations(model, [(ids[:30], ids[30:34])], max_length=10)
    [(_, short)] = score_continuations(model, [(ids[23:30], ids[30:34])])
    assert cut == short
    [(_, whole)] = score_continuations(model, [(ids[:30], ids[30:34])])
    assert whole.logprob != cut.logprob


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([([], [1])], {}, "context 1: no token"),
        ([([1], [2]), ([1], [])], {}, "continuation 2: no token"),
        ([([1], [2, 3, 4])], {"max_length": 2}, "continuation 1: 3 tokens; expected at most 2"),
        ([([1], [2])], {"batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: halfbyte.Model, given: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        list(score_continuations(model, given, **settings))


def test_the_length_of_the_context(model: halfbyte.Model) -> None:
    assert context_length(model) == 512


def test_a_boundary_belongs_to_the_whole(model: halfbyte.Model) -> None:
    tokenizer = model.tokenizer
    for context, continuation in (("The 3rd crow", " sat"), ("The 3rd crow ", "sat"), ("The 3rd cr", "ow sat")):
        ids, more = encode_pair(tokenizer, context, continuation)
        assert ids == tokenizer.encode(context.rstrip())
        assert more == tokenizer.encode("The 3rd crow sat")[len(ids) :]


def test_last_words_are_counted_and_their_perplexity_is_its_definition(model: halfbyte.Model) -> None:
    result = measure_last_word(model, PASSAGES, progress=False)
    found = []
    for passage in PASSAGES:
        context, _, word = passage.rpartition(" ")
        found.append(expected(model, *encode_pair(model.tokenizer, context, f" {word}")))
    mean = sum(logprob for logprob, _ in found) / len(found)
    assert result.perplexity == pytest.approx(math.exp(-mean), rel=1e-5)
    assert result.accuracy == sum(greedy for _, greedy in found) / len(found)
    assert (result.passages, result.accuracy_stderr) == (4, 0.0)
    assert result.perplexity_stderr > 0


def test_a_word_the_model_writes_is_a_hit(model: halfbyte.Model) -> None:
    class Words:
        """A tokenizer that knows whole words, so that the model can be asked for one it writes."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

    best = int(model.logits([3, 4, 5])[-1].argmax())
    asked = halfbyte.Model.__new__(halfbyte.Model)
    asked.__dict__.update(model.__dict__)
    asked.tokenizer = Words()
    other = (best + 1) % 320
    result = measure_last_word(asked, [f"3 4 5 {best}", f"3 4 5 {other}"], progress=False)
    assert (result.accuracy, result.passages) == (0.5, 2)
    assert result.accuracy_stderr == pytest.approx(0.5)
    assert measure_last_word(asked, [f"3 4 5 {best}", "3 4 5 1"], limit=1, progress=False).accuracy == 1.0


@pytest.mark.parametrize(
    ("passages", "limit", "message"),
    [
        ([], None, "passages: none"),
        (["alone"], None, "passage 1: expected at least two words, got 'alone'"),
        (["ends with a space "], None, "passage 1: expected at least two words"),
        (PASSAGES, 0, "limit: expected at least 1"),
    ],
)
def test_passages_without_a_last_word_are_refused(
    model: halfbyte.Model, passages: list[str], limit: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_last_word(model, passages, limit=limit, progress=False)


def test_a_configuration_without_a_length_leaves_it_to_the_tokenizer(model: halfbyte.Model) -> None:
    unsure = halfbyte.Model.__new__(halfbyte.Model)
    unsure.__dict__.update(model.__dict__)
    unsure.config = SimpleNamespace(get_text_config=SimpleNamespace)
    unsure.tokenizer = SimpleNamespace(model_max_length=10**30)
    assert context_length(unsure) == likelihood.DEFAULT_CONTEXT
    unsure.tokenizer = SimpleNamespace(model_max_length=77)
    assert context_length(unsure) == 77


def test_eval_guesses_last_words(tiny_llama: Path, tmp_path: Path) -> None:
    from tests.cli.test_cli import run

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    arguments = ["eval", tiny_llama, "--data", "lambada", "--data-path", rows, "--skip-speed", "--limit", 3]
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["last_word"]["passages"] == 3
    assert "perplexity" not in document
