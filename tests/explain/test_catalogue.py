"""The words of the lessons in every language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import ConfigError
from halfbyte.explain.catalogue import Messages, languages, message_ids, pick_language, read_catalogue
from halfbyte.explain.lessons import LESSONS, Options, explain, list_lessons

# Said of some layers, and of blocks that are limited by something else than the example's.
SOMETIMES = {"awq.result.less", "awq.result.more", "gpu.occupancy.blocks", "gpu.occupancy.warps"}
TRANSLATED = ("heading", "title")


def headings(language: str) -> set[str]:
    return {name for name in message_ids(read_catalogue(language)) if name.rpartition(".")[2] in TRANSLATED}


def test_there_is_a_catalogue_for_each_language() -> None:
    assert languages() == ["en", "vi", "zh_TW"]


@pytest.mark.parametrize("language", ["vi", "zh_TW"])
def test_every_heading_is_in_every_catalogue(language: str) -> None:
    assert headings(language) == headings("en") == set(message_ids(read_catalogue(language)))
    english, other = Messages("en"), Messages(language)
    assert all(english.text(name) != other.text(name) for name in headings("en"))


def test_every_lesson_says_what_it_is() -> None:
    assert set(read_catalogue("en")) == set(LESSONS)
    assert all(title and summary for _, title, summary in list_lessons("en"))


def test_every_message_is_said_and_every_number_in_it_is_given(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: set[str] = set()
    find = Messages._find

    def note(self: Messages, identifier: str) -> Any:
        said.add(identifier)
        return find(self, identifier)

    monkeypatch.setattr(Messages, "_find", note)
    list_lessons("en")
    for options in (Options(), Options(model=str(tiny_llama))):
        for name, takes in LESSONS.items():
            if ("model" in takes or options.model is None) and (name != "awq" or options.model):
                explain(name, options, language="en")
    explain("packing", Options(verify=True), language="en")
    explain("gpu", Options(n=128, k=128), language="en")
    assert set(message_ids(read_catalogue("en"))) - said <= SOMETIMES


@pytest.mark.parametrize("language", ["vi", "zh_TW"])
def test_a_lesson_has_headings_in_the_language_and_text_in_english(language: str) -> None:
    told, english = (explain("gpu", language=name) for name in (language, "en"))
    assert all(a.heading != b.heading for a, b in zip(told.steps, english.steps, strict=True))
    assert [step.blocks for step in told.steps] == [step.blocks for step in english.steps]
    assert re.search(r"[^\x00-\x7f]", told.title)


@pytest.mark.parametrize(
    ("locale", "language"),
    [("vi_VN.UTF-8", "vi"), ("zh_TW.UTF-8", "zh_TW"), ("zh-Hant", "zh_TW"), ("zh_HK", "zh_TW"), ("en_GB", "en")],
)
def test_a_locale_names_a_language(locale: str, language: str) -> None:
    assert pick_language(locale) == language


@pytest.mark.parametrize("locale", ["zh_CN", "de_DE.UTF-8", "C", "", "../en"])
def test_a_language_nobody_wrote_is_refused_and_english_where_the_environment_says_it(
    locale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"expected one of en, vi, zh_TW$"):
        pick_language(locale)
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", locale)
    assert pick_language() == "en"


def test_the_environment_is_asked_in_the_usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "vi_VN")
    monkeypatch.setenv("LC_MESSAGES", "zh_TW")
    monkeypatch.setenv("LC_ALL", "")
    assert pick_language() == "zh_TW"
    monkeypatch.setenv("LC_ALL", "en_US")
    assert pick_language() == "en"
