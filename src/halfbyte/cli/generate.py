"""`halfbyte generate`."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from halfbyte.cli.render import JsonFlag, parse_head_bits, print_json


def command(
    model: Annotated[str, typer.Argument(help="A folder, sample:NAME, or a hub name.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, decoder, transformers, or a kernel of `halfbyte backends`.")
    ] = "auto",
    compute: Annotated[str, typer.Option(help="Activations of the decoder: a8 (8 bits), a16, or auto.")] = "auto",
    head_bits: Annotated[str, typer.Option(help="Output head of the decoder: 16, 8, 6, 4, or auto.")] = "auto",
    cache: Annotated[str, typer.Option(help="Keys and values of the decoder: fp16, int8, or auto.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Generate text, streamed as it comes.

    Example: halfbyte generate smollm2-4bit "What is the capital of France?" --chat
    """
    from halfbyte.generation.model import load
    from halfbyte.sampling.filters import SamplingParameters

    SamplingParameters(temperature, top_k, top_p)  # refuse a bad value before loading anything
    text = sys.stdin.read() if prompt == "-" else prompt
    bits = parse_head_bits(head_bits)
    loaded = load(model, device=device, backend=backend, compute=compute, head_bits=bits, cache=cache)
    message = [{"role": "user", "content": text}] if chat else text
    start = time.perf_counter()
    pieces = []
    for piece in loaded.generate(
        message,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stream=True,
    ):
        pieces.append(piece)
        if not json:
            print(piece, end="", flush=True)
    if json:
        print_json({"model": model, "text": "".join(pieces), "seconds": time.perf_counter() - start})
    else:
        print()
