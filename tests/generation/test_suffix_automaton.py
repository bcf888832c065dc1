"""The suffix automaton against looking everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from halfbyte.generation.suffix_automaton import SuffixAutomaton


def longest_repeat(tokens: list[int]) -> int:
    """The longest end that also ends elsewhere, by trying all."""
    for length in range(len(tokens) - 1, 0, -1):
        end = tokens[-length:]
        if any(tokens[start : start + length] == end for start in range(len(tokens) - length)):
            return length
    return 0


@given(st.lists(st.integers(0, 3), max_size=60))
def test_finds_the_longest_repeat_after_every_token(tokens: list[int]) -> None:
    automaton = SuffixAutomaton()
    for count, token in enumerate(tokens, 1):
        automaton.append(token)
        length, end = automaton.longest_repeat()
        assert length == longest_repeat(tokens[:count])
        assert length <= end < count or length == 0
        assert tokens[end - length : end] == tokens[count - length : count]


def test_the_latest_place_that_was_asked_about_is_the_one_that_is_named() -> None:
    automaton = SuffixAutomaton([1, 2, 7, 1, 2])
    assert automaton.longest_repeat() == (2, 2)
    for token in (8, 1, 2):
        automaton.append(token)
    assert automaton.longest_repeat() == (2, 5)
    assert automaton.tokens[5] == 8


def test_a_new_token_repeats_nothing() -> None:
    assert SuffixAutomaton().longest_repeat() == (0, 0)
    assert SuffixAutomaton([5]).longest_repeat() == (0, 0)
    assert SuffixAutomaton([5, 6]).longest_repeat() == (0, 0)
