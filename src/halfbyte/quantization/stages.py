"""The stages of a calibrated quantization, for the matrices that share one input: scale → range → round.

Each stage is measured by the same yardstick, E‖ΔW x‖² over the calibration tokens relative to E‖W x‖².
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.architectures.matrices import quantizable_matrices
from halfbyte.architectures.skeleton import weight_of
from halfbyte.quantization.clipping import GroupRanges, full_range, search_range
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.gram import gram_error
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.keeping import Kept, absorb, keep_columns
from halfbyte.quantization.report import LinearReport
from halfbyte.quantization.rounding import compensate
from halfbyte.quantization.scaling import search_scales
from halfbyte.quantization.statistics import InputStatistics
from halfbyte.tensor import QuantizedTensor


@dataclass
class SharedInput:
    """Matrices that consume the same rows, on their way through the stages.

    Attributes:
        names: of those to quantize, inside the block.
        grids: of each of them.
        statistics: of the input as the block was.
        gram: float32 [in, in] of the input they see now, after scaling.
        label: of the scale in effect.
        rtn_errors: relative error of each, rounded to nearest without scaling.
        broken: channels whose statistics were not finite and were set to zero.
    """

    names: tuple[str, ...]
    grids: dict[str, Grid]
    statistics: InputStatistics
    gram: torch.Tensor
    label: str
    rtn_errors: dict[str, float]
    broken: int

    @classmethod
    def measure(
        cls,
        block: nn.Module,
        name: str,
        shared: tuple[str, ...],
        statistics: InputStatistics,
        config: QuantConfig,
        widths: Mapping[str, int],
    ) -> SharedInput:
        """Before any fold is applied; statistics that are not finite are made harmless.

        `widths` has the bits of matrices that differ from the config, by their names inside the block.
        """
        quantizable = quantizable_matrices(block)
        names = tuple(local for local in shared if local in quantizable and not config.skips(f"{name}.{local}"))
        bad = ~torch.isfinite(statistics.gram.diagonal()) | ~torch.isfinite(statistics.mean_abs)
        if bad.any():
            statistics.gram[bad, :] = 0
            statistics.gram[:, bad] = 0
            statistics.mean_abs[bad] = 0
        grids = {local: make_grid(config, widths.get(local)) for local in names}
        errors = {}
        for local in names:
            weight = weight_of(block, local)
            errors[local] = RelativeError(weight, statistics.gram)(grids[local].fake_quantize(weight))
        return cls(names, grids, statistics, statistics.gram, "none", errors, int(bad.sum()))

    def warnings(self, name: str) -> list[str]:
        """What deserves a second look."""
        if not self.broken or not self.names:
            return []
        return [
            f"{name}: {self.broken} input channels of {', '.join(self.names)} are not finite over the calibration "
            f"tokens; they are left unscaled"
        ]


def scale_inputs(
    block: nn.Module, fold: Fold, fed: Sequence[SharedInput], config: QuantConfig, store_dtype: torch.dtype
) -> None:
    """Search the scale of one fold, apply it to the block and to the statistics of every input it feeds.

    A norm before experts feeds several inputs: all tokens go to the router, each expert sees some. The search uses the
    one with most tokens, which is all of them.

    Args:
        block: the fold is applied to it in place.
        fold: proven.
        fed: every input the fold scales.
        config: of the search.
        store_dtype: of the producer on disk, if it is not quantized.
    """
    weights = [weight_of(block, local) for shared in fed for local in shared.names]
    if not weights:
        return
    statistics = max((shared.statistics for shared in fed), key=lambda found: found.tokens)
    if not statistics.tokens:
        return
    # At the config's width even where a bit budget gives another: it measured the errors behind just these scales.
    choice = search_scales(fold, weights, statistics, make_grid(config), config)
    columns = torch.ones((), device=choice.scales.device)
    if choice.label != "identity":
        columns = fold.per_column(fold.apply(block, choice.scales, store_dtype))
    for shared in fed:
        shared.gram = shared.gram / columns.unsqueeze(0) / columns.unsqueeze(-1)
        shared.label = choice.label


def round_input(
    block: nn.Module, name: str, shared: SharedInput, config: QuantConfig
) -> Iterator[tuple[str, QuantizedTensor, LinearReport]]:
    """Choose ranges and codes; the block is not changed.

    Yields:
        Name inside the block, the quantized matrix, and what was measured.
    """
    for grid in dict.fromkeys(shared.grids.values()):
        names = [local for local in shared.names if shared.grids[local] == grid]
        yield from _round_on(block, name, shared, names, grid, config)


def _round_on(
    block: nn.Module, name: str, shared: SharedInput, names: Sequence[str], grid: Grid, config: QuantConfig
) -> Iterator[tuple[str, QuantizedTensor, LinearReport]]:
    """The same for those of the matrices that have one grid."""
    gram = shared.gram
    weights = [weight_of(block, local) for local in names]
    rounded = choose_codes(torch.cat(weights), gram, grid, config)
    dead = int((gram.diagonal() == 0).sum())
    start = 0
    for local, weight in zip(names, weights, strict=True):
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        tensor, nearest = rounded.tensors(rows, weight, grid)
        relative = RelativeError(weight, gram)
        ranged = relative(nearest.dequantize())
        report = LinearReport(
            name=f"{name}.{local}",
            scale=shared.label,
            relative_error_rtn=shared.rtn_errors[local],
            relative_error_scaled=relative(grid.fake_quantize(weight)),
            relative_error_ranged=ranged,
            relative_error=ranged if tensor is nearest else relative(tensor.dequantize()),
            clipped_share=float(rounded.ranges.clipped[rows].float().mean()),
            dead_channels=dead,
            bits=grid.bits,
        )
        yield local, tensor, report


@dataclass(frozen=True)
class RoundedRows:
    """What was chosen for the rows of all matrices that share an input.

    Attributes:
        ranges: the grid of each group.
        nearest: float32 [rows, in], codes rounded to nearest on it.
        codes: float32 [rows, in], the codes to store.
        kept: columns that stay in 16 bit, or None.
    """

    ranges: GroupRanges
    nearest: torch.Tensor
    codes: torch.Tensor
    kept: Kept | None

    def tensors(self, rows: slice, weight: torch.Tensor, grid: Grid) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Some rows as stored and as rounding to nearest would have them; `weight` [rows, in] is the original."""

        def tensor(codes: torch.Tensor) -> QuantizedTensor:
            plain = grid.tensor(codes[rows], self.ranges.scales[rows], self.ranges.zeros[rows])
            return plain if self.kept is None else self.kept.put_into(plain, weight)

        stored = tensor(self.codes)
        return stored, stored if self.codes is self.nearest else tensor(self.nearest)


