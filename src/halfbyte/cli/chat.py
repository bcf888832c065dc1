"""`halfbyte chat`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli import options
from halfbyte.cli.render import decode_input, describe_generation, summarize_speculation
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.generation.chat import Chat

PROMPT = "> "


@options.spread
def command(
    model: options.ModelArgument,
    *,
    system: Annotated[str | None, typer.Option(help="How the model is to behave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the conversation at most; the model's if not given.")
    ] = None,
    sampling: options.Sampling,
    loading: options.Loading,
    json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
) -> None:
    """Chat with a model; answers are streamed as they come.

    /reset begins anew, /exit, Ctrl-D or Ctrl-C at the prompt leaves, Ctrl-C stops an answer. From a pipe, every line
    is a message; --json keeps the answers apart.

    Example: halfbyte chat smollm2-4bit --system "You answer in one sentence." --temperature 0.7 --min-p 0.1
    """
    from halfbyte.generation.chat import Chat
    from halfbyte.generation.model import load

    sampled = sampling.settings()
    loaded = load(model, **loading.settings())
    chat = Chat(loaded, system=system, max_new_tokens=max_new_tokens, context=context, **sampled)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    for line in _typed() if interactive else map(decode_input, sys.stdin.buffer):
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/") and text[1:].isalpha():
            _note(f"no such command: {text}; there are /reset and /exit")
        elif text and interactive:
            _answer_or_say_why_not(chat, text, json)
        elif text:
            _answer(chat, text, json)


def _typed() -> Iterator[str]:
    """Lines from the terminal, until Ctrl-D or Ctrl-C at the prompt."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history
    print("/reset begins anew, /exit leaves, Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def _answer_or_say_why_not(chat: Chat, text: str, json: bool) -> None:
    """At a terminal neither Ctrl-C nor a full context ends the chat."""
    try:
        _answer(chat, text, json)
    except KeyboardInterrupt:
        print(flush=True)
        _note("stopped")
    except ConfigError as error:
        _note(str(error))


def _answer(chat: Chat, text: str, json: bool) -> None:
    with closing(chat.send(text, stream=True)) as pieces:
        for piece in pieces:
            if not json:
                print(piece, end="", flush=True)
    generation = pieces.generation
    assert generation is not None
    print(json_module.dumps(describe_generation(generation), ensure_ascii=False) if json else "", flush=True)
    if generation.speculation is not None and not json:
        print(summarize_speculation(generation.speculation), file=sys.stderr, flush=True)
    if generation.finish_reason == "length":
        if generation.prompt_tokens + generation.new_tokens == chat.context:
            _note(f"cut off: the context of {chat.context:,} tokens is full; /reset begins anew")
        else:
            _note(f"cut off after {generation.new_tokens} tokens; --max-new-tokens allows more")


def _note(text: str) -> None:
    print(f"halfbyte: {text}", file=sys.stderr, flush=True)
