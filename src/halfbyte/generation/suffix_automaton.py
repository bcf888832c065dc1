"""Where the end of a text occurred before: a suffix automaton that grows with it (Blumer et al. 1985)."""

from __future__ import annotations

from collections.abc import Iterable


class SuffixAutomaton:
    """Every substring of a sequence of tokens, in states of those that end at the same places.

    A token more costs constant time on average, and so does the longest earlier occurrence of the sequence's end: it is
    the suffix link of the state that stands for the whole.

    Attributes:
        tokens: so far.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        """Begin with tokens."""
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of the longest substring of a state
        self._end = [0]  # tokens before which an occurrence ends: the last one that was asked about, or the first
        self._whole = 0  # the state of the whole sequence
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Make the sequence longer by a token."""
        self.tokens.append(token)
        new = self._state({}, self._length[self._whole] + 1, len(self.tokens))
        state, self._whole = self._whole, new
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state == -1:
            self._link[new] = 0
            return
        old = self._next[state][token]
        if self._length[old] == self._length[state] + 1:
            self._link[new] = old
            return
        # The shorter substrings of `old` now end in one more place than the longer ones: a state of their own.
        split = self._state(dict(self._next[old]), self._length[state] + 1, self._end[old])
        self._link[split] = self._link[old]
        self._link[old] = self._link[new] = split
        while state != -1 and self._next[state].get(token) == old:
            self._next[state][token] = split
            state = self._link[state]

    def longest_repeat(self) -> tuple[int, int]:
        """The longest end of the sequence that occurred before.

        Returns:
            Its length, and the number of tokens before which an earlier occurrence ends: tokens[end:] is what followed.
            (0, 0) if the last token is new.
        """
        state = self._link[self._whole]
        if state <= 0:
            return 0, 0
        end, self._end[state] = self._end[state], len(self.tokens)
        return self._length[state], end

    def _state(self, transitions: dict[int, int], length: int, end: int) -> int:
        self._next.append(transitions)
        self._link.append(-1)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1
