"""`halfbyte eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from halfbyte.cli import options
from halfbyte.cli.render import JsonFlag, print_json, print_table


@options.spread
def command(
    model: options.ModelArgument,
    *,
    data: Annotated[
        str,
        typer.Option(help="A UTF-8 text file, or builtin: the part of Python's prose never calibrated on."),
    ] = "builtin",
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens to move on by; the window if not given.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length of the speed measurement.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated in the speed measurement.")] = 32,
    skip_perplexity: Annotated[bool, typer.Option("--skip-perplexity", help="Measure speed alone.")] = False,
    skip_speed: Annotated[bool, typer.Option("--skip-speed", help="Measure perplexity alone.")] = False,
    loading: options.Loading,
    json: JsonFlag = False,
) -> None:
    """Measure perplexity on a text, and tokens per second for prefill and decoding.

    Example: halfbyte eval smollm2-4bit --data wiki.test.raw --max-windows 12
    """
    from halfbyte.evaluation.texts import read_text

    text = "" if skip_perplexity else read_text(data).text
    from halfbyte.evaluation.perplexity import measure_perplexity
    from halfbyte.evaluation.throughput import measure_throughput
    from halfbyte.generation.model import load

    loaded = load(model, **loading.settings())
    result: dict[str, Any] = {
        "model": model,
        "engine": loaded.engine.name,
        "not_fused": loaded.not_fused,
        "kernels": loaded.kernels,
        "memory_bytes": loaded.nbytes,
    }
    if not skip_perplexity:
        measured = measure_perplexity(loaded, text, window=window, stride=stride, max_windows=max_windows)
        result["perplexity"] = {"data": data, **asdict(measured)}
    if not skip_speed:
        result["throughput"] = asdict(measure_throughput(loaded, prompt_tokens=prompt_tokens, new_tokens=new_tokens))
    if json:
        print_json(result)
    else:
        _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    rows: list[tuple[str, str, str]] = [("memory", f"{result['memory_bytes'] / 1e6:,.1f} MB", "weights as held to run")]
    if "perplexity" in result:
        part = result["perplexity"]
        note = f"{part['data']}: {part['tokens']:,} tokens in {len(part['window_nll'])} windows of {part['window']}"
        rows.append(("perplexity", f"{part['perplexity']:.3f}", note))
    if "throughput" in result:
        part = result["throughput"]
        rows.append(
            (
                "prefill",
                f"{part['prefill_tokens_per_second']:,.1f} tok/s",
                f"prompt of {part['prompt_tokens']} tokens",
            )
        )
        note = f"{part['new_tokens'] - 1} tokens, one sequence, median of {part['repeats']}"
        rows.append(("decode", f"{part['decode_tokens_per_second']:,.1f} tok/s", note))
    kernels = ", ".join(f"{count} × {name}" for name, count in result["kernels"].items()) or "none: not quantized"
    rows.append(
        ("engine", result["engine"], f"not the decoder: {result['not_fused']}" if result["not_fused"] else "fused")
    )
    rows.append(("kernels", kernels, "quantized linears"))
    print_table(("measure", "value", "how"), rows, result["model"])
