"""From tokens to text while they come: whole characters only, and nothing of what could still become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from halfbyte.errors import ConfigError

# What stands for bytes that are no character, or not one yet.
INCOMPLETE = "\ufffd"
# A character takes four tokens at most; for a model that writes nothing but broken ones, or none, nobody waits longer.
MOST_HELD_TOKENS = 16


class Detokenizer:
    """Text of a growing sequence of tokens, at a cost per token that does not grow with it.

    A token's text can depend on its neighbours: a character may span tokens, and some tokenizers drop the space before
    the first word. So a few tokens are decoded together, with those before them and without, and the difference is
    what is new.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        """Begin an empty sequence.

        Args:
            decode: token ids → text.
        """
        self._decode = decode
        self._before: list[int] = []  # whose text is out, decoded along for what follows
        self._held: list[int] = []
        self._known = ""  # text of `_before`

    def push(self, token: int) -> str:
        """Append a token; the text that is certain now, possibly none."""
        self._held.append(token)
        text = self._decode(self._before + self._held)
        if text.endswith(INCOMPLETE) and len(self._held) < MOST_HELD_TOKENS:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """The text held back so far, as it is; nothing can follow."""
        return self._release(self._decode(self._before + self._held)) if self._held else ""

    def _release(self, text: str) -> str:
        new = text[len(self._known) :]
        if new or len(self._held) >= MOST_HELD_TOKENS:  # tokens without a text of their own wait for one that has it
            self._before, self._held = self._held, []
            self._known = self._decode(self._before)
        return new


class StopStrings:
    """Lets text through up to the first stop string to be complete, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]):
        """Begin before any text.

        Args:
            stops: the strings, none of them empty (`parse_stop`).
        """
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """Append text; what is before a stop string for certain. Once `met`, nothing more comes."""
        if self.met:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in self._held]
        if found:
            end, length = min(found)
            self.met = True
            return self._held[: end + length]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """The text held back so far; nothing can follow."""
        return "" if self.met else self._held


def parse_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The argument `stop`: one string, several, or none.

    Raises:
        ConfigError: an empty one, or something that is no string.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(one, str) and one for one in stops):
        raise ConfigError(f"stop: expected strings of at least one character, got {stop!r}")
    return stops


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with, the whole string left out."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
