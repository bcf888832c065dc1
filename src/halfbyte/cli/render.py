"""What the verbs share: tables, JSON, sizes, errors."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from halfbyte.errors import ConfigError, HalfbyteError

if TYPE_CHECKING:
    from halfbyte.generation.loop import Generation
    from halfbyte.generation.speculation import Speculation

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


# Parameters that are no options.
ARGUMENTS = ("model", "models", "prompt", "reference", "output", "lesson")


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
        except ConfigError as error:
            name, rest = re.match(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
            if name in ARGUMENTS or name not in kwargs or "expected" not in rest:
                raise
            raise ConfigError(f"--{name.replace('_', '-')}{rest}") from error
        except KeyboardInterrupt as error:  # with a text where something was kept
            raise InterruptionError(str(error) or "stopped by Ctrl-C; nothing unfinished was kept") from None

    return wrapped


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
