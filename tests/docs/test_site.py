"""The docs without running them: what can be parsed, what the hooks make, and that nothing is left out."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from types import ModuleType

import pytest

from halfbyte.cli import HELP
from tests.docs.pages import DOCS, PageError, parse, read_pages


def _hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


verb_tables = _hook("verb_tables")


def test_marks_are_read() -> None:
    page = parse(
        "<!-- given: my.txt -->\n\n```sh\na\nb\n```\n\n<!-- needs: gpu -->\n```python\nc\n```\n"
        "<!-- fails: 2 -->\n```sh\nd\n```\n\n```text\nerror: e\n  f\n```\n\n```json\n{}\n```\n"
    )
    assert page.given == ("my.txt",)
    assert [block.code for block in page.blocks] == ["a\nb\n", "c\n", "d\n"]
    assert [block.line for block in page.blocks] == [3, 9, 13]
    assert [block.needs for block in page.blocks] == [None, "gpu", None]
    assert [block.exit_code for block in page.blocks] == [0, 0, 2]
    assert page.blocks[2].prints == ("error: e", "f")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```sh\na\n", "page:1: this block is never closed"),
        ("<!-- needs: luck -->\n```sh\n```\n", "page:1: 'luck'"),
        ("<!-- given: gold -->\n", "page:1: 'gold'"),
        ("<!-- needs: gpu -->\n\nWords.\n", "page:3: a mark belongs right above"),
        ("<!-- needs: gpu -->\n```text\n```\n", "page:2: a mark belongs above a shell"),
        ("<!-- fails: 2 -->\n```sh\na\n```\n", "page:2: fails, but no text block"),
    ],
)
def test_a_page_that_is_not_understood_is_refused(text: str, says: str) -> None:
    with pytest.raises(PageError, match=re.escape(says)):
        parse(text)


def test_every_page_is_understood_and_most_commands_run() -> None:
    blocks = [block for page in read_pages() for block in page.blocks]
    assert sum(block.needs is None for block in blocks) > len(blocks) / 2


def unknown_options(code: str) -> list[str]:
    """What of the halfbyte commands in a shell block its command line does not know."""
    unknown = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "halfbyte" not in words:
            continue
        words = words[words.index("halfbyte") + 1 :]
        words = words[: next((at for at, word in enumerate(words) if word in ("|", ">", "&&")), len(words))]
        path = words[:1]
        if words[0] == "--help":
            continue
        if words[0] not in verb_tables.verb_names():
            unknown.append(words[0])
            continue
        groups = verb_tables.subcommands(words[0])
        if groups != path:
            path = words[:2]
            if " ".join(path) not in groups:
                unknown.append(" ".join(path))
                continue
        known = {option for parameter in verb_tables.find(" ".join(path))[0].params for option in parameter.opts}
        unknown += [word for word in words if word.startswith("-") and len(word) > 1 and word not in {*known, "--help"}]
    return unknown


def test_the_pages_use_verbs_and_options_that_exist() -> None:
    for page in read_pages():
        for block in page.blocks:
            if block.language == "sh":
                assert not unknown_options(block.code), f"docs/{page.path}:{block.line}"


def test_the_help_of_halfbyte_uses_verbs_and_options_that_exist() -> None:
    commands = [line.strip() for line in HELP.splitlines() if line.startswith("  halfbyte ")]
    assert [command.split()[1] for command in commands] == ["quantize", "generate", "compare", "report"]
    assert [found for command in commands for found in unknown_options(command)] == []


def test_what_does_not_exist_is_found() -> None:
    assert unknown_options("halfbyte fly away\n") == ["fly"]
    assert unknown_options("halfbyte inspect tea x\n") == ["inspect tea"]
    assert unknown_options("echo a | halfbyte eval x \\\n  --max-windows 4 --min-windows 4 | head -1\n") == [
        "--min-windows"
    ]
    assert unknown_options("halfbyte explain    # list --them\nls --all\n") == []


def test_every_verb_has_its_page_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for verb in verb_tables.verb_names():
        text = (DOCS / "verbs" / f"{verb}.md").read_text(encoding="utf-8")
        assert f"<!-- halfbyte: options {verb} -->" in text
        assert f"- verbs/{verb}.md\n" in navigation


def test_every_lesson_has_its_page_in_the_navigation() -> None:
    from halfbyte.explain.lessons import LESSONS

    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for name in LESSONS:
        assert f"<!-- halfbyte: lesson {name} -->" in (DOCS / "lessons" / f"{name}.md").read_text(encoding="utf-8")
        assert f"- lessons/{name}.md\n" in navigation


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md"):
        assert path.relative_to(DOCS).as_posix() in navigation


def test_tables_hold_every_option_of_every_verb() -> None:
    for verb in verb_tables.verb_names():
        made = verb_tables.options(verb)
        for path in verb_tables.subcommands(verb):
            command, _ = verb_tables.find(path)
            assert f"halfbyte {path} " in made
            for parameter in command.params:
                if parameter.param_type_name == "option" and not parameter.hidden:
                    assert f"`{max(parameter.opts, key=len)}" in made.replace("-o, ", "")
        assert "[default:" not in made
        assert "Example: halfbyte" not in made


def test_an_option_is_told_as_help_tells_it() -> None:
    made = verb_tables.options("quantize")
    assert "| `-o, --output <path>` | Folder for the new checkpoint. *Required.* |" in made
    assert "| `--bits <int>` | Bits per weight: 2, 3, 4 or 8. Default: `4`. |" in made
    assert "Leave the output head in 16 bit." not in made  # an option that is hidden


def test_a_lesson_becomes_a_page() -> None:
    pytest.importorskip("matplotlib")
    from halfbyte.explain.lesson import Chart, Check, Drawing, Lesson, Series, Span, Step, Table, Text

    blocks = (
        Text("One `a < b` *c*.\n\nTwo."),
        Check("1 < 2"),
        Table("T", ("name", "value"), ((Span("x"), Span("0.5", value=0.5)),)),
        Drawing("D", ((Span("ab", mark=3), Span(" <c>")),)),
        Chart("C.", "x", "y", (0.0, 1.0), (Series("s", (1.0, None)),)),
    )
    made = _hook("lesson_page").render(Lesson("l", "L", "S", "en", (Step("s", "Heading", blocks),)))
    assert "## Heading" in made
    assert "<p>One <code>a &lt; b</code> *c*.</p>\n\n<p>Two.</p>" in made
    assert '<p class="hb-check">✓ 1 &lt; 2</p>' in made
    assert '<th class="hb-number">value</th>' in made
    assert '<td class="hb-number">0.5</td>' in made
    assert '<span class="hb-m3">ab</span> &lt;c&gt;' in made
    assert 'alt="C. Curves: s" src="data:image/svg+xml;base64,' in made
