"""`halfbyte quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.render import JsonFlag, megabytes, print_json, print_table
from halfbyte.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="A folder, sample:NAME, or a hub name (organisation/name).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the new checkpoint.")],
    method: Annotated[str, typer.Option(help="awq, or rtn (round to nearest, no calibration).")] = "awq",
    bits: Annotated[int, typer.Option(help="Bits per weight.")] = 4,
    group_size: Annotated[
        str, typer.Option(help="Inputs that share a scale: auto, a number, or -1 for whole rows.")
    ] = "auto",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="A symmetric grid, without zero points.")] = False,
    no_clip: Annotated[bool, typer.Option("--no-clip", help="Skip the clip search.")] = False,
    duo_scaling: Annotated[str, typer.Option(help="Candidate scales: both, yes (x/w) or no (x alone).")] = "both",
    n_grid: Annotated[int, typer.Option(help="Steps of the scale search.")] = 20,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="Part of a module name to leave in 16 bit; repeatable.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="builtin (prose that ships with Python) or a UTF-8 text file.")
    ] = "builtin",
    max_calib_samples: Annotated[int, typer.Option(help="Blocks of calibration text at most.")] = 128,
    max_calib_seq_len: Annotated[int, typer.Option(help="Tokens in a block at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Which blocks are kept when the text has more.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, or several GPUs: cuda:0,cuda:1.")] = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(help="Peak memory, such as 2GB or 800MiB; what does not fit goes to disk.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Search blocks on a Ray cluster: local, auto, or its address.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    json: JsonFlag = False,
) -> None:
    """Quantize a model to 4 bits and save it as an AutoAWQ GEMM checkpoint.

    Example: halfbyte quantize sample:smollm2-135m -o smollm2-4bit --group-size 64
    """
    from halfbyte.quantization.config import QuantConfig

    config = QuantConfig(
        method=method,
        bits=bits,
        group_size=_parse_group_size(group_size),
        zero_point=not symmetric,
        n_grid=n_grid,
        duo_scaling=_parse_duo_scaling(duo_scaling),
        clip=not no_clip,
        modules_to_not_convert=tuple(skip or ()),
    )
    from halfbyte.quantization.pipeline import quantize

    report = quantize(
        model,
        output,
        config,
        calibration=calibration,
        max_calib_samples=max_calib_samples,
        max_calib_seq_len=max_calib_seq_len,
        seed=seed,
        device=device,
        memory_budget=memory_budget,
        ray=ray,
        overwrite=overwrite,
    )
    if json:
        print_json(report.to_dict())
    else:
        _print_report(report)


def _parse_group_size(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--group-size {text}: expected auto, a number, or -1 for whole rows") from None


def _parse_duo_scaling(text: str) -> Any:
    try:
        return {"both": "both", "yes": True, "no": False}[text]
    except KeyError:
        raise ConfigError(f"--duo-scaling {text}: expected both, yes or no") from None


def _print_report(report: Any) -> None:
    grouped: dict[str, list[Any]] = {}
    for linear in report.linears:
        grouped.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    if report.calibration:
        rows = []
        for name, linears in grouped.items():
            before = sum(linear.relative_error_rtn for linear in linears) / len(linears)
            after = sum(linear.relative_error for linear in linears) / len(linears)
            clipped = sum(linear.clipped_share for linear in linears) / len(linears)
            rows.append((name, len(linears), f"{before:.3%}", f"{after:.3%}", f"{clipped:.0%}"))
        columns = ("linear", "count", "error, rounded to nearest", "error now", "groups clipped")
        print_table(columns, rows, "Mean squared error of the outputs over calibration, relative to their energy")
        used = report.calibration
        print(f"calibration   {used['source']}: {used['blocks']} blocks, {used['tokens']:,} tokens")
    for warning in report.warnings:
        print(f"warning       {warning}")
    print(f"decoder       {megabytes(report.block_bytes_before)} → {megabytes(report.block_bytes_after)}")
    print(f"whole model   {megabytes(report.total_bytes_before)} → {megabytes(report.total_bytes_after)}")
    print(f"bits/weight   {report.bits_per_weight:.2f} in the decoder, group size {report.config.group_size}")
    print(f"time, memory  {report.seconds:.0f} s, {megabytes(report.peak_memory_bytes)} at the peak")
    print(f"saved to      {report.output_dir}")
