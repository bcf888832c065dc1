"""`halfbyte generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from halfbyte.cli import options
from halfbyte.cli.render import JsonFlag, decode_input, describe_generation, print_json, summarize_speculation
from halfbyte.errors import ConfigError


@options.spread
def command(
    model: options.ModelArgument,
    prompt: Annotated[
        str, typer.Argument(help="Text to continue; - reads it from standard input, without its last newline.")
    ],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    sampling: options.Sampling,
    loading: options.Loading,
    json: JsonFlag = False,
) -> None:
    """Generate text, streamed as it comes.

    Filters act in the order of their options: first the repetition penalty, then temperature, top-k, top-p, min-p.

    Example: halfbyte generate smollm2-4bit "What is the capital of France?" --chat --temperature 0.7 --min-p 0.1
    """
    from halfbyte.generation.model import load

    sampled = sampling.settings()
    # The newline that ends a line in a pipe is not part of the text.
    text = decode_input(sys.stdin.buffer.read()).removesuffix("\n") if prompt == "-" else prompt
    if not text:
        raise ConfigError("prompt: empty; give at least one character")
    loaded = load(model, **loading.settings())
    messages = [{"role": "user", "content": text}] if chat else text
    pieces = loaded.generate(messages, max_new_tokens=max_new_tokens, stream=True, **sampled)
    for piece in pieces:
        if not json:
            print(piece, end="", flush=True)
    assert pieces.generation is not None
    if json:
        print_json({"model": model, **describe_generation(pieces.generation)})
        return
    print()
    if pieces.generation.speculation is not None:
        print(summarize_speculation(pieces.generation.speculation), file=sys.stderr)
