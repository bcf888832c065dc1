"""What of the docs can be run: the shell and Python blocks of a page, in order, and what is said about each.

A comment on a line of its own right above a block:

    <!-- needs: hub -->       not run here: it needs a model hub (or: gpu, install)
    <!-- fails: 2 -->         ends with this exit code, and prints the text block that follows it

and anywhere on a page, what lies in the folder in which its blocks run:

    <!-- given: smollm2-4bit my.txt -->
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = {"sh": "sh", "bash": "sh", "shell": "sh", "console": "sh", "python": "python", "py": "python"}
NEEDS = ("gpu", "hub", "install")
GIVEN = ("smollm2-4bit", "my.txt")

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>\w*)")
_MARK = re.compile(r"^ *<!-- (?P<kind>needs|fails|given): (?P<value>.*?) -->$")


class PageError(ValueError):
    """A page that says something its reader here does not understand."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of its fence, from 1.
        language: "sh" or "python".
        code: without the fence.
        needs: why it is not run; None if it is.
        exit_code: that it ends with.
        prints: what it must print, one part a line; () for anything.
    """

    line: int
    language: str
    code: str
    needs: str | None
    exit_code: int
    prints: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """A page of the docs.

    Attributes:
        path: below docs.
        given: names out of `GIVEN`.
        blocks: of shell and Python, in order.
    """

    path: str
    given: tuple[str, ...]
    blocks: tuple[Block, ...]


def read_pages(folder: Path = DOCS) -> list[Page]:
    """Every page with something to run on it, by name.

    Raises:
        PageError: see `parse`.
    """
    paths = sorted(folder.rglob("*.md"))
    pages = [parse(path.read_text(encoding="utf-8"), path.relative_to(folder).as_posix()) for path in paths]
    return [page for page in pages if page.blocks]


def parse(text: str, path: str = "page") -> Page:
    """The blocks of a page.

    Raises:
        PageError: names the page and the line: an open fence, an unknown mark, a mark without a block, a block that is
            to fail and is not followed by the text it prints.
    """
    lines = text.splitlines()
    given: tuple[str, ...] = ()
    marks: dict[str, str] = {}
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        line, at = lines[number], f"{path}:{number + 1}"
        number += 1
        if mark := _MARK.match(line):
            kind, value = mark["kind"], mark["value"]
            if kind == "given":
                given += _known(value.split(), GIVEN, at)
            else:
                marks[kind] = value if kind == "fails" else _known([value], NEEDS, at)[0]
            continue
        fence = _FENCE.match(line)
        if fence is None:
            if marks and line.strip():
                raise PageError(f"{at}: a mark belongs right above a block")
            continue
        opened = number
        code, number = _inside(lines, number, fence, at)
        language = LANGUAGES.get(fence["language"])
        if language is None:
            if marks:
                raise PageError(f"{at}: a mark belongs above a shell or Python block")
            if blocks and blocks[-1].exit_code and not blocks[-1].prints:
                blocks[-1] = _printing(blocks[-1], code)
            continue
        blocks.append(Block(opened, language, code, marks.get("needs"), int(marks.get("fails", "0")), ()))
        marks = {}
    for block in blocks:
        if block.exit_code and not block.prints:
            raise PageError(f"{path}:{block.line}: fails, but no text block says what it prints")
    return Page(path, given, tuple(blocks))


def _inside(lines: list[str], number: int, fence: re.Match[str], at: str) -> tuple[str, int]:
    """What a fence encloses, and the line after it."""
    code = []
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.strip() == fence["ticks"]:
            return "\n".join(code) + "\n", number
        code.append(line.removeprefix(fence["indent"]))
    raise PageError(f"{at}: this block is never closed")


def _printing(block: Block, text: str) -> Block:
    parts = tuple(line.strip() for line in text.splitlines() if line.strip())
    return Block(block.line, block.language, block.code, block.needs, block.exit_code, parts)


def _known(values: list[str], known: tuple[str, ...], at: str) -> tuple[str, ...]:
    for value in values:
        if value not in known:
            raise PageError(f"{at}: {value!r}: expected one of {', '.join(known)}")
    return tuple(values)
