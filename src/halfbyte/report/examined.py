"""Everything the report shows of one linear, measured in one pass over a pair of checkpoint and reference."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.analysis.channels import Channels, ChannelSalience, measure_channels
from halfbyte.analysis.layers import LayerError, measure_layer
from halfbyte.analysis.pair import N_SAMPLES, PairedMatrix
from halfbyte.analysis.result import Analysis, analyse
from halfbyte.analysis.rounding import RoundingStatistics, measure_rounding
from halfbyte.analysis.weights import WeightDistribution, measure_weights
from halfbyte.quantization.calibration import Calibration
from halfbyte.quantization.config import QuantConfig
from halfbyte.quantization.folding import Fold
from halfbyte.quantization.grid import Grid
from halfbyte.quantization.scaling import search_scales

# Channels, largest activation first, are shown as the means of so many bins; the first are shown one by one.
CHANNEL_BINS, CHANNELS_SHOWN = 48, 16
# Rows of a weight that its curve is of: a quarter of the search's own, as the shape is to be seen, not a winner found.
CURVE_ROWS = 64


@dataclass(frozen=True)
class SearchCurve:
    """The error of a linear over the ratio r of its scales, by the code that searches (`quantization.scaling`).

    It is of `CURVE_ROWS` rows of this linear alone; `quantize` adds up all linears that share a scale.

    Attributes:
        activations: (r, error over that without scaling) of s = x^r; r = 0 is none.
        duo: likewise of s = x^r / w^(1-r).
    """

    activations: tuple[tuple[float, float], ...]
    duo: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ExaminedLinear:
    """One linear.

    Attributes:
        name: dotted, on disk.
        error: how far it is from what it was.
        rounding: which way its weights were rounded.
        weights: how they are spread.
        channels: which of its inputs matter, with every channel; None without activations.
        curve: of the scale search; None without activations, or for a grid `Grid` cannot make.
    """

    name: str
    error: LayerError
    rounding: RoundingStatistics
    weights: WeightDistribution
    channels: ChannelSalience | None
    curve: SearchCurve | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as small as the report's page wants it."""
        weights = self.weights
        return {
            "std": weights.std,
            "low": weights.low,
            "high": weights.high,
            "stored_low": weights.stored_low,
            "stored_high": weights.stored_high,
            "entropy": weights.entropy,
            "before": _counts(weights.before),
            "after": _counts(weights.after),
            "errors": _counts(weights.errors),
            "codes": next(iter(weights.codes.values())),
            "channels": None if self.channels is None else _channels(self.channels),
            "curve": None if self.curve is None else {"activations": self.curve.activations, "duo": self.curve.duo},
        }


def examine(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    calibration: Calibration = "builtin",
    n_samples: int = N_SAMPLES,
    activations: bool = True,
    progress: bool = True,
) -> Analysis[ExaminedLinear]:
    """Everything of every quantized linear of a checkpoint.

    Args:
        model: a quantized checkpoint: a folder, a hub name, or MODEL@METHOD to quantize it for this.
        reference: the model it came from; None for the one its manifest names.
        calibration: text the activations are collected over, as `halfbyte.quantize` takes it.
        n_samples: blocks of 512 tokens of it at most.
        activations: False leaves them out, which saves running the model.
        progress: show bars on a terminal.

    Raises:
        HalfbyteError: a bad model, reference or text.
    """
    text = calibration if activations else None
    return analyse(examine_linear, model, reference, calibration=text, n_samples=n_samples, progress=progress)


def examine_linear(matrix: PairedMatrix) -> ExaminedLinear:
    """Everything of one linear."""
    known = matrix.statistics is not None and matrix.statistics.tokens > 0
    return ExaminedLinear(
        matrix.name,
        measure_layer(matrix),
        measure_rounding(matrix),
        measure_weights(matrix),
        measure_channels(matrix, every=True) if known else None,
        search_curve(matrix) if known else None,
    )


def search_curve(matrix: PairedMatrix) -> SearchCurve | None:
    """The error of one linear over the ratio of its scales; None for a grid `Grid` cannot make."""
    stored, statistics = matrix.stored, matrix.statistics
    if statistics is None or stored.group_index is not None or stored.input_scale is not None:
        return None
    fold = Fold(matrix.name, (matrix.name,), torch.arange(stored.in_features))
    config = QuantConfig(bits=stored.bits, group_size=stored.group_size)
    grid = Grid(stored.bits, stored.group_size, zero_point=True)
    choice = search_scales(fold, [matrix.reference[:: -(-stored.out_features // CURVE_ROWS)]], statistics, grid, config)
    curves: dict[bool, list[tuple[float, float]]] = {False: [(0.0, 1.0)], True: []}
    if choice.identity_error <= 0:
        return None
    for label, error in choice.tried:
        match = re.fullmatch(r"x\^([\d.e-]+)(/w\^.*)?", label)
        if match and math.isfinite(error):
            curves[match[2] is not None].append((float(match[1]), error / choice.identity_error))
    return SearchCurve(tuple(sorted(curves[False])), tuple(sorted(curves[True])))


def _counts(histogram: Any) -> list[int]:
    """What lies outside stands at either end."""
    return [histogram.below, *histogram.counts, histogram.above]


def _channels(found: ChannelSalience) -> dict[str, Any]:
    assert found.channels is not None
    every = found.channels
    order = sorted(range(found.in_features), key=lambda channel: -every.activation[channel])
    edges = [round(place * len(order) / CHANNEL_BINS) for place in range(CHANNEL_BINS + 1)]
    bins = [order[low:high] for low, high in itertools.pairwise(edges) if high > low]
    names = ("activation", "weight", "scale", "error_rtn", "error")
    return {
        "critical": list(found.critical[:CHANNELS_SHOWN]),
        "of_critical": {name: [getattr(every, name)[c] for c in found.critical[:CHANNELS_SHOWN]] for name in names},
        "by_rank": {name: [_mean(every, name, part) for part in bins] for name in names},
    }


def _mean(every: Channels, name: str, part: list[int]) -> float:
    values: list[float] = [getattr(every, name)[channel] for channel in part]
    if name == "scale":
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)
