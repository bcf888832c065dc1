"""What `halfbyte VERB --help` says, as Markdown: from the application itself, so that the two cannot differ."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import typer

from halfbyte.cli import app

# Verb pages; a group's subcommands stand on the group's page.
PAGE = "[{name}]({page}.md)"


def _root() -> tuple[Any, Any]:
    command = typer.main.get_command(app)
    return command, command.context_class(command, info_name="halfbyte")


def find(path: str) -> tuple[Any, Any]:
    """The command "quantize" or "bench decode", and its context.

    Raises:
        KeyError: there is none.
    """
    command, context = _root()
    for name in path.split():
        command = command.commands[name]
        context = command.context_class(command, info_name=name, parent=context)
    return command, context


def verb_names() -> list[str]:
    """Every verb, in the order of `halfbyte --help`."""
    return list(_root()[0].commands)


def subcommands(path: str) -> list[str]:
    """Full paths of what stands below a verb; the verb itself where nothing does."""
    command, _ = find(path)
    return [f"{path} {name}" for name in getattr(command, "commands", {})] or [path]


def options(path: str) -> str:
    """Description, usage, arguments and options of a command, or of each command of a group."""
    paths = subcommands(path)
    if paths == [path]:
        return _one(path)
    return "\n\n".join(f"## {one}\n\n{_one(one)}" for one in paths)


def verbs(_: str) -> str:
    """A table of every verb."""
    rows = []
    for name in verb_names():
        command, _context = find(name)
        rows.append(f"| {PAGE.format(name=name, page=name)} | {_text(_first_sentence(command.help))} |")
    return "\n".join(["| verb | what it does |", "|---|---|", *rows])


def _one(path: str) -> str:
    command, context = find(path)
    usage = " ".join(["halfbyte", path, *command.collect_usage_pieces(context)])
    parts = [_description(command.help), f"```text\n{usage}\n```"]
    records = [(parameter.param_type_name, parameter.get_help_record(context)) for parameter in command.params]
    for kind, heading in (("argument", "argument"), ("option", "option")):
        rows = [record for of, record in records if of == kind and record is not None]
        if rows:
            lines = [f"| `{_names(names)}` | {_explained(text)} |" for names, text in rows]
            parts.append("\n".join([f"| {heading} | |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def _description(text: str) -> str:
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    kept = [re.sub(r"\s*Example: halfbyte .*$", "", paragraph) for paragraph in paragraphs]
    return "\n\n".join(_text(paragraph) for paragraph in kept if paragraph)


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _names(names: str) -> str:
    return names.replace("|", "\\|")


def _explained(text: str) -> str:
    """Help text with its default set as code."""
    text = " ".join(text.split())
    required = text.endswith("[required]")
    text, _, default = text.removesuffix("[required]").strip().partition("[default: ")
    shown = _text(text.strip()).replace("|", "\\|")
    if default:
        shown += f" Default: `{default.rstrip(']')}`."
    return f"{shown} *Required.*" if required else shown


def _text(text: str) -> str:
    """Plain words as Markdown: --help is not marked up, but for `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[\]\\])", r"\\\1", escape(text, quote=False))
