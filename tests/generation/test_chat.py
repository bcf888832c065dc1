from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.generation.chat import Chat
from tests.conftest import make_llama

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and 'forbidden' in message.content %}"
    "{{ raise_exception('no such system message') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.2, "seed": 5}


def with_template(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def folder(quantized_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(quantized_llama, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> halfbyte.Model:
    return halfbyte.load(folder)


def computed(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the steps of the decoder, as they come."""
    steps: list[int] = []
    step = model.engine.step  # type: ignore[attr-defined]
    monkeypatch.setattr(model.engine, "step", lambda cache, tokens: steps.append(len(tokens[0])) or step(cache, tokens))
    return steps


def test_a_turn_computes_what_is_new_and_answers_as_a_fresh_session(
    model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = computed(model, monkeypatch)
    chat, kept = Chat(model, system="Crows.", **SETTINGS), 0
    for turn, text in enumerate(("How many acorns?", "And then?", "Why?")):
        before = list(chat.messages)
        state = chat._generator.get_state()
        steps.clear()
        answer = chat.send(text)
        assert chat.messages == [*before, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        prompt = model.encode(chat.messages[:-1])
        assert steps[0] == len(prompt) - chat.reused
        assert chat.reused >= kept
        assert (chat.reused > 0) == (turn > 0)
        kept = len(prompt)
        # A fresh one, with the same messages and the same state of the generator.
        fresh = Chat(model, **SETTINGS)
        fresh.messages = before
        fresh._generator.set_state(state)
        assert fresh.send(text) == answer
        assert fresh.reused == 0


def test_the_same_seed_is_the_same_conversation_and_reset_begins_it_anew(model: halfbyte.Model) -> None:
    chat = Chat(model, system="Crows.", **SETTINGS)
    first = [chat.send("One"), chat.send("Two")]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Crows."}]
    assert [chat.send("One"), chat.send("Two")] == first
    assert chat.reused > 0
    assert Chat(model, system="Crows.", **{**SETTINGS, "seed": 6}).send("One") != first[0]


def test_the_same_message_again_computes_one_token(model: halfbyte.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = computed(model, monkeypatch)
    chat = Chat(model, max_new_tokens=4)
    answer = chat.send("One")
    chat.reset()
    steps.clear()
    assert chat.send("One") == answer
    assert steps[0] == 1


def test_an_answer_that_is_left_early_stays_as_far_as_it_came(model: halfbyte.Model) -> None:
    chat = Chat(model, **SETTINGS)
    stream = chat.send("One", stream=True)
    assert chat.messages == []
    pieces = [next(stream), next(stream)]
    stream.close()
    said = {"role": "assistant", "content": "".join(pieces)}
    assert chat.messages == [{"role": "user", "content": "One"}, said]
    fresh = Chat(model, **SETTINGS)
    fresh.messages = list(chat.messages)
    fresh._generator.set_state(chat._generator.get_state())
    assert chat.send("Two") == fresh.send("Two")


class Interrupted:
    """A session whose third step is interrupted."""

    def __init__(self, session: Any):
        self._session, self._steps = session, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self, ids: Any) -> Any:
        self._steps += 1
        if self._steps == 3:
            raise KeyboardInterrupt
        return self._session.step(ids)


@pytest.mark.parametrize("backend", ["decoder", "transformers"])
def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(
    folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = halfbyte.load(folder, backend=backend)
    session = model.engine.session
    chat = Chat(model, max_new_tokens=12)
    monkeypatch.setattr(model.engine, "session", lambda tokens: Interrupted(session(tokens)))
    with pytest.raises(KeyboardInterrupt):
        chat.send("One")
    monkeypatch.setattr(model.engine, "session", session)
    if chat.messages:  # unless all of its text was still held back
        assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    before = list(chat.messages)
    answer = chat.send("Two")
    assert chat.reused > 0
    fresh = Chat(model, max_new_tokens=12)
    fresh.messages = before
    assert fresh.send("Two") == answer


def test_a_step_interrupted_half_way_is_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In transformers some layers have come further than others by then."""
    model = halfbyte.load(folder, backend="transformers")
    chat = Chat(model, max_new_tokens=6)
    chat.send("One")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.network.model.layers[1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.send("Two")
    assert len(chat.messages) == 2
    answer = chat.send("Two")
    assert chat.reused == 0
    again = Chat(model, max_new_tokens=6)
    again.send("One")
    assert again.send("Two") == answer


def test_a_cache_that_cannot_go_back_is_filled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding window that is full has forgotten what stood before it."""
    import transformers

    base = make_llama(tmp_path / "base")
    config = transformers.MistralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = halfbyte.load(with_template(base, tmp_path / "model"), backend="transformers")
    monkeypatch.setattr(model, "stop_ids", frozenset())
    chat = Chat(model, max_new_tokens=6)
    chat.send("One")
    chat.reset()
    answer = chat.send("Another one")
    assert chat.reused == 0
    assert Chat(model, max_new_tokens=6).send("Another one") == answer


def test_a_full_context_is_refused_and_the_last_answer_cut_to_it(model: halfbyte.Model) -> None:
    length = len(model.encode([{"role": "user", "content": "One"}]))
    chat = Chat(model, max_new_tokens=50, context=length + 3)
    stream = chat.send("One", stream=True)
    list(stream)
    assert stream.generation is not None
    assert (stream.generation.finish_reason, stream.generation.new_tokens) == ("length", 3)
    before = list(chat.messages)
    with pytest.raises(ConfigError, match=rf"^the context is full: .* within {length + 3}; begin anew"):
        chat.send("Two")
    assert chat.messages == before
    chat.reset()
    assert chat.send("One") == before[1]["content"]
    assert Chat(model).context == 512


def test_what_cannot_be_talked_about_is_refused(model: halfbyte.Model, quantized_llama: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template, so it cannot chat"):
        Chat(halfbyte.load(quantized_llama))
    with pytest.raises(ConfigError, match="its chat template refuses the messages: no such system message"):
        Chat(model, system="forbidden").send("One")
    with pytest.raises(ConfigError, match="^message: empty"):
        Chat(model).send("")
    for bad in ({"max_new_tokens": 0}, {"context": 0}, {"top_k": 0}, {"stop": ""}):
        with pytest.raises(ConfigError, match=f"^{next(iter(bad))}: expected"):
            Chat(model, **bad)


def drafted_turns(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[list[int]]]:
    """Answers to three messages, and the lengths of the pieces the drafter was given before each."""
    given: list[list[int]] = []
    assert chat._drafting is not None
    engine = chat._drafting[0].engine  # type: ignore[attr-defined]
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda cache, tokens: given[-1].append(len(tokens[0])) or step(cache, tokens))
    answers = []
    for text in ("One", "Two", "Three"):
        given.append([])
        answers.append(chat.send(text))
    return answers, given


@pytest.mark.parametrize("draft", ["copy", "ngram"])
def test_a_draft_changes_no_answer(model: halfbyte.Model, folder: Path, draft: str) -> None:
    plain = Chat(model, max_new_tokens=24)
    drafting = Chat(model, max_new_tokens=24, draft=folder if draft == "copy" else draft, draft_length=3)
    drafted = 0
    for text in ("One", "the crow the crow the crow the", "One"):
        stream = drafting.send(text, stream=True)
        assert "".join(stream) == plain.send(text)
        assert stream.generation is not None
        assert stream.generation.speculation is not None
        assert stream.generation.prompt_tokens == len(model.encode(drafting.messages[:-1]))
        assert drafting.reused == plain.reused
        drafted += stream.generation.speculation.drafted
    assert drafted > 0


def test_a_drafter_reads_a_turn_no_more_than_once(
    model: halfbyte.Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, max_new_tokens=12, draft=folder, draft_length=2)
    _, given = drafted_turns(chat, monkeypatch)
    prompt = len(model.encode(chat.messages[:-1]))
    assert given[0][0] > 1
    assert given[2][0] < prompt / 2


def test_with_a_seed_a_drafted_conversation_repeats(model: halfbyte.Model, folder: Path) -> None:
    chat = Chat(model, **SETTINGS, draft=folder)
    first = [chat.send("One"), chat.send("Two")]
    chat.reset()
    assert [chat.send("One"), chat.send("Two")] == first


def test_a_drafter_that_was_interrupted_begins_anew(
    model: halfbyte.Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, max_new_tokens=12, draft=folder, draft_length=2)
    chat.send("One")
    assert chat._drafting is not None
    drafter: Any = chat._drafting[0]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drafter, "_draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.send("Two")
    before = list(chat.messages)
    batch = drafter._batch
    answer = chat.send("Three")
    assert drafter._batch is not batch
    fresh = Chat(model, max_new_tokens=12)
    fresh.messages = before
    assert fresh.send("Three") == answer
