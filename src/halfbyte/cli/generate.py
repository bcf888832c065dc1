"""`halfbyte generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from halfbyte.cli import options
from halfbyte.cli.render import (
    JsonFlag,
    decode_input,
    describe_generation,
    parse_draft_length,
    parse_head_bits,
    print_json,
    summarize_speculation,
)


def command(
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = None,
    draft: options.Draft = None,
    draft_length: options.DraftLength = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    compute: options.Compute = "auto",
    head_bits: options.HeadBits = "auto",
    cache: options.Cache = "auto",
    threads: options.Threads = None,
    json: JsonFlag = False,
) -> None:
    """Generate text, streamed as it comes.

    Filters act in the order of their options: first the repetition penalty, then temperature, top-k, top-p, min-p.

    Example: halfbyte generate smollm2-4bit "What is the capital of France?" --chat --temperature 0.7 --min-p 0.1
    """
    from halfbyte.generation.model import load
    from halfbyte.generation.text import parse_stop
    from halfbyte.sampling.filters import SamplingParameters

    # Refuse a bad value before loading anything.
    SamplingParameters(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = parse_stop(stop)
    length = parse_draft_length(draft_length)
    text = decode_input(sys.stdin.buffer.read()) if prompt == "-" else prompt
    bits = parse_head_bits(head_bits)
    loaded = load(model, device=device, backend=backend, compute=compute, head_bits=bits, cache=cache, threads=threads)
    pieces = loaded.generate(
        [{"role": "user", "content": text}] if chat else text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stops,
        seed=seed,
        draft=draft,
        draft_length=length,
        stream=True,
    )
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
