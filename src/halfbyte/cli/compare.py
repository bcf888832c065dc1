"""`halfbyte compare`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli import options
from halfbyte.cli.render import JsonFlag, print_json, print_table
from halfbyte.cli.report import check_outputs, print_written, write_outputs
from halfbyte.errors import OutputError

if TYPE_CHECKING:
    from halfbyte.evaluation.comparison import Comparison

# The first for sizes, the second for quality and speed: together they are wider than most windows.
SIZES = ("", "model", "on disk", "smaller", "in memory", "load")


@options.spread
def command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more; the first is the reference. A folder, sample:NAME, a hub name, or MODEL@METHOD (awq, "
            "awq-l2, gptq, best, rtn), quantized when first asked for and kept in the cache; options as "
            "MODEL@awq:group_size=32,bits=3. MODEL@nf4 is bitsandbytes' (pip install 'halfbyte[nf4]')."
        ),
    ],
    *,
    data: Annotated[
        str, typer.Option(help="A UTF-8 text file, or builtin: the part of Python's prose never calibrated on.")
    ] = "builtin",
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    n_samples: Annotated[
        int | None, typer.Option(help="Windows of the text to measure at most; 64 if not given, 16 with --quick.")
    ] = None,
    skip_original: Annotated[
        bool,
        typer.Option(
            "--skip-original",
            help="Load no unquantized model: only its size is told, and the first quantized one is the reference.",
        ),
    ] = False,
    skip_speed: Annotated[bool, typer.Option("--skip-speed", help="Do not time prefill and decoding.")] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Calibrate MODEL@METHOD on 16 × 256 tokens, not 128 × 512, and measure less: provisional."
        ),
    ] = False,
    output_json: Annotated[Path | None, typer.Option(help="Also write everything to this file.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page (.html) of every quantized model, layer by layer; takes a pass over each."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write every table as CSV, every figure as PNG here; likewise.")
    ] = None,
    loading: options.Loading,
    json: JsonFlag = False,
) -> None:
    """Compare models side by side: size, perplexity, divergence from the first, speed, and a verdict for each pair.

    All are in memory together; every window of text and every round of timing goes through all of them in turn.
    Intervals and p-values are a paired bootstrap over windows, fixed seed.

    Columns: perplexity, less is better; KL, how far the next token's distribution is from A's; top-1, how often the
    most likely token is the same as A's; prefill, tokens of a prompt per second; decode, generated tokens per second.

    Example: halfbyte compare sample:smollm2-135m sample:smollm2-135m@awq sample:smollm2-135m@awq-l2 --quick
    """
    settings = loading.settings()
    if output_json is not None:
        _check_writable(output_json)
    check_outputs(report, output_dir, option="--report")
    from halfbyte.evaluation.compare import compare

    comparison = compare(
        *models,
        data=data,
        window=window,
        n_samples=n_samples,
        skip_original=skip_original,
        skip_speed=skip_speed,
        quick=quick,
        **settings,
    )
    if output_json is not None:
        _write(output_json, comparison.to_dict())
    if not json:
        _print_comparison(comparison)
    written: dict[str, Any] = {}
    if report is not None or output_dir is not None:
        from halfbyte.report.build import build_report

        written = write_outputs(build_report(comparison=comparison, progress=not json), report, output_dir)
    if json:
        print_json({**comparison.to_dict(), **written})
    elif written:
        print_written(written)


def _check_writable(path: Path) -> None:
    """Before minutes of work, not after."""
    if path.is_dir():
        raise OutputError(f"--output-json {path}: is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--output-json {path}: {path.absolute().parent} is no folder; make it first")


def _write(path: Path, document: dict[str, Any]) -> None:
    from halfbyte.checkpoints.disk import replacing

    with replacing(path) as partial:
        partial.write_text(json_module.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _print_comparison(comparison: Comparison) -> None:
    from halfbyte.evaluation.comparison import table

    columns, rows = table(comparison)
    quality = [name for name in columns if name not in SIZES[1:]]
    for chosen in (SIZES, quality):
        picked = [[row[columns.index(name)] for name in chosen] for row in rows]
        kept = [index for index in range(len(chosen)) if any(row[index] != "–" for row in picked)]
        print_table([chosen[index] for index in kept], [[row[index] for index in kept] for row in picked])
    for verdict in comparison.verdicts:
        print(verdict)
    print()
    for line in _notes(comparison):
        print(line)


def _notes(comparison: Comparison) -> list[str]:
    text, tokens = comparison.text, sum(comparison.text["tokens"])
    notes = [f"text          {text['name']}: {tokens:,} tokens in {text['windows']} windows of {text['window']}"]
    if comparison.calibration is not None:
        blocks, length = comparison.calibration["max_calib_samples"], comparison.calibration["max_calib_seq_len"]
        notes.append(f"calibration   of what was quantized here: {blocks} × {length} tokens of the built-in text")
    if len(comparison.pairs) > 1:
        notes.append("p-values      each of its pair alone, not corrected for there being several")
    skipped = [side.label for side in comparison.sides if not side.measured]
    if skipped:
        notes.append(f"not loaded    {', '.join(skipped)} (--skip-original)")
    if any(side.name.startswith("sample:") and not side.quantized for side in comparison.sides):
        notes.append("original      the sample model was expanded from a 4-bit file: losses are against that")
    if comparison.provisional:
        less = "measures less" if comparison.calibration is None else "calibrates and measures less"
        notes.append(f"provisional   --quick {less}: repeat without it before deciding")
    return [*notes, f"time          {comparison.seconds:.0f} s"]
