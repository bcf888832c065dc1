"""`halfbyte inspect`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli import inspect_memory, inspect_pair
from halfbyte.cli.render import JsonFlag, interruptible, print_json

if TYPE_CHECKING:
    from halfbyte.quantization.discovery import Trial
    from halfbyte.quantization.inspection import BlockFolds

app = typer.Typer(
    help="Look into a model: what quantization did to it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.callback()
def _group() -> None:
    """Look into a model: what quantization did to its weights, and where its bytes are."""


def folds(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF file, sample:NAME or a hub name; not quantized.")],
    every_block: Annotated[bool, typer.Option("--all", help="Every block, not one of each structure.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show where scales can move through a model's blocks, found by experiment: what holds, what does not.

    Columns: whether it folds; how much random scales change the output of the block in fp64, about 1e-16 where the
    fold is exact (for what has no row that makes a column, how far the columns are from being proportional); what lies
    between: a norm, attention (value), a gated product or an activation.

    Example: halfbyte inspect folds sample:smollm2-135m
    """
    from halfbyte.quantization.inspection import inspect_folds

    found = inspect_folds(model, every_block=every_block, progress=not json)
    if json:
        print_json([block.to_dict() for block in found])
        return
    for block in found:
        _print_block(block)


def _print_block(block: BlockFolds) -> None:
    others = f", and {block.alike - 1} more blocks like it" if block.alike > 1 else ""
    print(f"{block.name} ({block.block_class}){others}")
    rows: dict[tuple[str, ...], list[float]] = {}
    for trial in sorted(block.discovery.trials, key=lambda trial: trial.fold is None):
        verdict = "yes" if trial.fold is not None else "no"
        row = (verdict, _kind(trial), f"{shorten([trial.producer])} → {shorten(trial.consumers)}", trial.reason)
        rows.setdefault(row, []).append(trial.deviation)
    for (verdict, kind, what, reason), deviations in rows.items():
        count = f" ({len(deviations)} of them)" if len(deviations) > 1 else ""
        print(f"  {verdict:<4}{max(deviations):<8.0e}{kind:<11}{what}{count}{': ' + reason if reason else ''}")
    for label, names in (
        ("in no fold", block.discovery.unscaled),
        ("not reached", block.discovery.unreached),
        ("never quantized", block.kept),
    ):
        if names:
            print(f"  {label}: {shorten(names)}")


def _kind(trial: Trial) -> str:
    return f"{trial.kind} 1+w" if trial.fold is not None and trial.fold.offset else trial.kind


def shorten(names: Sequence[str]) -> str:
    """Names in as few letters as tell them apart: * for the numbers of experts, a shared path only once."""
    shown: list[str] = []
    before = ""
    for name in dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names):
        path, _, leaf = name.rpartition(".")
        shown.append(leaf if shown and path == before else name)
        before = path
    return ", ".join(shown)


for _command, _summary in (
    (inspect_pair.layers, "How far every linear is from what it was."),
    (inspect_pair.rounding, "Which way weights were rounded, and how far."),
    (inspect_pair.channels, "The channels that matter, and what was done for them."),
    (inspect_pair.weights, "How weights are spread, errors, codes used."),
    (folds, "Where scales can move without changing the model."),
    (inspect_memory.memory, "Where the bytes are: in files, and when run."),
):
    app.command(_command.__name__, short_help=_summary)(interruptible(_command))
