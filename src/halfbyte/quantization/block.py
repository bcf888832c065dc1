"""One decoder block: statistics → scale → range → round.

The block arrives with its weights in fp32 and leaves with every fold applied in place; the quantized linears are
returned beside it. Its outputs are computed before any of that, so later blocks are calibrated on exact inputs; with
`QuantConfig.propagate` they are left to the caller, who has the block as it was quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from halfbyte.architectures.matrices import quantizable_matrices
from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.capture import Batch
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.discovery import Discovery, discover_folds
from halfbyte.quantization.report import LinearReport
from halfbyte.quantization.stages import SharedInput, choose_codes, make_grid, round_input, scale_inputs
from halfbyte.quantization.statistics import StatisticsCollector, SumsByBatch, sums_by_batch
from halfbyte.tensor import QuantizedTensor


@dataclass
class BlockResult:
    """Quantized linears of a block by their name inside it, what was measured, and what was refused."""

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def round_block(block: nn.Module, name: str, config: QuantConfig, widths: Mapping[str, int]) -> BlockResult:
    """Rounding to nearest, no calibration: the `rtn` method."""
    result = BlockResult()
    for local in quantizable_matrices(block):
        if not config.skips(f"{name}.{local}"):
            grid, weight = make_grid(config, widths.get(local)), weight_of(block, local)
            result.tensors[local], _ = choose_codes(weight, None, grid, config).tensors(slice(None), weight, grid)
            result.reports.append(LinearReport(f"{name}.{local}", bits=grid.bits))
    return result


@torch.no_grad()
def calibrate_block(
    block: nn.Module,
    index: int,
    name: str,
    batches: list[Batch],
    config: QuantConfig,
    dtype_on_disk: Callable[[str], torch.dtype],
    widths: Mapping[str, int],
    sums: SumsByBatch = sums_by_batch,
) -> BlockResult:
    """Quantize a block with activation statistics, and move `batches` on to the next one unless `config.propagate`.

    Args:
        block: with fp32 weights; folds are applied to it in place.
        index: which block it is.
        name: its dotted name in the model.
        batches: `hidden` is replaced by this block's output, or left as it is with `config.propagate`.
        config: group size resolved.
        dtype_on_disk: full name of a tensor → the dtype it is stored in if it is not quantized.
        widths: bits of matrices that differ from the config, by their names inside the block.
        sums: forms the sums of each batch with `config.propagate`.
    """
    result = BlockResult()
    for shared in scaled_inputs(block, index, name, batches, config, dtype_on_disk, widths, result, sums):
        for local, tensor, report in round_input(block, name, shared, config):
            result.tensors[local] = tensor
            result.reports.append(report)
    return result


@torch.no_grad()
def scaled_inputs(
    block: nn.Module,
    index: int,
    name: str,
    batches: list[Batch],
    config: QuantConfig,
    dtype_on_disk: Callable[[str], torch.dtype],
    widths: Mapping[str, int],
    result: BlockResult,
    sums: SumsByBatch = sums_by_batch,
) -> list[SharedInput]:
    """The block ready for rounding: statistics collected, folds applied. Arguments as for `calibrate_block`.

    `result` takes the warnings.
    """
    found = _usable_folds(block, index, name, batches[0], result)
    collector = StatisticsCollector(block, found.shared_inputs)
    if config.propagate:
        _sum_up(collector, index, batches, sums)
    else:
        _run_through(collector, index, batches)
    statistics = collector.statistics
    unseen = [local for seen in statistics.values() if not seen.tokens for local in seen.linears]
    if unseen:
        result.warnings.append(f"{name}: no calibration token reaches {', '.join(unseen)}; rounded to nearest")
    inputs = {
        shared: SharedInput.measure(block, name, shared, statistics[shared[0]], config, widths)
        for shared in found.shared_inputs
    }
    result.warnings += [warning for shared in inputs.values() for warning in shared.warnings(name)]
    # Every fold is applied before anything is rounded: the producer of a later fold (v, up) is a consumer of an
    # earlier one, and its rows must have their final scale when its codes are chosen.
    for fold in found.folds if config.scale else ():
        fed = [inputs[shared] for shared in found.shared_inputs if set(shared) & set(fold.consumers)]
        scale_inputs(block, fold, fed, config, dtype_on_disk(f"{name}.{fold.producer}.weight"))
    return list(inputs.values())


def _sum_up(collector: StatisticsCollector, index: int, batches: list[Batch], sums: SumsByBatch) -> None:
    """Add up the sums of each batch in order, so that they are the same to the bit wherever each was formed."""
    inputs = ((batch.hidden, batch.kwargs[index], batch.counts) for batch in batches)
    for part in sums(collector.block, collector.shared_inputs, inputs):
        collector.merge(part)
        del part  # before the next one needs the room
    collector.finish()


def _run_through(collector: StatisticsCollector, index: int, batches: list[Batch]) -> None:
    """Collect, and move the batches on."""
    outputs = collector.run((batch.hidden, batch.kwargs[index], batch.counts) for batch in batches)
    # Lazily paired: each batch's input is dropped as soon as its output is there.
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
        batch.kwargs[index] = {}


def _usable_folds(block: nn.Module, index: int, name: str, batch: Batch, result: BlockResult) -> Discovery:
    """Folds that were proven, and what shares an input. A consumer left in 16 bit is rescaled all the same."""
    found = discover_folds(block, batch.hidden, batch.kwargs[index])
    for trial in found.trials:
        if trial.fold is None and trial.kind == "norm":
            result.warnings.append(
                f"{name}: scaling {trial.producer} → {', '.join(trial.consumers)}: {trial.reason}; "
                f"those linears are quantized unscaled"
            )
    return found
