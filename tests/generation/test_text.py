from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.architectures.tokenizer import load_tokenizer
from halfbyte.errors import ConfigError
from halfbyte.generation.text import MOST_HELD_TOKENS, Detokenizer, StopStrings, parse_stop


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def pushed(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def test_a_character_comes_once_all_its_bytes_are_there(tokenizer: Any) -> None:
    text = "The crow \N{BIRD} sat\nand ate \u00e9clairs"
    ids = tokenizer(text)["input_ids"]
    assert any(tokenizer.decode([i]) == "\ufffd" for i in ids), "no token holds a part of a character"
    pieces = pushed(Detokenizer(tokenizer.decode), ids)
    assert "".join(pieces) == text
    assert "\N{BIRD}" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(1, 319), max_size=60))
def test_pieces_make_the_text_of_all_tokens_whatever_they_are(tokenizer: Any, ids: list[int]) -> None:
    assert "".join(pushed(Detokenizer(tokenizer.decode), ids)) == tokenizer.decode(ids)


def test_the_cost_of_a_token_does_not_grow(tokenizer: Any) -> None:
    """Neither with the length of a line, nor where nothing but broken characters or special tokens come."""
    broken = next(i for i in range(320) if tokenizer.decode([i]) == "\ufffd")
    word = tokenizer(" crow")["input_ids"][-1]
    for token in (word, broken, 0):
        decoded = []

        def decode(ids: list[int], decoded: list[int] = decoded) -> str:
            decoded.append(len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        pieces = pushed(Detokenizer(decode), [token] * 200)
        assert "".join(pieces) == tokenizer.decode([token] * 200, skip_special_tokens=True)
        assert max(decoded) <= 2 * MOST_HELD_TOKENS


def test_a_space_that_a_tokenizer_drops_before_the_first_word_is_kept_between_words() -> None:
    """As sentencepiece does: the text of a token depends on whether another one is before it."""
    words = ["\u2581Hello", "\u2581world", "ly", "\u2581!"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")  # noqa: E731
    assert pushed(Detokenizer(decode), [0, 1, 2, 3]) == ["Hello", " world", "ly", " !", ""]


def stopped(text: str, cuts: list[int], stops: list[str]) -> tuple[str, bool]:
    """What gets through when the text comes in pieces."""
    strings = StopStrings(stops)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = "".join(strings.push(text[a:b]) for a, b in pairwise(edges))
    return found + strings.finish(), strings.met


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_text_ends_before_the_first_stop_string_to_be_complete_however_it_is_cut(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    expected, met = text, False
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            expected, met = text[: min(starts)], True
            break
    assert stopped(text, cuts, stops) == (expected, met)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["\n\nUser:", "###"])
    assert [strings.push(piece) for piece in ("Hi", " #", "1\n", "\nU", "gh", "\n\nUs", "er", ": no")] == [
        "Hi", " ", "#1", "", "\n\nUgh", "", "", "",
    ]  # fmt: skip
    assert strings.met
    assert strings.push("more") + strings.finish() == ""


def test_stop_is_one_string_several_or_none() -> None:
    assert parse_stop(None) == parse_stop([]) == ()
    assert parse_stop("ab") == ("ab",)
    assert parse_stop(["a", "b"]) == ("a", "b")
    for bad in ("", ["a", ""], [1]):
        with pytest.raises(ConfigError, match="^stop: expected strings"):
            parse_stop(bad)  # type: ignore[arg-type]
