"""`halfbyte verify`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.render import JsonFlag, print_json, print_table
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.conversion.verification import Verification

# Lines of each check; --json has them all.
SHOWN = 20


def command(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, sample:NAME or a hub name; quantized or not.")],
    engine: Annotated[
        list[str] | None,
        typer.Option("--for", help="Also by the rules of vllm, sglang, transformers or autoawq; repeatable."),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tp", help="With --for vllm or sglang: GPUs that each linear is to be split over.")
    ] = 1,
    json: JsonFlag = False,
) -> None:
    """Read a whole checkpoint and check it: files, index, names, shapes, every number, linears, tokenizer, hashes.

    Exits with code 1 if there is a problem, with code 2 if MODEL is none. With --for, a layer that the engine would not
    load is a problem, one that it would run on a slower kernel is noted.

    Example: halfbyte verify smollm2-4bit --for vllm --tp 2
    """
    from halfbyte import verify

    if tensor_parallel < 1:
        raise ConfigError(f"--tp: expected at least 1, got {tensor_parallel}")
    if tensor_parallel > 1 and not engine:
        raise ConfigError(f"--tp {tensor_parallel}: only with --for vllm or --for sglang, which split linears")
    found = verify(model, engines=engine or (), tensor_parallel=tensor_parallel, progress=not json)
    if json:
        print_json(found.to_dict())
    else:
        _print(found)
    if found.problems:
        raise SystemExit(1)


def _print(found: Verification) -> None:
    columns, rows = found.table()
    print_table(columns, rows)
    for check in found.checks:
        for kind, lines in (("problem", check.problems), ("note", check.notes)):
            shown = _alike(lines)
            for line in shown[:SHOWN]:
                print(f"{kind:<9}{line}")
            if len(shown) > SHOWN:
                print(f"{kind:<9}… and {len(shown) - SHOWN} more of {check.name}; --json has them all")
    print(found.count)


def _alike(lines: list[str]) -> list[str]:
    """One line for those that differ in the number of their layer alone."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", line), []).append(line)
    return [same[0] if len(same) == 1 else f"{kind} ({len(same)} of them)" for kind, same in kinds.items()]