def choose_codes(weight: torch.Tensor, gram: torch.Tensor | None, grid: Grid, config: QuantConfig) -> RoundedRows:
    """Kept columns, ranges and codes of a weight float32 [rows, in]; `gram` [in, in] or None without calibration."""
    kept = keep_columns(weight, gram, grid, config.keep_ratio) if config.keep_ratio else None
    if kept is not None:
        weight = kept.removed_from(weight)
        if gram is not None and config.rounding == "compensated":
            kept, gram = absorb(kept, gram)
    ranges = full_range(weight, grid) if gram is None or not config.clip else search_range(weight, gram, grid)
    nearest = grid.nearest(weight, ranges.scales, ranges.zeros)
    codes = nearest
    if config.rounding == "compensated":
        assert gram is not None
        assert config.sweeps is not None
        codes = compensate(weight, gram, ranges, grid, sweeps=config.sweeps)
    return RoundedRows(ranges, nearest, codes, kept)


class RelativeError:
    """E‖(Ŵ - W) x‖² / E‖W x‖² of one W [out, in], for one Ŵ after another; 0 where the input is always zero."""

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor):
        self._weight, self._gram = weight, gram
        self._energy = max(float(gram_error(weight, gram)), 1e-30)

    def __call__(self, found: torch.Tensor) -> float:
        """Of Ŵ = `found`, float32 [out, in]."""
        return float(gram_error(found - self._weight, self._gram)) / self._energy


def make_grid(config: QuantConfig, bits: int | None = None) -> Grid:
    """The grid a resolved config asks for, for codes of `bits` if they are not as wide as it says."""
    assert isinstance(config.group_size, int)
    return Grid(config.bits if bits is None else bits, config.group_size, config.zero_point)
