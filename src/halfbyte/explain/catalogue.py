"""The words of the lessons, by message id, in every language there is.

`messages/LANGUAGE.toml` holds one language. English has everything; the others have the headings, and what they lack
is shown in English. An id is the path to a string, such as `packing.codes.heading`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError

FOLDER = Path(__file__).parent / "messages"
ENGLISH = "en"
# Where Chinese is written in traditional characters.
_TRADITIONAL = ("zh_TW", "zh_HK", "zh_MO", "zh_Hant")


def languages() -> list[str]:
    """Those there is a catalogue for."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def pick_language(asked: str | None = None) -> str:
    """The language to speak.

    Args:
        asked: a language or a locale, such as "vi" or "zh_TW.UTF-8"; None for what LC_ALL, LC_MESSAGES or LANG say,
            and English if there is no catalogue for that.

    Raises:
        ConfigError: no catalogue for what was asked.
    """
    if asked is not None:
        language = _match(asked)
        if language is None:
            raise ConfigError(f"--lang {asked}: expected one of {', '.join(languages())}")
        return language
    variables = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return _match(next((value for value in variables if value), ENGLISH)) or ENGLISH


def _match(locale: str) -> str | None:
    name = locale.partition(".")[0].partition("@")[0].replace("-", "_")
    if name.startswith(_TRADITIONAL):
        return "zh_TW"
    return next((known for known in languages() if known in (name, name.partition("_")[0])), None)


@cache
def read_catalogue(language: str) -> dict[str, Any]:
    """The catalogue of a language as nested tables."""
    return tomllib.loads((FOLDER / f"{language}.toml").read_text(encoding="utf-8"))


def message_ids(catalogue: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The ids of all strings and lists of strings in it."""
    for key, value in catalogue.items():
        if isinstance(value, Mapping):
            yield from message_ids(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


@dataclass(frozen=True)
class Messages:
    """The messages of one language, in English where it has none."""

    language: str

    def text(self, identifier: str, /, **values: Any) -> str:
        """A message, its {names} replaced by `values`."""
        found = self._find(identifier)
        assert isinstance(found, str), identifier
        return found.strip().format(**values)

    def words(self, identifier: str, /, **values: Any) -> tuple[str, ...]:
        """A list of messages, such as the heads of a table's columns."""
        found = self._find(identifier)
        assert isinstance(found, list), identifier
        return tuple(entry.format(**values) for entry in found)

    def _find(self, identifier: str) -> Any:
        for language in (self.language, ENGLISH):
            found: Any = read_catalogue(language)
            for key in identifier.split("."):
                found = found.get(key) if isinstance(found, Mapping) else None
            if found is not None:
                return found
        raise KeyError(f"{identifier}: no such message")
