"""`halfbyte profile`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.render import JsonFlag, megabytes, print_json, print_table
from halfbyte.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.evaluation.profile_result import Profile


def command(
    more_batch_sizes: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    model_dim: Annotated[
        int | None, typer.Option(help="D: four D × D linears and an MLP of D → 4D → D; 2048 without --model.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The shapes of a model instead, such as llama-3-8b, qwen2.5-7b or smollm2-135m.")
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Rows of activations, separated by spaces or commas; 1 2 4 8 16 32 64 if not said."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Of the CPU; HALFBYTE_THREADS or all cores if not said.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; the largest of 128, 64 and 32 that fits if not said.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="To take the median of, at most; a slow cell has fewer.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Batch sizes 1 4 16 64 and few rounds: within a minute.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show each linear, not only the block.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write performance_results.csv and three PNGs here; made if it is not there.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Time the linears of a decoder block in 16 bit and in 4, and hold them against the machine's roofline.

    bf16 and torch-bf16 are halfbyte's and torch's products in 16 bit; int4-a16 multiplies 4-bit weights by activations
    in fp32, int4-a8 by activations in 8 bits. Speed-up and memory saved are against the fastest in 16 bit. Each has
    several copies of the weights, so that they come from memory and not from a cache, as in a model.

    Example: halfbyte profile --model-dim 2048 --batch-sizes 1 2 4 8 --output-dir profile
    """
    sizes = _batch_sizes(batch_sizes, more_batch_sizes or [])
    from halfbyte.evaluation.profile import profile
    from halfbyte.report.profile import check_folder, write_pictures, write_table

    if output_dir is not None:
        check_folder(output_dir)
    found = profile(
        model=model,
        model_dim=model_dim,
        batch_sizes=sizes,
        device=device,
        threads=threads,
        group_size=group_size,
        rounds=rounds,
        quick=quick,
        progress=not json,
    )
    written, missing = [], None
    if output_dir is not None:
        written.append(write_table(found, output_dir))
        try:
            written += write_pictures(found, output_dir)
        except UnsupportedError as error:
            missing = str(error)
    if json:
        print_json({**found.to_dict(), "files": [str(path) for path in written], "no_pictures": missing})
        return
    _print(found, layers)
    if written:
        print(f"written: {', '.join(map(str, written))}")
    if missing is not None:
        print(f"no pictures: {missing}")


def _batch_sizes(first: str | None, more: Sequence[str]) -> list[int] | None:
    """Of `--batch-sizes 1 2 4` typer takes the first number for the option's, the others for arguments."""
    if first is None:
        if more:
            raise ConfigError(f"{more[0]}: profile takes no arguments; did you mean --batch-sizes or --model?")
        return None
    parts = " ".join([first, *more]).replace(",", " ").split()
    if not parts or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(f"--batch-sizes {' '.join([first, *more])}: expected whole numbers from 1 on")
    return [int(part) for part in parts]


def _print(found: Profile, layers: bool) -> None:
    from halfbyte.evaluation.profile_result import COLUMNS, cells

    where = found.machine if found.threads is None else f"{found.machine}, {found.tier}, {found.threads} threads"
    settings = f"group size {found.group_size}"
    if layers:
        for name in dict.fromkeys(row.layer for row in found.rows):
            rows = [row for row in found.rows if row.layer == name]
            if rows[0].out_features is not None:
                shape = f"{rows[0].out_features:,} × {rows[0].in_features:,}"
                print_table(COLUMNS, map(cells, rows), f"{name} ({shape}, {rows[0].count} in a block)")
    title = f"{found.subject}: all linears of a decoder block; {where}; {settings}"
    print_table(COLUMNS, map(cells, found.block), title)
    print(_footer(found))


def _footer(found: Profile) -> str:
    block = found.block
    bandwidth = statistics.median(row.bandwidth for row in found.rows)
    peak = statistics.median(row.peak_flops for row in found.rows)
    kind = "fp32 multiply-adds" if found.threads is not None else "a large bf16 product"
    lines = [
        f"roofline: share of what memory ({bandwidth / 1e9:.1f} GB/s) and {kind} ({peak / 1e12:.3g} TFLOP/s) allow, "
        "measured in this run" + ("; 8-bit arithmetic can exceed it" if found.threads is not None else ""),
        f"weights: copies of {2 * found.cache_bytes / 1e6:,.0f} MB together or more, twice the last-level cache; "
        f"a block has {megabytes(max(row.weight_bytes for row in block))} in 16 bit and "
        f"{megabytes(min(row.weight_bytes for row in block))} in 4",
    ]
    if found.blocks is not None:
        best = {
            bits: max((r for r in block if r.bits == bits), key=lambda r: (-r.batch_size, r.speedup))
            for bits in (16, 4)
        }
        rates = {bits: row.tokens_per_second / found.blocks for bits, row in best.items()}
        lines.append(
            f"all {found.blocks} blocks at batch {best[4].batch_size}: at most {rates[4]:,.1f} tokens/s in 4 bits, "
            f"{rates[16]:,.1f} in 16; attention, norms and the output head come on top"
        )
    return "\n".join(lines)
