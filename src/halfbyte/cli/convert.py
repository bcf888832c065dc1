"""`halfbyte convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.render import JsonFlag, megabytes, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.conversion.result import Conversion


def command(
    model: Annotated[
        str, typer.Argument(help="A quantized checkpoint: a folder, a GGUF file, a hub name, or MODEL@METHOD.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the new checkpoint; for gguf the file, such as x.gguf.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="gemm, gemv, gemv_fast, llm-awq, marlin, compressed-tensors, gptq or native; gguf: a file for "
            "llama.cpp; or safetensors: any model, its tensors as they are, in new shards.",
        ),
    ],
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Where a layout has fp16 scales and integer zero points and a weight others: round, show the error.",
        ),
    ] = False,
    from_pickle: Annotated[
        bool,
        typer.Option(
            "--from-pickle", help="With --format safetensors: read pytorch_model.bin, without running what it holds."
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="A file at most, such as 5GB or 800MiB.")] = "2GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    json: JsonFlag = False,
) -> None:
    """Write a quantized checkpoint in another layout: the same codes, or a refusal that says which layouts hold them.

    Each linear is read back from what was packed and compared with what it was. Everything else stays byte for byte.

    Example: halfbyte convert smollm2-4bit smollm2-gptq --format gptq
    """
    if from_pickle and layout != "safetensors":
        raise ConfigError("--from-pickle: goes with --format safetensors; convert to another layout what comes of that")
    if layout == "gguf":
        if requantize:
            raise ConfigError("--format gguf: takes no --requantize")
        _write_gguf(model, output, overwrite, json)
        return
    from halfbyte import convert
    from halfbyte.conversion.targets import FORMATS

    if layout not in FORMATS:
        raise ConfigError(f"--format {layout}: expected {', '.join(FORMATS)}, gguf")
    found = convert(
        model,
        output,
        layout,
        requantize=requantize,
        from_pickle=from_pickle,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    if json:
        print_json(found.to_dict())
    else:
        _print(found)


def _write_gguf(model: str, output: Path, overwrite: bool, json: bool) -> None:
    from halfbyte.conversion.gguf_file import export_gguf

    found = export_gguf(model, output, overwrite=overwrite, progress=not json)
    if json:
        print_json(found.to_dict())
        return
    for kind, count in found.blocks.items():
        exact = "codes and scales unchanged"
        if kind == "Q4_1":
            exact += f"; minima rounded to fp16, which moves no linear by more than {found.largest_error:.2%}"
        print(f"{kind:<13} {count} linears, {exact}")
    print(f"saved to      {found.path} ({megabytes(found.nbytes)}, architecture {found.architecture})")


def _print(found: Conversion) -> None:
    if found.linears:
        columns, rows = found.table()
        print_table(columns, rows, f"Quantized linears, {found.source_format} → {found.format}, as both are read back")
    print(f"other tensors {found.copied}, byte for byte as they were")
    if found.dropped:
        print(f"left out      {', '.join(found.dropped)}: the config ties it to a tensor that is there")
    files = "1 file" if found.shards == 1 else f"{found.shards} files"
    print(f"whole model   {megabytes(found.bytes_before)} → {megabytes(found.bytes_after)} in {files}")
    print(f"saved to      {found.output_dir}")
