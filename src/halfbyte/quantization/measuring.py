"""The first pass of a bit budget: what each width would cost each matrix.

An error is what `relative_error` of the report will be, E‖ΔW x‖² / E‖W x‖², after the stages the config asks for, on a
few hundred evenly spaced rows of each matrix. The full range alone would overstate narrow widths, which gain most from
the range search. Scales are searched at 4 bits, now and in the second pass, so that what was measured is what will be:
searching them again for the chosen widths made the sum of the errors larger in a test. An error is weighted by the
share of the tokens that reach the matrix, so that an expert counts as often as it is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import quantizable_matrices
from halfbyte.architectures.skeleton import weight_of
from halfbyte.checkpoints.journal import Journal
from halfbyte.progress import Ticker
from halfbyte.quantization.block import BlockResult, scaled_inputs
from halfbyte.quantization.config import BITS, QuantConfig
from halfbyte.quantization.scaling import sample_rows
from halfbyte.quantization.stages import RelativeError, SharedInput, choose_codes, make_grid
from halfbyte.quantization.states import States
from halfbyte.quantization.task import BlockTask, advance


def measure_blocks(
    journal: Journal,
    blocks: int,
    filled: Callable[[int], AbstractContextManager[nn.Module]],
    task: Callable[[nn.Module, int, States], BlockTask],
    states: States,
    ticker: Ticker,
) -> None:
    """Measure every block the journal has no errors of, one in memory at a time, and keep them there.

    Args:
        journal: begun.
        blocks: how many there are.
        filled: the block with its weights, for a while.
        task: what is to be done with it.
        states: what goes into the first block; empty without calibration.
        ticker: receives progress.
    """
    for index in range(blocks):
        if all(later in journal.measured for later in range(index, blocks)):
            break
        ticker.describe(f"Measuring block {index + 1} of {blocks}")
        with filled(index) as block:
            if index in journal.measured:
                advance(block, index, states.batches)
            else:
                journal.measure(index, measure_block(task(block, index, states)))
                ticker.advance()
        states.step += 1
        states.forget_earlier()
    # The second pass begins anew, and its hidden states need the room.
    states.step = blocks + 1
    states.forget_earlier()


def errors_by_name(journal: Journal, blocks_name: str) -> dict[str, list[float]]:
    """The errors of all matrices for each of `BITS`, by their full names: `blocks_name` is the list of blocks."""
    return {
        f"{blocks_name}.{index}.{local}": errors
        for index, document in sorted(journal.measured.items())
        for local, errors in document["errors"].items()
    }


def measure_block(task: BlockTask) -> dict[str, Any]:
    """Errors of each matrix of a block for each of `BITS`, by its name inside the block, and the seconds it took.

    The folds are applied to the block, which is then of no further use. The hidden states are moved on through it as it
    was, with `propagate` too: no width is chosen yet that it could be quantized to.
    """
    started = time.monotonic()
    config = replace(task.config, propagate=False)
    errors: dict[str, list[float]] = {}
    if task.batches:
        # Warnings are the second pass's to give.
        inputs = scaled_inputs(
            task.block, task.index, task.name, task.batches, config, task.dtype_on_disk, {}, BlockResult()
        )
        reached = max((shared.statistics.tokens for shared in inputs), default=0)
        for shared in inputs:
            share = max(shared.statistics.tokens, 1) / max(reached, 1)
            errors.update(_errors_of_input(task.block, shared, config, share))
    else:
        for local in quantizable_matrices(task.block):
            if not config.skips(f"{task.name}.{local}"):
                errors.update(_errors(task.block, (local,), None, config, 1.0))
    return {"errors": errors, "seconds": time.monotonic() - started}


def _errors_of_input(
    block: nn.Module, shared: SharedInput, config: QuantConfig, share: float
) -> Iterator[tuple[str, list[float]]]:
    gram = shared.gram
    if not gram.any():  # no token came: nothing is known but the weights, and 2 bits would be a guess like any other
        gram = torch.eye(gram.shape[0], device=gram.device)
    return _errors(block, shared.names, gram, config, share)


@torch.no_grad()
def _errors(
    block: nn.Module, names: tuple[str, ...], gram: torch.Tensor | None, config: QuantConfig, share: float
) -> Iterator[tuple[str, list[float]]]:
    """Name and weighted errors of matrices that share an input; without `gram` every channel is as large."""
    if not names:
        return
    rows = [sample_rows(weight_of(block, local)) for local in names]
    known = torch.eye(rows[0].shape[1], device=rows[0].device) if gram is None else gram
    relative = [RelativeError(part, known) for part in rows]
    found: list[list[float]] = [[] for _ in names]
    for bits in BITS:
        grid = make_grid(config, bits)
        rounded = choose_codes(torch.cat(rows), gram, grid, config)
        start = 0
        for part, error, errors in zip(rows, relative, found, strict=True):
            place = slice(start, start + len(part))
            start = place.stop
            stored, _ = rounded.tensors(place, part, grid)
            errors.append(share * error(stored.dequantize()))
    yield from zip(names, found, strict=True)
