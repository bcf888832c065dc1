"""One decoder block: statistics → scale → clip → round.

The block arrives with its weights in fp32 and leaves with every fold applied in place; the quantized linears are
returned beside it. Its outputs are computed before any of that, so later blocks are calibrated on exact inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.matrices import quantizable_matrices
from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.capture import Batch
from halfbyte.quantization.clipping import search_clip
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.discovery import Discovery, discover_folds
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.report import LinearReport
from halfbyte.quantization.scaling import gram_error, search_scales
from halfbyte.quantization.statistics import InputStatistics, StatisticsCollector
from halfbyte.tensor import QuantizedTensor


@dataclass
class BlockResult:
    """Quantized linears of a block by their name inside it, what was measured, and what was refused."""

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def round_block(block: nn.Module, name: str, config: QuantConfig) -> BlockResult:
    """Rounding to nearest, no calibration: the `rtn` method."""
    result = BlockResult()
    for local in quantizable_matrices(block):
        if not config.skips(f"{name}.{local}"):
            result.tensors[local] = make_grid(config).quantize(weight_of(block, local))
            result.reports.append(LinearReport(f"{name}.{local}"))
    return result


@torch.no_grad()
def calibrate_block(
    block: nn.Module,
    index: int,
    name: str,
    batches: list[Batch],
    model_config: Any,
    config: QuantConfig,
    dtype_on_disk: Callable[[str], torch.dtype],
) -> BlockResult:
    """Quantize a block with activation statistics, and move `batches` on to the next one.

    Args:
        block: with fp32 weights; folds are applied to it in place.
        index: which block it is.
        name: its dotted name in the model.
        batches: `hidden` is replaced by this block's output.
        model_config: the Hugging Face config.
        config: group size resolved.
        dtype_on_disk: full name of a tensor → the dtype it is stored in if it is not quantized.
    """
    result = BlockResult()
    found = _usable_folds(block, index, name, batches[0], result)
    statistics = _collect(block, name, index, batches, found.shared_inputs, result)
    inputs = {
        shared: _measure_shared_input(block, name, shared, statistics[shared[0]], config)
        for shared in found.shared_inputs
    }
    # Every fold is applied before anything is rounded: the producer of a later fold (v, up) is a consumer of an
    # earlier one, and its rows must have their final scale when its codes are chosen.
    for fold in found.folds:
        fed = [shared for shared in found.shared_inputs if set(shared) & set(fold.consumers)]
        _scale_inputs(block, name, fold, fed, inputs, statistics, config, dtype_on_disk)
    for scaled in inputs.values():
        _round_shared_input(block, name, scaled, config, result)
    return result


def _collect(
    block: nn.Module,
    name: str,
    index: int,
    batches: list[Batch],
    shared_inputs: list[tuple[str, ...]],
    result: BlockResult,
) -> dict[str, InputStatistics]:
    collector = StatisticsCollector(block, shared_inputs)
    outputs = collector.run((batch.hidden, batch.kwargs[index]) for batch in batches)
    # Lazily paired: each batch's input is dropped as soon as its output is there.
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
        batch.kwargs[index] = {}
    unseen = [local for found in collector.statistics.values() if not found.tokens for local in found.linears]
    if unseen:
        result.warnings.append(f"{name}: no calibration token reaches {', '.join(unseen)}; rounded to nearest")
    return collector.statistics


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


@dataclass(frozen=True)
class _ScaledInput:
    """The linears that share one input, after its scale was chosen.

    Attributes:
        names: of the linears to round, inside the block.
        gram: of the input they see now.
        label: of the scale in effect.
        energy: E‖W x‖² of each linear.
        rtn_errors: E‖ΔW x‖² of each, rounded to nearest without scaling.
    """

    names: tuple[str, ...]
    gram: torch.Tensor
    label: str
    energy: dict[str, float]
    rtn_errors: dict[str, float]


def _measure_shared_input(
    block: nn.Module, name: str, shared: tuple[str, ...], statistics: InputStatistics, config: QuantConfig
) -> _ScaledInput:
    """What rounding to nearest would cost, before any fold is applied."""
    grid, gram = make_grid(config), statistics.gram
    quantizable = quantizable_matrices(block)
    names = tuple(local for local in shared if local in quantizable and not config.skips(f"{name}.{local}"))
    weights = {local: weight_of(block, local) for local in names}
    energy = {local: float(gram_error(weight, gram)) for local, weight in weights.items()}
    rtn_errors = {
        local: float(gram_error(grid.fake_quantize(weight) - weight, gram)) for local, weight in weights.items()
    }
    return _ScaledInput(names, gram, "none", energy, rtn_errors)


def _scale_inputs(
    block: nn.Module,
    name: str,
    fold: Fold,
    fed: list[tuple[str, ...]],
    inputs: dict[tuple[str, ...], _ScaledInput],
    statistics: dict[str, InputStatistics],
    config: QuantConfig,
    dtype_on_disk: Callable[[str], torch.dtype],
) -> None:
    """Search the scale of one fold, apply it to the block and to the statistics of every input it feeds.

    A norm before experts feeds several inputs: all tokens go to the router, each expert sees some. The search uses the
    one with most tokens, which is all of them.
    """
    weights = [weight_of(block, local) for shared in fed for local in inputs[shared].names]
    widest = max(fed, key=lambda shared: statistics[shared[0]].tokens)
    if not weights or not statistics[widest[0]].tokens:
        return
    choice = search_scales(fold, weights, statistics[widest[0]], make_grid(config), config)
    columns = torch.ones(())
    if choice.label != "identity":
        columns = fold.per_column(fold.apply(block, choice.scales, dtype_on_disk(f"{name}.{fold.producer}.weight")))
    columns = columns.to(choice.scales.device)
    for shared in fed:
        gram = inputs[shared].gram / columns.unsqueeze(0) / columns.unsqueeze(-1)
        inputs[shared] = replace(inputs[shared], gram=gram, label=choice.label)


def _round_shared_input(
    block: nn.Module, name: str, scaled: _ScaledInput, config: QuantConfig, result: BlockResult
) -> None:
    """Clip and round the linears that share one input."""
    grid = make_grid(config)
    for local in scaled.names:
        weight = weight_of(block, local)
        factor = search_clip(weight, scaled.gram, grid) if config.clip else None
        tensor = grid.quantize(weight, factor)
        error = float(gram_error(tensor.dequantize() - weight, scaled.gram))
        # Later folds divide the rows of v and up, which scales their error and their energy alike.
        energy = float(gram_error(weight, scaled.gram))
        result.tensors[local] = tensor
        result.reports.append(
            LinearReport(
                name=f"{name}.{local}",
                scale=scaled.label,
                relative_error_rtn=scaled.rtn_errors[local] / max(scaled.energy[local], 1e-30),
                relative_error=error / max(energy, 1e-30),
                clipped_share=0.0 if factor is None else float((factor < 1).float().mean()),
            )
        )


def make_grid(config: QuantConfig) -> Grid:
    """The grid a resolved config asks for."""
    assert isinstance(config.group_size, int)
    return Grid(config.bits, config.group_size, config.zero_point)
