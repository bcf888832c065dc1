"""`halfbyte inspect memory`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.checkpoints.disk import write_csv
from halfbyte.cli.render import JsonFlag, megabytes, print_json, print_table

if TYPE_CHECKING:
    from halfbyte.analysis.memory import MemoryEntry, MemoryMap


def memory(
    model: Annotated[
        str, typer.Argument(help="A folder, sample:NAME or a hub name, quantized or not; or MODEL@METHOD.")
    ],
    no_load: Annotated[
        bool, typer.Option("--no-load", help="Read the files' headers alone; what is held at run time stays unknown.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file, too, in bytes.")] = None,
    json: JsonFlag = False,
) -> None:
    """Show where a model's bytes are: in the files, held at run time, and what 16 bits would take.

    Example: halfbyte inspect memory smollm2-4bit
    """
    from dataclasses import asdict

    from halfbyte.analysis.memory import memory_map

    found = memory_map(model, run_time=not no_load, progress=not json)
    if csv is not None:
        write_csv(csv, [asdict(entry) for entry in (*found.entries, *found.parts, found.total)])
    if json:
        print_json(found.to_dict())
        return
    _print(found)


def _print(found: MemoryMap) -> None:
    rows: list[list[str]] = []
    for entry in found.entries:
        rows.append(_row(entry, found))
        if entry.kind == found.entries[0].kind:
            rows += [_row(part, found, indent="  ") for part in found.parts]
    rows.append(_row(found.total, found))
    columns = ["", "weights", "on disk", "bits each", "held", "in 16 bits"]
    print_table(columns, rows)
    if found.engine is not None:
        how = "" if found.head_bits is None else f", output head in {found.head_bits} bits"
        print(f"Held: at run time by the {found.engine}{how}, before any text.")
    if found.cache_bytes_per_token is not None:
        each = found.cache_bytes_per_token
        whole = megabytes((found.total.run_time_bytes or 0) + 2048 * each)
        print(f"Keys and values take {each / 1e3:,.1f} kB for each token: with a context of 2,048, {whole} in all.")
    total = found.total
    assert total.half_bytes is not None
    if total.disk_bytes == total.half_bytes:
        return
    print(f"On disk {total.half_bytes / total.disk_bytes:.2f} times smaller than in 16 bits", end="")
    print("." if total.run_time_bytes is None else f", in memory {total.half_bytes / total.run_time_bytes:.2f} times.")


def _row(entry: MemoryEntry, found: MemoryMap, indent: str = "") -> list[str]:
    numbers = [megabytes(n) if n is not None else "" for n in (entry.run_time_bytes, entry.half_bytes)]
    per_weight = entry.weights or (found.entries[0].weights if indent else 0)
    bits = f"{8 * entry.disk_bytes / per_weight:.3f}" if per_weight else ""
    weights = f"{entry.weights / 1e6:,.2f} M" if entry.weights else ""
    if not entry.weights and not indent and entry.run_time_bytes is not None:  # a head that is the embedding on disk
        return [f"{entry.kind}, tied", "", "-", "", numbers[0], "-"]
    return [indent + entry.kind, weights, megabytes(entry.disk_bytes), bits, *numbers]
