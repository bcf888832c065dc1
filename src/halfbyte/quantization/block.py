"""One decoder block: statistics → scale → clip → round.

The block arrives with its weights in fp32 and leaves with every fold applied in place; the quantized linears are
returned beside it. Its outputs are computed before any of that, so later blocks are calibrated on exact inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.architectures.skeleton import named_linears, weight_of
from halfbyte.quantization.capture import Batch
from halfbyte.quantization.clipping import search_clip
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.folding import PROOF_TOLERANCE, Fold, candidate_folds, proven
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.report import LinearReport
from halfbyte.quantization.scaling import gram_error, search_scales
from halfbyte.quantization.statistics import InputStatistics, StatisticsCollector, group_by_input
from halfbyte.tensor import QuantizedTensor

# The identity of a fold holds for any input, so a few tokens prove it; fp64 on more would only cost time.
PROOF_TOKENS = 8


@dataclass
class BlockResult:
    """Quantized linears of a block by their name inside it, what was measured, and what was refused."""

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def round_block(block: nn.Module, name: str, config: QuantConfig) -> BlockResult:
    """Rounding to nearest, no calibration: the `rtn` method."""
    result = BlockResult()
    for local, linear in named_linears(block):
        if not config.skips(f"{name}.{local}"):
            result.tensors[local] = make_grid(config).quantize(linear.weight.data)
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
    first = batches[0]
    shared_inputs = group_by_input(block, first.hidden[:1], first.kwargs[index])
    folds = _usable_folds(block, index, name, first, model_config, shared_inputs, config, result)
    statistics = _collect(block, index, batches, shared_inputs)
    # Every fold is applied before anything is rounded: the producer of a later fold (v, up) is a consumer of an
    # earlier one, and its rows must have their final scale when its codes are chosen.
    inputs = [
        _scale_shared_input(block, name, shared, folds.get(shared), statistics[shared[0]], config, dtype_on_disk)
        for shared in shared_inputs
    ]
    for scaled in inputs:
        _round_shared_input(block, name, scaled, config, result)
    return result


def _collect(
    block: nn.Module, index: int, batches: list[Batch], shared_inputs: list[tuple[str, ...]]
) -> dict[str, InputStatistics]:
    collector = StatisticsCollector(block, shared_inputs)
    outputs = collector.run((batch.hidden, batch.kwargs[index]) for batch in batches)
    # Lazily paired: each batch's input is dropped as soon as its output is there.
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
        batch.kwargs[index] = {}
    return collector.statistics


def _usable_folds(
    block: nn.Module,
    index: int,
    name: str,
    batch: Batch,
    model_config: Any,
    shared_inputs: list[tuple[str, ...]],
    config: QuantConfig,
    result: BlockResult,
) -> dict[tuple[str, ...], Fold]:
    """Folds that were proven, by the set of linears they feed. A consumer left in 16 bit is rescaled all the same."""
    candidates = [
        fold for fold in candidate_folds(block, model_config) if set(fold.consumers) in map(set, shared_inputs)
    ]
    usable = {}
    hidden = batch.hidden[:1, :PROOF_TOKENS]
    kwargs = _first_tokens(batch.kwargs[index], batch.hidden.shape[1])
    for fold, deviation in proven(block, candidates, hidden, kwargs):
        if deviation <= PROOF_TOLERANCE:
            usable[next(shared for shared in shared_inputs if set(shared) == set(fold.consumers))] = fold
        else:
            result.warnings.append(
                f"{name}: scaling {fold.producer} → {', '.join(fold.consumers)} changes the block's output by "
                f"{deviation:.1e}; those linears are quantized unscaled"
            )
    return usable


def _first_tokens(kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The block's other arguments, cut to PROOF_TOKENS wherever an axis runs over the batch's tokens."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value[:1] if value.ndim > 1 else value
            for axis in range(value.ndim):
                if value.shape[axis] == tokens:
                    value = value.narrow(axis, 0, min(PROOF_TOKENS, tokens))
            return value
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    return {key: cut(value) for key, value in kwargs.items()}


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


def _scale_shared_input(
    block: nn.Module,
    name: str,
    shared: tuple[str, ...],
    fold: Fold | None,
    statistics: InputStatistics,
    config: QuantConfig,
    dtype_on_disk: Callable[[str], torch.dtype],
) -> _ScaledInput:
    """Search the scale of one shared input and fold it into the block."""
    grid = make_grid(config)
    names = tuple(local for local in shared if not config.skips(f"{name}.{local}"))
    weights = [weight_of(block, local) for local in names]
    gram = statistics.gram
    energy = {local: float(gram_error(weight, gram)) for local, weight in zip(names, weights, strict=True)}
    rtn_errors = {
        local: float(gram_error(grid.fake_quantize(weight) - weight, gram))
        for local, weight in zip(names, weights, strict=True)
    }
    label = "none"
    if fold is not None and names:
        choice = search_scales(fold, weights, statistics, grid, config)
        label = choice.label
        if label != "identity":
            stored = dtype_on_disk(f"{name}.{fold.producer}.weight")
            columns = fold.per_column(fold.apply(block, choice.scales, stored))
            gram = gram / columns.unsqueeze(0) / columns.unsqueeze(1)
    return _ScaledInput(names, gram, label, energy, rtn_errors)


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
