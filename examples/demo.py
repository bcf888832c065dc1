"""The whole product in one run: a real model in, a 4-bit model out, and what it cost and gained.

Fetches the sample model, quantizes it with AWQ, loads it back and puts both side by side. Run by `make demo`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

import halfbyte
from halfbyte.evaluation.perplexity import measure_perplexity
from halfbyte.evaluation.throughput import measure_throughput
from halfbyte.quantization.calibration import builtin_documents

MODEL = "sample:smollm2-135m"
QUESTION = [{"role": "user", "content": "Explain in two sentences why the sky is blue."}]


def main() -> None:
    """Quantize, measure both sides, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output"), help="folder for the 4-bit model")
    parser.add_argument("--max-calib-samples", type=int, default=16, help="calibration blocks of 512 tokens")
    options = parser.parse_args()
    console = Console()
    start = time.perf_counter()

    console.print(f"[bold]1. Quantize[/] {MODEL} to 4 bits with AWQ, calibrated on Python's own documentation")
    report = halfbyte.quantize(MODEL, options.output, max_calib_samples=options.max_calib_samples, overwrite=True)
    console.print(f"   {report.seconds:.0f} s; saved to {report.output_dir}")

    console.print("[bold]2. Load[/] both models and measure them on text that calibration has not seen")
    before = measure(console, "bf16", halfbyte.load(MODEL))
    after = measure(console, "INT4", halfbyte.load(options.output))

    sizes = {
        "whole checkpoint": (report.total_bytes_before, report.total_bytes_after),
        "decoder blocks": (report.block_bytes_before, report.block_bytes_after),
    }
    table = Table(box=box.SIMPLE_HEAD, title="SmolLM2-135M-Instruct before and after", title_justify="left")
    for column in ("", "bf16", "INT4 (AWQ)", "INT4 / bf16"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (old, new) in sizes.items():
        table.add_row(name, f"{old / 1e6:.1f} MB", f"{new / 1e6:.1f} MB", f"{new / old:.3f}")
    table.add_row(
        "bits per decoder weight",
        "16.00",
        f"{report.bits_per_weight:.2f}",
        f"{report.bits_per_weight / 16:.3f}",
    )
    for key, unit, digits in (("perplexity", "", 3), ("prefill", " tok/s", 1), ("decode", " tok/s", 1)):
        old, new = before[key], after[key]
        table.add_row(key, f"{old:.{digits}f}{unit}", f"{new:.{digits}f}{unit}", f"{new / old:.3f}")
    console.print(table)
    console.print(f"[bold]The question:[/] {QUESTION[0]['content']}")
    console.print(f"[bold]bf16[/]  {before['text']}", highlight=False)
    console.print(f"[bold]INT4[/]  {after['text']}", highlight=False)
    console.print(
        f"\n{time.perf_counter() - start:.0f} s in all. Try it: halfbyte generate {options.output} --chat 'Hello!'"
    )


def measure(console: Console, label: str, model: halfbyte.Model) -> dict[str, float | str]:
    """Perplexity, speed and an answer."""
    held_out = "\n\n".join(builtin_documents("heldout"))
    result = measure_perplexity(model, held_out, window=512, max_windows=6)
    speed = measure_throughput(model, prompt_tokens=128, new_tokens=32)
    text = model.generate(QUESTION, max_new_tokens=64)
    console.print(f"   {label}: perplexity {result.perplexity:.3f}, {speed.decode_tokens_per_second:.1f} tok/s")
    return {
        "perplexity": result.perplexity,
        "prefill": speed.prefill_tokens_per_second,
        "decode": speed.decode_tokens_per_second,
        "text": text.strip(),
    }


if __name__ == "__main__":
    main()
