"""What the verbs share: tables, JSON, sizes, errors."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.models import OptionInfo

from halfbyte.errors import ConfigError, HalfbyteError

if TYPE_CHECKING:
    from halfbyte.generation.loop import Generation
    from halfbyte.generation.speculation import Speculation

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


# The library's names of parameters that the command line has under others.
OTHER_NAMES = {"modules_to_not_convert": "skip", "format": "layout"}


class InterruptionError(HalfbyteError):
    """Ctrl-C."""


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Turn Ctrl-C into an error of ours before typer makes "Aborted!" and an exit code of its own of it.

    An error about a parameter of the library names the option it was given by.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HalfbyteError as error:
            raise type(error)(name_options(str(error), command, kwargs)) from error
        except KeyboardInterrupt as error:  # with a text where something was kept
            raise InterruptionError(str(error) or "stopped by Ctrl-C; nothing unfinished was kept") from None

    return wrapped


def name_options(message: str, command: Callable[..., None], given: Mapping[str, Any]) -> str:
    """A message of the library with its parameters as the options that they are on the command line.

    Args:
        message: such as "tp_align 4: 9 attention heads cannot be split", or ending in "add modules_to_not_convert".
        command: whose options these are.
        given: parameter → value.
    """
    options = _options(command)
    options |= {theirs: options[ours] for theirs, ours in OTHER_NAMES.items() if ours in options}
    # The first word names an option where a colon follows, or what was given; a sentence may begin with "data", too.
    name, rest = re.match(r"(\w*)(.*)", message, re.DOTALL).groups()  # type: ignore[union-attr]
    value = given.get(OTHER_NAMES.get(name, name))
    values = "|".join(re.escape(str(one)) for one in (value if isinstance(value, list) else [value]))
    if name in options and (re.match(rf""":| ["']?({values})(?!\w)""", rest) or "expected" in rest):
        message = options[name] + rest
    for name, option in options.items():
        message = re.sub(rf"""(?<![\w.,:-]){name}=["']([\w-]+)["']""", rf"{option} \1", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./-]){name}(?![\w/=-]|\.\w)", option, message)
    return message


def _options(command: Callable[..., None]) -> dict[str, str]:
    """Parameter → option, of those that are options."""
    found = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for one in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(one, OptionInfo):
                # Inside of Annotated typer has the first spelling for a default.
                spelled = [text for text in (one.default, *(one.param_decls or ())) if isinstance(text, str)]
                found[name] = max(spelled, default=f"--{name.replace('_', '-')}", key=len)
    return found


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print(f"halfbyte: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def print_json(value: Any) -> None:
    """One document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table as wide as its content, cells as plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # Nobody's window is known in a pipe; a file can be as wide as it must.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def decode_input(data: bytes) -> str:
    """Text from standard input, whatever the locale: UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8 text (byte {error.start}); convert it first") from None


def describe_generation(generation: Generation) -> dict[str, Any]:
    """The text, why it ended, and how many tokens in how many seconds."""
    return {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "seconds": generation.prefill_seconds + generation.decode_seconds,
        "prefill_seconds": generation.prefill_seconds,
        "tokens_per_second": generation.tokens_per_second,
        **({} if generation.speculation is None else {"speculation": describe_speculation(generation.speculation)}),
    }


def describe_speculation(speculation: Speculation) -> dict[str, Any]:
    """Its counters, and what follows from them."""
    derived = ("acceptance_rate", "acceptance_by_position", "tokens_per_pass")
    return {**asdict(speculation), **{name: getattr(speculation, name) for name in derived}}


def summarize_speculation(speculation: Speculation) -> str:
    """What drafting did, in a line or two."""
    lines = []
    if speculation.drafted:
        lines.append(
            f"draft {speculation.draft}: {speculation.drafted} drafted, {speculation.accepted} accepted "
            f"({speculation.acceptance_rate:.0%}), {speculation.tokens_per_pass:.2f} tokens a pass; seconds: "
            f"{speculation.draft_seconds:.2f} draft, {speculation.verify_seconds:.2f} verify, "
            f"{speculation.sampler_seconds:.2f} sampler"
        )
    else:
        lines.append(f"draft {speculation.draft}: nothing was worth drafting")
    if speculation.gave_up is not None:
        lines.append(f"drafting stopped: {speculation.gave_up}")
    return "\n".join(lines)


def megabytes(nbytes: int) -> str:
    """Decimal megabytes."""
    return f"{nbytes / 1e6:,.1f} MB"


def parse_draft_length(text: str) -> Any:
    """`--draft-length`: a number or "auto"; the library refuses numbers out of range."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--draft-length {text}: expected auto or a number") from None


def parse_head_bits(text: str) -> Any:
    """`--head-bits`: a number or "auto"; the library refuses numbers it does not know."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--head-bits {text}: expected auto, 16, 8, 6 or 4") from None
