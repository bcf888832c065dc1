"""`halfbyte quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.render import JsonFlag, megabytes, name_options, print_json, print_table
from halfbyte.errors import ConfigError


def command(
    model: Annotated[
        str, typer.Argument(help="A folder, a GGUF file, sample:NAME, or a hub name (organisation/name).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the new checkpoint.")],
    method: Annotated[
        str, typer.Option(help="rtn (no calibration: seconds), awq, awq-l2, gptq, or best (slowest, closest).")
    ] = "awq",
    quick: Annotated[
        bool, typer.Option("--quick", help="Calibrate on 16 × 256 tokens, not 128 × 512: a first look.")
    ] = False,
    bits: Annotated[int, typer.Option(help="Bits per weight: 2, 3, 4 or 8.")] = 4,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Stored bits per weight at most, such as 4.25: each matrix gets 2, 3, 4 or 8 bits."),
    ] = None,
    group_size: Annotated[
        str, typer.Option(help="Inputs that share a scale: auto, a number, or -1 for whole rows.")
    ] = "auto",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="A symmetric grid, without zero points.")] = False,
    no_scale: Annotated[bool, typer.Option("--no-scale", help="Skip the scale search.")] = False,
    no_clip: Annotated[bool, typer.Option("--no-clip", help="Skip the range search.")] = False,
    importance: Annotated[
        str | None, typer.Option(help="Of a channel in the scale search: l1 for E|x|, l2 for E[x²]; else the method's.")
    ] = None,
    rounding: Annotated[str | None, typer.Option(help="nearest or compensated; else the method's.")] = None,
    sweeps: Annotated[
        int | None, typer.Option(help="Sweeps of coordinate descent after compensated rounding; else the method's.")
    ] = None,
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the input channels, the most salient, that stays in 16 bit.")
    ] = 0.0,
    propagate: Annotated[
        bool, typer.Option("--propagate", help="Calibrate each block behind the quantized ones before it.")
    ] = False,
    layout: Annotated[
        str, typer.Option("--format", help="gemm (AutoAWQ's layout), native (holds everything), or auto.")
    ] = "auto",
    duo_scaling: Annotated[str, typer.Option(help="Candidate scales: both, yes (x/w) or no (x alone).")] = "both",
    n_grid: Annotated[int, typer.Option(help="Steps of the scale search.")] = 20,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="Part of a module name to leave in 16 bit; repeatable.")
    ] = None,
    tp_align: Annotated[
        int,
        typer.Option(
            help="GPUs that will share the model (vLLM's tensor parallelism): widen MLPs with zeros until each has "
            "whole groups and tiles. The model computes the same."
        ),
    ] = 0,
    keep_lm_head: Annotated[
        bool,
        typer.Option(
            "--keep-lm-head",
            hidden=True,
            help="Leave the output head in 16 bit. It always is: AWQ has no layout for a quantized one. "
            "To run it in fewer bits, see --head-bits of halfbyte eval.",
        ),
    ] = True,
    calibration: Annotated[
        str,
        typer.Option(
            help="builtin (prose that ships with Python); self (the model writes it); a UTF-8 text file; a JSONL file "
            "of strings, objects or conversations, as FILE.jsonl:FIELD for a field other than text or messages; or a "
            "data set: wikitext2, c4, pileval, ultrachat, NAME:CONFIG:SPLIT:FIELD (pip install datasets)."
        ),
    ] = "builtin",
    all_turns: Annotated[
        bool, typer.Option("--all-turns", help="In conversations, count every token, not just the assistant's.")
    ] = False,
    max_calib_samples: Annotated[
        int | None, typer.Option(help="Blocks of calibration text at most; 128 if not given.")
    ] = None,
    max_calib_seq_len: Annotated[int | None, typer.Option(help="Tokens in a block at most; 512 if not given.")] = None,
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
    """Quantize a model; save it as an AutoAWQ GEMM checkpoint, or in halfbyte's own layout where that cannot hold it.

    Ctrl-C keeps the blocks that are finished; the same command goes on.

    Example: halfbyte quantize sample:smollm2-135m -o smollm2-4bit --group-size 64
    """
    from halfbyte.quantization.config import QuantConfig

    config = QuantConfig(
        method=method,
        bits=bits,
        target_bits=target_bits,
        group_size=_parse_group_size(group_size),
        zero_point=not symmetric,
        n_grid=n_grid,
        duo_scaling=_parse_duo_scaling(duo_scaling),
        scale=False if no_scale else None,
        importance=_choice("--importance", importance, ("l1", "l2")),
        clip=False if no_clip else None,
        rounding=_choice("--rounding", rounding, ("nearest", "compensated")),
        sweeps=sweeps,
        keep_ratio=keep_ratio,
        propagate=propagate,
        format=_choice("--format", layout, ("auto", "gemm", "native")),
        modules_to_not_convert=tuple(skip or ()),
        tp_align=tp_align,
    )
    if max_calib_samples is None:
        max_calib_samples = 16 if quick else 128
    if max_calib_seq_len is None:
        max_calib_seq_len = 256 if quick else 512
    from halfbyte import quantize
    from halfbyte.quantization.on_the_fly import parse_copy_request

    copy = parse_copy_request(model)
    if copy is not None:
        raise ConfigError(
            f"{model}: quantize takes the 16-bit model; try: halfbyte quantize {copy.model} -o {output} "
            f"--method {copy.config.method}"
        )
    from halfbyte.quantization.calibration import read_documents

    text: Any = (
        read_documents(calibration, assistant_only=False) if all_turns and calibration != "self" else calibration
    )
    report = quantize(
        model,
        output,
        config,
        calibration=text,
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


def _counted(used: dict[str, Any]) -> str:
    """What of the text does not count, if anything."""
    parts = []
    if used["counted_tokens"] != used["tokens"]:
        parts.append(f"{used['counted_tokens']:,} of them the assistant's")
    if used["skipped_documents"]:
        parts.append(f"{used['skipped_documents']} documents too short")
    return "".join(f", {part}" for part in parts)


def _choice(flag: str, text: str | None, choices: tuple[str, ...]) -> Any:
    if text is not None and text not in choices:
        raise ConfigError(f"{flag} {text}: expected one of {', '.join(choices)}")
    return text


def _parse_duo_scaling(text: str) -> Any:
    try:
        return {"both": "both", "yes": True, "no": False}[text]
    except KeyError:
        raise ConfigError(f"--duo-scaling {text}: expected both, yes or no") from None


def _print_report(report: Any) -> None:
    from halfbyte.quantization.report import table

    columns, rows = table(report)
    if report.calibration:
        print_table(columns, rows, "Mean squared error of the outputs over calibration, relative to their energy")
        used = report.calibration
        print(f"calibration   {used['source']}: {used['blocks']} blocks, {used['tokens']:,} tokens{_counted(used)}")
    elif len(columns) > 2:
        print_table(columns, rows, "Bits of a code")
    for warning in report.warnings:
        print(f"warning       {name_options(warning, command, {})}")
    print(f"blocks        {megabytes(report.block_bytes_before)} → {megabytes(report.block_bytes_after)}")
    rest = megabytes(report.total_bytes_after - report.block_bytes_after)
    print(f"whole model   {megabytes(report.total_bytes_before)} → {megabytes(report.total_bytes_after)}")
    print(f"              {rest} of it, the embedding and what else is outside the blocks, stay as they were")
    print(f"bits/weight   {report.bits_per_weight:.2f} in the blocks, group size {report.config.group_size}")
    if report.config.target_bits is not None:
        allowed = f"{report.config.target_bits:g} allowed"
        print(f"bit budget    {report.stored_bits:.4f} stored bits per quantized weight, {allowed}")
    print(f"time, memory  {report.seconds:.0f} s, {megabytes(report.peak_memory_bytes)} at the peak")
    print(f"saved to      {report.output_dir}")
    print(f"next          halfbyte compare {report.model} {report.output_dir} --quick")
